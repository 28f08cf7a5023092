//! Each VM in control groups of its own, away from the caller's.
//!
//! A Director's worker is stopped by ending its control group; a VM in it would end with it. The groups are
//! `bosh-qemu-cpi/<cid>` in every hierarchy that can be written: the unified one (v2), or on older and hybrid hosts each
//! of the v1 hierarchies below. A host where none can be written is no error: what is missing is logged.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

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
            let enter = || std::fs::create_dir_all(dir).and_then(|()| std::fs::write(dir.join("cgroup.procs"), "0"));
            // The last VM's removal may take the parent away in between.
            let entered = enter().or_else(|_| enter());
            if let Err(error) = entered {
                tracing::warn!(%error, group = %dir.display(), "can not leave the caller's control group");
            }
        }
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

    /// Removes the groups; absent is fine. Their processes must have ended.
    pub fn remove(&self) -> Result<()> {
        for dir in &self.dirs {
            let deadline = Instant::now() + EMPTY;
            loop {
                match std::fs::remove_dir(dir) {
                    Ok(()) => break,
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => break,
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
        }
        Ok(())
    }
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

    #[test]
    fn removing_what_was_never_made_is_fine() {
        Cgroup::open("vm-that-never-was").remove().unwrap();
    }
}
