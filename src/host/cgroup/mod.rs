//! Each VM in control groups of its own, away from the caller's.
//!
//! A Director's worker is stopped by ending its control group; a VM in it would end with it. The groups are
//! `bosh-qemu-cpi/<cid>` in every hierarchy that can be written: the unified one (v2), or on older and hybrid hosts each
//! of the v1 hierarchies that matter. Where systemd runs the host, the tree is systemd's, and it is asked for a
//! `scope`. A host where nothing can be had is no error: what is missing is logged.
//!
//! The groups also keep a VM to its limits, so that one whose QEMU runs wild is ended alone. What those limits are is for
//! whoever knows what runs in them.

mod hierarchy;
mod scope;

use std::collections::BTreeSet;
use std::io::{self, ErrorKind::NotFound};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::libc;
use nix::sys::signal::Signal;

use self::hierarchy::Hierarchy;
use crate::crash;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::sys::pidfd::Process;
use crate::units::Bytes;

/// The parent of all groups, removed with the last of them.
const PARENT: &str = "bosh-qemu-cpi";
/// A process that was killed leaves its group within microseconds of its end.
const GROUP_EMPTY_TIMEOUT: Duration = Duration::from_secs(2);

/// What the processes of one VM may have together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Memory: anonymous, the page cache their files are read into, and the kernel's in their behalf. `None`: no limit.
    pub memory: Option<Bytes>,
    /// Processes and threads.
    pub pids: u64,
    /// Share of the CPUs among VMs when all are busy, from 1 to 10000; `None`: 100, as every group.
    pub cpu_weight: Option<u64>,
}

/// The control groups of one VM.
#[derive(Debug)]
pub struct Cgroup {
    name: String,
    hierarchies: Vec<Hierarchy>,
}

impl Cgroup {
    /// The groups of the VM `name`, whether they exist or not.
    pub fn open(name: &str) -> Self {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        Self { name: name.to_owned(), hierarchies: Hierarchy::all(&mounts) }
    }

    /// The group in each hierarchy that we make ourselves, and whether the hierarchy is unified.
    fn dirs(&self) -> impl Iterator<Item = (PathBuf, bool)> {
        self.hierarchies
            .iter()
            .map(|hierarchy| (hierarchy.root.join(PARENT).join(&self.name), hierarchy.unified))
    }

    /// Every group there may be, systemd's scopes included.
    fn all_dirs(&self) -> Vec<(PathBuf, bool)> {
        let scopes = self.hierarchies.iter().flat_map(|hierarchy| {
            scope::dirs_of(&hierarchy.root, &self.name)
                .into_iter()
                .map(|dir| (dir, hierarchy.unified))
        });
        scopes.chain(self.dirs()).collect()
    }

    /// Makes the groups with their limits and moves this process, and so its future children, into them.
    pub fn enter(&self, limits: &Limits) {
        if scope::is_systemd_host() {
            match scope::enter(&self.name, limits) {
                Ok(()) => return,
                Err(error) => {
                    tracing::warn!(error = error.report(), "making control groups without systemd")
                }
            }
        }
        let mut set = 0;
        for hierarchy in &self.hierarchies {
            let parent = hierarchy.root.join(PARENT);
            let dir = parent.join(&self.name);
            let entered = make(&dir).and_then(|()| {
                hierarchy.delegate_controllers(&parent);
                set += hierarchy::set_limits(&dir, hierarchy.unified, limits).unwrap_or_else(
                    |error| {
                        tracing::warn!(%error, group = %dir.display(), "can not limit the VM");
                        0
                    },
                );
                join(&dir)
            });
            if let Err(error) = entered {
                tracing::warn!(%error, group = %dir.display(), "can not leave the caller's control group");
            }
            crash::point!("control group entered");
        }
        if set == 0 {
            tracing::warn!("no control group of this host takes limits: the VM has none");
        }
    }

    /// Moves this process into the groups that are there: the VM runs in them already.
    pub fn rejoin(&self) {
        for (dir, _) in self.all_dirs().into_iter().filter(|(dir, _)| dir.exists()) {
            if let Err(error) = join(&dir) {
                tracing::warn!(%error, group = %dir.display(), "can not leave the caller's control group");
            }
        }
    }

    /// How often a process in the groups was killed for want of memory, as far as the kernel counts it here. Never goes
    /// down while the groups exist.
    pub fn oom_kills(&self) -> u64 {
        let counts = self
            .all_dirs()
            .into_iter()
            .filter_map(|(dir, unified)| hierarchy::oom_kills(&dir, unified));
        counts.max().unwrap_or(0)
    }

    /// Whether any of the groups is there.
    pub fn exists(&self) -> bool {
        self.all_dirs().iter().any(|(dir, _)| dir.exists())
    }

    /// The processes in the groups that have not ended.
    ///
    /// # Errors
    /// If that can not be told: a group that is not there has none, one that can not be read may have some.
    pub fn processes(&self) -> Result<Vec<Process>> {
        let mut pids = BTreeSet::new();
        for (dir, _) in self.all_dirs() {
            let list = dir.join("cgroup.procs");
            match std::fs::read_to_string(&list) {
                // Of a group that goes at this moment, the kernel says ENODEV.
                Err(error)
                    if error.kind() == NotFound || error.raw_os_error() == Some(libc::ENODEV) => {}
                text => pids.extend(text.at("read", &list)?.split_whitespace().map(str::to_owned)),
            }
        }
        let mut processes = Vec::new();
        for pid in pids {
            // 0 stands for one of another pid namespace.
            let pid = pid.parse().ok().filter(|pid| *pid > 0).ok_or_else(|| {
                let message = format!(
                    "the control groups of '{}' have a process that has no pid here",
                    self.name
                );
                Error::new(ErrorKind::Host, message).hint("call from the pid namespace of the host")
            })?;
            processes.extend(Process::find(pid)?);
        }
        processes.retain(|process| !process.wait_exit(Instant::now()).unwrap_or(false));
        Ok(processes)
    }

    /// Kills every process in the groups and waits until they have ended, at most until `deadline`.
    pub fn kill(&self, deadline: Instant) -> Result<()> {
        for (dir, _) in self.all_dirs() {
            let members = || std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
            for pid in members().split_whitespace() {
                let Ok(number) = pid.parse::<i32>() else { continue };
                let Ok(process) = Process::open(number) else { continue };
                // Still a member after it was opened: the number means the same process.
                if members().split_whitespace().any(|member| member == pid) {
                    tracing::warn!(pid, group = %dir.display(), "killing what is left in the VM's control group");
                    process.signal(Signal::SIGKILL)?;
                    process.wait_exit(deadline)?;
                }
            }
        }
        Ok(())
    }

    /// Removes the groups, all that can be; absent is fine. Their processes must have ended.
    ///
    /// # Errors
    /// The first that can not be removed, with the processes in it as the hint.
    pub fn remove(&self) -> Result<()> {
        self.remove_until(Instant::now() + GROUP_EMPTY_TIMEOUT)
    }

    fn remove_until(&self, deadline: Instant) -> Result<()> {
        let results: Vec<_> = self.dirs().map(|(dir, _)| remove(&dir, deadline)).collect();
        results.into_iter().collect()
    }
}

/// Makes a group and its parent. The removal of another VM's group may take the empty parent away at any moment in
/// between, which `create_dir_all` answers with one error or another.
fn make(dir: &Path) -> io::Result<()> {
    let made = |dir: &Path| match std::fs::create_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made,
    };
    let parent = dir.parent().expect("a group is below a hierarchy");
    let mut tries = 0..100;
    loop {
        match made(parent).and_then(|()| made(dir)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && tries.next().is_some() => {}
            made => return made,
        }
    }
}

fn remove(dir: &Path, deadline: Instant) -> Result<()> {
    loop {
        match std::fs::remove_dir(dir) {
            Ok(()) => break,
            Err(error) if error.kind() == io::ErrorKind::NotFound => break,
            // The kernel takes a dead process out of its group a moment after its pidfd tells of its end.
            Err(error)
                if error.raw_os_error() == Some(nix::libc::EBUSY) && Instant::now() < deadline =>
            {
                std::thread::yield_now();
            }
            Err(error) => {
                let inside = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
                let pids = inside.split_whitespace().collect::<Vec<_>>().join(", ");
                return Err(Error::io("remove control group", dir, error).hint(format!(
                    "processes in it: {}",
                    if pids.is_empty() { "none" } else { &pids }
                )));
            }
        }
    }
    // Fails while other VMs are there, which is the point.
    let _ = dir.parent().map(std::fs::remove_dir);
    crash::point!("control group removed");
    Ok(())
}

/// cgroups(7): 0 is the process that writes it.
fn join(dir: &Path) -> io::Result<()> {
    std::fs::write(dir.join("cgroup.procs"), "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Groups of this host under a name of nobody else's, if it lets us make any.
    #[allow(clippy::print_stderr)]
    fn live(name: &str) -> Option<Cgroup> {
        let mut group = Cgroup::open(&format!("test-{}-{name}", std::process::id()));
        group
            .hierarchies
            .retain(|hierarchy| make(&hierarchy.root.join(PARENT).join(&group.name)).is_ok());
        if group.hierarchies.is_empty() {
            eprintln!("SKIP: no control group can be made on this host");
            return None;
        }
        Some(group)
    }

    #[test]
    fn a_group_with_a_process_stays_and_names_it() {
        let Some(group) = live("busy") else { return };
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let (last, _) = group.dirs().last().unwrap();
        std::fs::write(last.join("cgroup.procs"), child.id().to_string()).unwrap();
        let error = group.remove_until(Instant::now()).unwrap_err();
        assert!(
            error.report().ends_with(&format!("processes in it: {}", child.id())),
            "{}",
            error.report()
        );
        assert!(group.dirs().all(|(dir, _)| dir.exists() == (dir == last)), "the others are gone");
        child.kill().unwrap();
        child.wait().unwrap();
        group.remove().unwrap();
        assert!(!last.exists());
    }

    #[test]
    fn a_group_is_made_while_the_last_other_is_removed() {
        // Directories will do: the race is between mkdir(2) and rmdir(2).
        let root = tempfile::tempdir_in("/dev/shm").unwrap();
        let hierarchies = vec![Hierarchy { root: root.path().to_owned(), unified: true }];
        let group = |name: &str| Cgroup { name: name.to_owned(), hierarchies: hierarchies.clone() };
        let rounds = |name: &str| {
            for _ in 0..5_000 {
                let group = group(name);
                make(&root.path().join(PARENT).join(name)).unwrap();
                group.remove().unwrap();
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(|| rounds("one"));
            scope.spawn(|| rounds("other"));
        });
    }

    #[test]
    fn removing_what_was_never_made_is_fine() {
        Cgroup::open("vm-that-never-was").remove().unwrap();
    }
}
