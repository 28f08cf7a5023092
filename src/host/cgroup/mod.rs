//! The control groups of each VM, separate from those of the call that starts it.
//!
//! A service manager stops a Director's worker by ending its control group; a VM in that group
//! would end with it. The VM's groups are `bosh-qemu-cpi/<cid>` in every writable hierarchy: the
//! unified one (v2), or on older and hybrid hosts the v1 hierarchies that matter. On a host that
//! runs systemd, systemd owns the tree and makes a `scope` for the VM. A host without usable
//! hierarchies is no error: the missing groups are logged.
//!
//! The groups also limit the VM's resources, so that a QEMU that runs wild ends alone. The caller
//! decides on the limits.

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

/// The parent of all VMs' groups; it is removed with the last of them.
const PARENT: &str = "bosh-qemu-cpi";
/// How long a group may take to become empty after its last process has ended: normally
/// microseconds.
const GROUP_EMPTY_TIMEOUT: Duration = Duration::from_secs(2);

/// What the processes of one VM may use together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Memory in bytes: anonymous memory, page cache, and the kernel's memory for these processes.
    /// `None`: no limit.
    pub memory: Option<Bytes>,
    /// Number of processes and threads.
    pub pids: u64,
    /// Share of the CPUs among VMs when all CPUs are busy, from 1 to 10000. `None`: 100, the
    /// default of every group.
    pub cpu_weight: Option<u64>,
}

/// The control groups of one VM.
#[derive(Debug)]
pub struct Cgroup {
    name: String,
    hierarchies: Vec<Hierarchy>,
}

impl Cgroup {
    /// Returns the groups of the VM `name`, whether they exist or not.
    pub fn open(name: &str) -> Self {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        Self { name: name.to_owned(), hierarchies: Hierarchy::all(&mounts) }
    }

    /// Returns the group in each hierarchy that this program makes itself, and whether the
    /// hierarchy is unified.
    fn dirs(&self) -> impl Iterator<Item = (PathBuf, bool)> {
        self.hierarchies
            .iter()
            .map(|hierarchy| (hierarchy.root.join(PARENT).join(&self.name), hierarchy.unified))
    }

    /// Returns every group the VM may have, including systemd's scopes.
    fn all_dirs(&self) -> Vec<(PathBuf, bool)> {
        let scopes = self.hierarchies.iter().flat_map(|hierarchy| {
            scope::dirs_of(&hierarchy.root, &self.name)
                .into_iter()
                .map(|dir| (dir, hierarchy.unified))
        });
        scopes.chain(self.dirs()).collect()
    }

    /// Makes the groups with their limits and moves this process into them. Its future children
    /// inherit them.
    pub fn enter(&self, limits: &Limits) {
        if scope::is_systemd_host() {
            match scope::enter(&self.name, limits) {
                Ok(()) => return,
                Err(error) => {
                    tracing::warn!(error = error.report(), "making control groups without systemd");
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
                        tracing::warn!(%error, group = %dir.display(), "cannot limit the VM");
                        0
                    },
                );
                join(&dir)
            });
            if let Err(error) = entered {
                let group = dir.display();
                tracing::warn!(%error, %group, "cannot leave the caller's control group");
            }
            crash::point!("control group entered");
        }
        if set == 0 {
            tracing::warn!("no control group of this host supports limits: the VM has none");
        }
    }

    /// Moves this process into the existing groups, in which the VM already runs.
    pub fn rejoin(&self) {
        for (dir, _) in self.all_dirs().into_iter().filter(|(dir, _)| dir.exists()) {
            if let Err(error) = join(&dir) {
                let group = dir.display();
                tracing::warn!(%error, %group, "cannot leave the caller's control group");
            }
        }
    }

    /// Returns how often the OOM killer killed a process in the groups; 0 where the kernel does not
    /// count it. The number never decreases while the groups exist.
    pub fn oom_kills(&self) -> u64 {
        let counts = self
            .all_dirs()
            .into_iter()
            .filter_map(|(dir, unified)| hierarchy::oom_kills(&dir, unified));
        counts.max().unwrap_or(0)
    }

    /// Returns whether any of the groups exists.
    pub fn exists(&self) -> bool {
        self.all_dirs().iter().any(|(dir, _)| dir.exists())
    }

    /// Returns the processes in the groups that have not ended. A group that does not exist has
    /// none.
    ///
    /// # Errors
    /// If a group cannot be read, because it may contain processes. [`ErrorKind::Host`] for a
    /// process of another pid namespace.
    pub fn processes(&self) -> Result<Vec<Process>> {
        let mut pids = BTreeSet::new();
        for (dir, _) in self.all_dirs() {
            let list = dir.join("cgroup.procs");
            match std::fs::read_to_string(&list) {
                // ENODEV: the kernel is removing the group at this moment.
                Err(error)
                    if error.kind() == NotFound || error.raw_os_error() == Some(libc::ENODEV) => {}
                text => pids.extend(text.at("read", &list)?.split_whitespace().map(str::to_owned)),
            }
        }
        let mut processes = Vec::new();
        for pid in pids {
            // The kernel writes 0 for a process of another pid namespace.
            let pid = pid.parse().ok().filter(|pid| *pid > 0).ok_or_else(|| {
                let message = format!(
                    "the control groups of '{}' contain a process of another pid namespace",
                    self.name
                );
                Error::new(ErrorKind::Host, message).hint("run the CPI in the host's pid namespace")
            })?;
            processes.extend(Process::find(pid)?);
        }
        processes.retain(|process| !process.wait_exit(Instant::now()).unwrap_or(false));
        Ok(processes)
    }

    /// Kills every process in the groups and waits until they have ended, at most until `deadline`.
    ///
    /// # Errors
    /// If a process cannot be signalled. A process that has not ended by `deadline` is no error.
    pub fn kill(&self, deadline: Instant) -> Result<()> {
        for (dir, _) in self.all_dirs() {
            let members = || std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
            for pid in members().split_whitespace() {
                let Ok(number) = pid.parse::<i32>() else { continue };
                let Ok(process) = Process::open(number) else { continue };
                // Still a member after it was opened, so the pid was not reused.
                if members().split_whitespace().any(|member| member == pid) {
                    let group = dir.display();
                    tracing::warn!(pid, %group, "killing a process left in the VM's control group");
                    process.signal(Signal::SIGKILL)?;
                    process.wait_exit(deadline)?;
                }
            }
        }
        Ok(())
    }

    /// Removes all groups that can be removed. Their processes must have ended. A group that does
    /// not exist is no error.
    ///
    /// # Errors
    /// For the first group that cannot be removed, with the processes in it as the hint.
    pub fn remove(&self) -> Result<()> {
        self.remove_until(Instant::now() + GROUP_EMPTY_TIMEOUT)
    }

    fn remove_until(&self, deadline: Instant) -> Result<()> {
        let results: Vec<_> = self.dirs().map(|(dir, _)| remove(&dir, deadline)).collect();
        results.into_iter().collect()
    }
}

/// Makes a group and its parent. Not with `create_dir_all`, which fails in different ways if the
/// removal of another VM's group removes the empty parent meanwhile.
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
            // The kernel removes a dead process from its group a moment after its pidfd reports the
            // end.
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
    // Fails while other VMs have groups, as intended.
    let _ = dir.parent().map(std::fs::remove_dir);
    crash::point!("control group removed");
    Ok(())
}

/// Moves this process into the group `dir`: 0 stands for the process that writes it (cgroups(7)).
fn join(dir: &Path) -> io::Result<()> {
    std::fs::write(dir.join("cgroup.procs"), "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes groups of this host under a unique name; `None` if the host does not allow it.
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
    fn remove_of_a_group_with_a_process_fails_and_names_it() {
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
    fn make_succeeds_while_the_last_other_group_is_removed() {
        // Ordinary directories are enough: the race is between mkdir(2) and rmdir(2).
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
    fn remove_of_groups_that_do_not_exist_succeeds() {
        Cgroup::open("vm-that-never-was").remove().unwrap();
    }
}
