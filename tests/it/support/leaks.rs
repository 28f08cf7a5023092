//! Finds what a test leaves on its host: processes, links, tables, control groups, uids, locks,
//! sockets, files.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bosh_qemu_cpi::sys::pidfd::Process;
use nix::sys::signal::Signal;
use serde_json::Value;

use super::host::{Host, timeout};
use super::nftables;

impl Host {
    /// Everything on the host that this test made, without the operator's bridges.
    pub fn leaks(&self) -> Vec<String> {
        let mut left: Vec<_> = self
            .processes()
            .into_iter()
            .map(|(pid, words)| format!("process {pid}: {words}"))
            .collect();
        let links = self.namespace.ip_json("link show");
        let ours = |link: &&Value| {
            let kind = link["linkinfo"]["info_kind"].as_str();
            kind == Some("tun")
                || link["ifalias"].as_str().is_some_and(|alias| alias.starts_with("bosh-qemu-cpi"))
        };
        left.extend(
            links
                .as_array()
                .unwrap()
                .iter()
                .filter(ours)
                .map(|link| format!("link {}", link["ifname"])),
        );
        left.extend(
            self.namespace.run(nftables::tables).into_iter().map(|table| format!("table {table}")),
        );
        left.extend(self.groups().iter().map(|group| format!("control group {}", group.display())));
        for root in [self.path("state"), self.run.path().to_owned()] {
            let entries = walk(&root)
                .into_iter()
                .map(|path| path.strip_prefix(&root).unwrap().display().to_string());
            let kept = [
                "schema",
                "state",
                "stemcells",
                "snaps",
                "vms",
                "disks",
                "networks",
                "claims",
                "locks",
                "pending",
                "uids",
                "pools",
                "disk.key",
                "host-id",
                "probe.json",
                "io-uring.json",
            ];
            // `pools/<name>` marks a pool as used, `called-off/<cid>` is the tombstone of a
            // cancelled create.
            let notes =
                |entry: &str| entry.starts_with("pools/") || entry.starts_with("called-off");
            left.extend(entries.filter(|entry| !kept.contains(&entry.as_str()) && !notes(entry)));
        }
        left
    }

    /// The same after all VMs are deleted. Waits for processes that are still exiting.
    pub fn leaks_after_exits(&self) -> Vec<String> {
        let deadline = Instant::now() + timeout();
        loop {
            let left = self.leaks();
            let ends = left.iter().any(|line| line.starts_with("process"));
            if !ends || Instant::now() >= deadline {
                return left;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn groups(&self) -> Vec<PathBuf> {
        let vms = self.vms.lock().unwrap();
        let roots = fs::read_dir("/sys/fs/cgroup")
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path());
        let roots: Vec<_> = roots.chain(["/sys/fs/cgroup".into()]).collect();
        let groups = vms
            .iter()
            .flat_map(|vm| roots.iter().map(move |root| root.join("bosh-qemu-cpi").join(vm)));
        groups.filter(|group| group.exists()).collect()
    }

    /// Processes whose command line names the directories or VMs of this test, or that have a file
    /// in those directories open.
    fn processes(&self) -> Vec<(i32, String)> {
        let dirs =
            [self.dir.path(), self.run.path()].map(|dir| dir.as_os_str().as_bytes().to_owned());
        let vms = self.vms.lock().unwrap();
        let needles: Vec<&[u8]> =
            dirs.iter().map(Vec::as_slice).chain(vms.iter().map(String::as_bytes)).collect();
        let names = |bytes: &[u8]| {
            needles.iter().any(|n| bytes.windows(n.len()).any(|window| window == *n))
        };
        let pids = fs::read_dir("/proc")
            .unwrap()
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let others = pids.filter(|pid: &i32| pid.unsigned_abs() != std::process::id());
        others
            .filter_map(|pid| {
                let process = PathBuf::from(format!("/proc/{pid}"));
                let words = fs::read(process.join("cmdline")).ok()?;
                let files = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
                let mut links = files.filter_map(|file| fs::read_link(file.path()).ok());
                let ours = names(&words) || links.any(|link| names(link.as_os_str().as_bytes()));
                ours.then(|| {
                    (
                        pid,
                        String::from_utf8_lossy(&words)
                            .replace('\0', " ")
                            .chars()
                            .take(120)
                            .collect(),
                    )
                })
            })
            .collect()
    }

    /// Kills the processes and removes the control groups of a failed test, so that other tests are
    /// not disturbed.
    pub(super) fn tear_down(&self) {
        for (pid, _) in self.processes() {
            if let Ok(process) = Process::open(pid) {
                let _ = process
                    .signal(Signal::SIGKILL)
                    .and_then(|()| process.wait_exit(Instant::now() + timeout()));
            }
        }
        for group in self.groups() {
            let _ = fs::remove_dir(group);
        }
    }
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let below = |path: PathBuf| {
        let inside = if path.is_symlink() || !path.is_dir() { Vec::new() } else { walk(&path) };
        std::iter::once(path).chain(inside)
    };
    entries.flat_map(below).collect()
}
