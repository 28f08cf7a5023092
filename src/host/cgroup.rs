//! Each VM in control groups of its own, away from the caller's.
//!
//! A Director's worker is stopped by ending its control group; a VM in it would end with it. The groups are
//! `bosh-qemu-cpi/<cid>` in every hierarchy that can be written: the unified one (v2), or on older and hybrid hosts each
//! of the v1 hierarchies below. A host where none can be written is no error: what is missing is logged.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::crash;
use crate::error::{Error, Result};
use crate::sys::pidfd::Process;

/// The parent of all groups, removed with the last of them.
const PARENT: &str = "bosh-qemu-cpi";
/// v1 hierarchies worth leaving the caller's group in: limits act there, and a service manager kills by the last.
const V1: [&str; 4] = ["memory", "cpu", "pids", "name=systemd"];
/// A process that was killed leaves its group within microseconds of its end.
const EMPTY: Duration = Duration::from_secs(2);

/// The control groups of one VM.
#[derive(Debug)]
pub struct Cgroup {
    dirs: Vec<PathBuf>,
}

impl Cgroup {
    /// The groups of the VM `name`, whether they exist or not.
    pub fn open(name: &str) -> Self {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        Self { dirs: hierarchies(&mounts).into_iter().map(|root| root.join(PARENT).join(name)).collect() }
    }

    /// Makes the groups and moves this process, and so its future children, into them.
    pub fn enter(&self) {
        for dir in &self.dirs {
            // cgroups(7): 0 is the process that writes it.
            if let Err(error) = make(dir).and_then(|()| std::fs::write(dir.join("cgroup.procs"), "0")) {
                tracing::warn!(%error, group = %dir.display(), "can not leave the caller's control group");
            }
            crash::point!("control group entered");
        }
    }

    /// Whether any of the groups is there.
    pub fn exists(&self) -> bool {
        self.dirs.iter().any(|dir| dir.exists())
    }

    /// The numbers of the processes in the groups.
    pub fn processes(&self) -> Vec<String> {
        let listed = self.dirs.iter().filter_map(|dir| std::fs::read_to_string(dir.join("cgroup.procs")).ok());
        let mut pids: Vec<_> = listed.flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>()).collect();
        pids.sort();
        pids.dedup();
        pids
    }

    /// Kills every process in the groups and waits until they have ended, at most until `deadline`.
    pub fn kill(&self, deadline: Instant) -> Result<()> {
        for dir in &self.dirs {
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
        self.remove_until(Instant::now() + EMPTY)
    }

    fn remove_until(&self, deadline: Instant) -> Result<()> {
        let results: Vec<_> = self.dirs.iter().map(|dir| remove(dir, deadline)).collect();
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
            Err(error) if error.raw_os_error() == Some(nix::libc::EBUSY) && Instant::now() < deadline => {
                std::thread::yield_now();
            }
            Err(error) => {
                let inside = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
                let pids = inside.split_whitespace().collect::<Vec<_>>().join(", ");
                return Err(Error::io("remove control group", dir, error)
                    .hint(format!("processes in it: {}", if pids.is_empty() { "none" } else { &pids })));
            }
        }
    }
    // Fails while other VMs are there, which is the point.
    let _ = dir.parent().map(std::fs::remove_dir);
    crash::point!("control group removed");
    Ok(())
}

/// Where the hierarchies are mounted, out of the text of mountinfo (proc(5)).
fn hierarchies(mountinfo: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for line in mountinfo.lines() {
        let Some((before, after)) = line.split_once(" - ") else { continue };
        let (Some(point), mut kind) = (before.split(' ').nth(4), after.split(' ')) else { continue };
        let (filesystem, options) = (kind.next().unwrap_or_default(), kind.nth(1).unwrap_or_default());
        let wanted = match filesystem {
            "cgroup2" => true,
            "cgroup" => options.split(',').any(|option| V1.contains(&option)),
            _ => false,
        };
        if wanted {
            found.push(Path::new(point).to_owned());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_of_a_hybrid_host() {
        let mounts = "\
            30 29 0:27 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw\n\
            31 29 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
            32 29 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
            33 29 0:30 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer\n\
            34 29 0:31 / /proc rw - proc proc rw\n";
        let names: Vec<_> = hierarchies(mounts).iter().map(|p| p.file_name().unwrap().to_owned()).collect();
        assert_eq!(names, ["unified", "systemd", "memory"]);
    }

    /// Groups of this host under a name of nobody else's, if it lets us make any.
    #[allow(clippy::print_stderr)]
    fn live(name: &str) -> Option<Cgroup> {
        let group = Cgroup::open(&format!("test-{}-{name}", std::process::id()));
        let mut dirs = group.dirs;
        dirs.retain(|dir| make(dir).is_ok());
        if dirs.is_empty() {
            eprintln!("SKIP: no control group can be made on this host");
            return None;
        }
        Some(Cgroup { dirs })
    }

    #[test]
    fn a_group_with_a_process_stays_and_names_it() {
        let Some(group) = live("busy") else { return };
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let last = group.dirs.last().unwrap();
        std::fs::write(last.join("cgroup.procs"), child.id().to_string()).unwrap();
        let error = group.remove_until(Instant::now()).unwrap_err();
        assert!(error.report().ends_with(&format!("processes in it: {}", child.id())), "{}", error.report());
        assert!(group.dirs.iter().all(|dir| dir.exists() == (dir == last)), "the others are gone");
        child.kill().unwrap();
        child.wait().unwrap();
        group.remove().unwrap();
        assert!(!last.exists());
    }

    #[test]
    fn a_group_is_made_while_the_last_other_is_removed() {
        // Directories will do: the race is between mkdir(2) and rmdir(2).
        let root = tempfile::tempdir_in("/dev/shm").unwrap();
        let group = |name: &str| Cgroup { dirs: vec![root.path().join(PARENT).join(name)] };
        let rounds = |name: &str| {
            for _ in 0..5_000 {
                let group = group(name);
                make(&group.dirs[0]).unwrap();
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
