//! Filesystems that this host is to have mounted, by its fstab(5).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Where the filesystem is to be mounted that `path` is meant to be on, and is not.
pub fn missing(path: &Path) -> Option<PathBuf> {
    let read = |file: &str| std::fs::read_to_string(file).unwrap_or_default();
    missing_of(&resolved(path), &read("/etc/fstab"), &read("/proc/self/mountinfo"))
}

fn missing_of(path: &Path, fstab: &str, mountinfo: &str) -> Option<PathBuf> {
    let mounted: BTreeSet<_> = points(mountinfo, 4).collect();
    points(fstab, 1).find(|point| path.starts_with(point) && !mounted.contains(point))
}

/// The mount points below `/` in a table that has them in this column (proc(5), fstab(5)).
fn points(table: &str, column: usize) -> impl Iterator<Item = PathBuf> {
    let lines = table.lines().filter(|line| !line.trim_start().starts_with('#'));
    let points = lines.filter_map(move |line| line.split_ascii_whitespace().nth(column));
    // A blank would end the column.
    let points = points.map(|point| PathBuf::from(point.replace("\\040", " ")));
    points.filter(|point| point.is_absolute() && point.parent().is_some())
}

/// The path without links, as far as it is there.
fn resolved(path: &Path) -> PathBuf {
    let resolve = |there: &Path| Some(there.canonicalize().ok()?.join(path.strip_prefix(there).ok()?));
    path.ancestors().find_map(resolve).unwrap_or_else(|| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_to_be_mounted_and_is_not_is_missed_by_what_is_meant_to_be_on_it() {
        let fstab = "# /dev/sdz /var/lib ext4\nUUID=1 / ext4 errors=remount-ro 0 1\nUUID=2 none swap sw 0 0\n\
                     UUID=3 /srv/my\\040vms/ xfs defaults 0 2\nUUID=4\t/home\text4\n";
        let info = "22 1 254:0 / / rw shared:1 - ext4 /dev/vda rw\n23 22 254:1 / /home rw - ext4 /dev/vdb rw\n";
        let missing = |path: &str, mountinfo: &str| missing_of(Path::new(path), fstab, mountinfo);
        assert_eq!(missing("/srv/my vms/state", info), Some("/srv/my vms".into()));
        for path in ["/var/lib/state", "/home/state", "/srv/my vms of old/state", "/srv"] {
            assert_eq!(missing(path, info), None, "{path}");
        }
        assert_eq!(missing("/srv/my vms/state", &format!("{info}24 22 254:2 / /srv/my\\040vms rw - xfs x rw\n")), None);
    }

    #[test]
    fn a_path_that_is_not_there_is_resolved_as_far_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap();
        std::os::unix::fs::symlink(&real, real.join("link")).unwrap();
        assert_eq!(resolved(&real.join("link/not/there")), real.join("not/there"));
    }
}
