//! The kernel's hierarchies of control groups: where they are mounted, and the name of each limit
//! in v1 and v2.

use std::io;
use std::path::{Path, PathBuf};

use super::Limits;

/// The v1 hierarchies in which a VM gets its own group. Limits act in the first three; a service
/// manager kills by the last.
const V1: [&str; 4] = ["memory", "cpu", "pids", "name=systemd"];
/// The v2 controllers that limits need. A group has only those that its parent delegates to it.
const CONTROLLERS: [&str; 3] = ["memory", "pids", "cpu"];

/// One mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hierarchy {
    pub(super) root: PathBuf,
    /// Whether it is the unified hierarchy (v2), not one of v1.
    pub(super) unified: bool,
}

impl Hierarchy {
    /// Parses the mounted hierarchies from the text of mountinfo (proc(5)).
    pub(super) fn all(mountinfo: &str) -> Vec<Self> {
        let mut found = Vec::new();
        for line in mountinfo.lines() {
            let Some((before, after)) = line.split_once(" - ") else { continue };
            let (Some(point), mut kind) = (before.split(' ').nth(4), after.split(' ')) else {
                continue;
            };
            let (filesystem, options) =
                (kind.next().unwrap_or_default(), kind.nth(1).unwrap_or_default());
            let unified = filesystem == "cgroup2";
            if unified
                || filesystem == "cgroup" && options.split(',').any(|option| V1.contains(&option))
            {
                found.push(Self { root: Path::new(point).to_owned(), unified });
            }
        }
        found
    }

    /// Delegates the controllers to the groups in `parent`, which must contain no process itself.
    /// Needed only in the unified hierarchy.
    pub(super) fn delegate_controllers(&self, parent: &Path) {
        if !self.unified {
            return;
        }
        for group in [&self.root, parent] {
            let words = |file: &str| std::fs::read_to_string(group.join(file)).unwrap_or_default();
            let (available, delegated) =
                (words("cgroup.controllers"), words("cgroup.subtree_control"));
            let has = |words: &str, name: &str| words.split_whitespace().any(|word| word == name);
            // One write for each: an unavailable controller must not prevent the others.
            for controller in
                CONTROLLERS.iter().filter(|name| has(&available, name) && !has(&delegated, name))
            {
                if let Err(error) =
                    std::fs::write(group.join("cgroup.subtree_control"), format!("+{controller}"))
                {
                    let group = group.display();
                    tracing::warn!(%error, controller, %group, "VMs cannot have this limit");
                }
            }
        }
    }
}

/// Sets those of `limits` that the group `dir` has files for, and returns their number.
pub(super) fn set_limits(dir: &Path, unified: bool, limits: &Limits) -> io::Result<usize> {
    let mut set = 0;
    for (file, value) in limit_files(unified, limits) {
        let path = dir.join(file);
        // A v1 hierarchy has only the files of its own controllers, the unified one those of
        // delegated controllers.
        if path.exists() {
            std::fs::write(path, value.to_string())?;
            set += 1;
        }
    }
    Ok(set)
}

/// Returns the files and values for `limits`.
fn limit_files(unified: bool, limits: &Limits) -> Vec<(&'static str, u64)> {
    let weight = limits.cpu_weight;
    let (memory, cpu) = if unified {
        ("memory.max", weight.map(|weight| ("cpu.weight", weight)))
    } else {
        // Both are a group's share among its siblings; the default is 100 in v2 and 1024 in v1.
        ("memory.limit_in_bytes", weight.map(|weight| ("cpu.shares", (weight * 1024 / 100).max(2))))
    };
    [limits.memory.map(|most| (memory, most.get())), Some(("pids.max", limits.pids)), cpu]
        .into_iter()
        .flatten()
        .collect()
}

/// Returns how often the OOM killer killed a process of the group `dir`, because of the group's
/// limit or the host's memory. `None` if this hierarchy does not count it.
pub(super) fn oom_kills(dir: &Path, unified: bool) -> Option<u64> {
    let file = if unified { "memory.events" } else { "memory.oom_control" };
    let text = std::fs::read_to_string(dir.join(file)).ok()?;
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Bytes;

    const LIMITS: Limits =
        Limits { memory: Some(Bytes(1 << 30)), pids: 500, cpu_weight: Some(200) };

    #[test]
    fn all_finds_the_hierarchies_of_a_hybrid_host() {
        let mounts = "\
            30 29 0:27 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw\n\
            31 29 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
            32 29 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
            33 29 0:30 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer\n\
            34 29 0:31 / /proc rw - proc proc rw\n";
        let found = Hierarchy::all(mounts);
        let names: Vec<_> =
            found.iter().map(|h| h.root.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["unified", "systemd", "memory"]);
        assert_eq!(found.iter().map(|h| h.unified).collect::<Vec<_>>(), [true, false, false]);
    }

    /// Makes a directory with these files, like a group in cgroupfs.
    fn group(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    #[test]
    fn set_limits_sets_only_limits_with_files() {
        let read =
            |dir: &tempfile::TempDir, file| std::fs::read_to_string(dir.path().join(file)).unwrap();
        let unified = group(&[("memory.max", "max"), ("pids.max", "max"), ("cpu.weight", "100")]);
        assert_eq!(set_limits(unified.path(), true, &LIMITS).unwrap(), 3);
        assert_eq!(
            ["memory.max", "pids.max", "cpu.weight"].map(|f| read(&unified, f)),
            ["1073741824", "500", "200"]
        );
        let memory = group(&[("memory.limit_in_bytes", "")]);
        assert_eq!(set_limits(memory.path(), false, &LIMITS).unwrap(), 1);
        assert_eq!(read(&memory, "memory.limit_in_bytes"), "1073741824");
        let cpu = group(&[("cpu.shares", "1024")]);
        assert_eq!(set_limits(cpu.path(), false, &LIMITS).unwrap(), 1);
        assert_eq!(read(&cpu, "cpu.shares"), "2048");
        assert_eq!(
            set_limits(cpu.path(), false, &Limits { cpu_weight: None, ..LIMITS }).unwrap(),
            0
        );
    }

    #[test]
    fn delegate_controllers_adds_missing_ones() {
        let delegated = |available, delegated| {
            let files = [("cgroup.controllers", available), ("cgroup.subtree_control", delegated)];
            let root = group(&files);
            Hierarchy { root: root.path().to_owned(), unified: true }
                .delegate_controllers(&root.path().join("parent"));
            std::fs::read_to_string(root.path().join("cgroup.subtree_control")).unwrap()
        };
        // In cgroupfs each write adds one controller; an ordinary file keeps the last write.
        assert_eq!(delegated("cpuset cpu io pids\n", "pids\n"), "+cpu");
        assert_eq!(delegated("cpuset cpu io pids\n", "cpu pids\n"), "cpu pids\n");
    }

    #[test]
    fn oom_kills_reads_v1_and_v2() {
        let unified = group(&[(
            "memory.events",
            "low 0\nhigh 0\nmax 12\noom 2\noom_kill 2\noom_group_kill 0\n",
        )]);
        assert_eq!(oom_kills(unified.path(), true), Some(2));
        let legacy =
            group(&[("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")]);
        assert_eq!(oom_kills(legacy.path(), false), Some(1));
        assert_eq!(oom_kills(legacy.path(), true), None);
    }
}
