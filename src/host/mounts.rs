//! Filesystems that the host's fstab(5) wants mounted, and which of them are not.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

/// The most links that a path may follow, as in the kernel (`MAXSYMLINKS`).
const MAX_SYMLINKS: usize = 40;

/// Returns a mount point of fstab(5) above or below `path` that has nothing mounted. `noauto` mount
/// points count only if `strict`.
///
/// # Errors
/// If fstab or mountinfo cannot be read. A missing fstab is no error.
pub fn missing(path: &Path, strict: bool) -> io::Result<Option<PathBuf>> {
    let fstab = match std::fs::read("/etc/fstab") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text?,
    };
    let expected = expected_mounts(&resolve(path), &String::from_utf8_lossy(&fstab), strict);
    if expected.is_empty() {
        return Ok(None);
    }
    let mountinfo = std::fs::read("/proc/self/mountinfo")?;
    Ok(unmounted(expected, &String::from_utf8_lossy(&mountinfo)))
}

/// Returns the mount points in `fstab` that are above or below `path`, without `/`.
fn expected_mounts(path: &Path, fstab: &str, strict: bool) -> Vec<PathBuf> {
    let entries = fstab.lines().filter(|line| !line.trim_start().starts_with('#'));
    let entries = entries.map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
    let counts = |entry: &Vec<&str>| {
        strict || !entry.get(3).is_some_and(|o| o.split(',').any(|o| o == "noauto"))
    };
    let points = entries.filter(counts).filter_map(|entry| Some(resolve(&unescape(entry.get(1)?))));
    let concerns = |point: &PathBuf| {
        point.parent().is_some() && (path.starts_with(point) || point.starts_with(path))
    };
    points.filter(|point| point.is_absolute()).filter(concerns).collect()
}

/// Returns the first of `expected` that mountinfo (proc(5)) does not have.
fn unmounted(expected: Vec<PathBuf>, mountinfo: &str) -> Option<PathBuf> {
    let mounted = mountinfo.lines().filter_map(|line| line.split_ascii_whitespace().nth(4));
    let mounted: BTreeSet<_> = mounted.map(unescape).collect();
    expected.into_iter().find(|point| !mounted.contains(point))
}

/// Decodes a mount point: both tables write a blank as `\040`, because blanks separate columns
/// (fstab(5), proc(5)).
fn unescape(field: &str) -> PathBuf {
    field.replace("\\040", " ").into()
}

/// Resolves the links of a path, also where it or a link's target does not exist.
fn resolve(path: &Path) -> PathBuf {
    let (mut path, mut links) = (path.to_owned(), 0);
    'again: loop {
        for above in path.ancestors() {
            let below = path.strip_prefix(above).expect("it is above");
            if let Ok(real) = above.canonicalize() {
                return real.components().chain(below.components()).collect();
            }
            // A link whose target does not exist, such as one to a mount point's directory.
            if let Ok(target) = above.read_link()
                && links < MAX_SYMLINKS
            {
                links += 1;
                path = above
                    .parent()
                    .unwrap_or(above)
                    .join(target)
                    .components()
                    .chain(below.components())
                    .collect();
                continue 'again;
            }
        }
        return path;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_finds_unmounted_mount_points_above_and_below_a_path() {
        let fstab = "# /dev/sdz /var/lib ext4\n\
                     UUID=1 / ext4 errors=remount-ro 0 1\n\
                     UUID=2 none swap sw 0 0\n\
                     UUID=3 /srv/my\\040vms/ xfs defaults 0 2\n\
                     UUID=4\t/mnt/home\text4\n\
                     UUID=5 /mnt/by-hand ext4 ro,noauto\n\
                     UUID=6 /mnt/state/disks xfs\n";
        let info = "22 1 254:0 / / rw shared:1 - ext4 /dev/vda rw\n\
                    23 22 254:1 / /mnt/home rw - ext4 /dev/vdb rw\n";
        let missing = |path: &str, mountinfo: &str, strict| {
            unmounted(expected_mounts(Path::new(path), fstab, strict), mountinfo)
        };
        assert_eq!(missing("/srv/my vms/state", info, false), Some("/srv/my vms".into()));
        assert_eq!(missing("/mnt/state", info, false), Some("/mnt/state/disks".into()));
        for path in
            ["/var/lib/state", "/mnt/home/state", "/srv/my vms of old/state", "/mnt/by-hand/state"]
        {
            assert_eq!(missing(path, info, false), None, "{path}");
        }
        assert_eq!(missing("/mnt/by-hand/state", info, true), Some("/mnt/by-hand".into()));
        let mounted = format!("{info}24 22 254:2 / /srv/my\\040vms rw - xfs x rw\n");
        assert_eq!(missing("/srv/my vms/state", &mounted, true), None);
    }

    #[test]
    fn resolve_follows_links_to_paths_that_do_not_exist() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap();
        let link = |target: &Path, name: &str| {
            std::os::unix::fs::symlink(target, real.join(name)).unwrap();
        };
        link(&real, "link");
        link(Path::new("not/there"), "hanging");
        link(&real.join("round"), "round");
        assert_eq!(resolve(&real.join("link/not/there")), real.join("not/there"));
        assert_eq!(resolve(&real.join("hanging/state")), real.join("not/there/state"));
        assert_eq!(resolve(&real.join("round/x")), real.join("round/x"));
    }
}
