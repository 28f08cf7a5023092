//! Pools with a hostile writer: links, FIFOs and devices where this program's files were.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bosh_qemu_cpi::cid::DiskCid;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::{Value, json};

use crate::support::filesystem::Filesystem;
use crate::support::host::{Host, text, vm_cid};

/// Longest time of a refused call. The methods' own deadlines are longer.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(30);
/// Size of a disk's image, bytes.
const SIZE: u64 = 8 << 20;

/// A host whose stemcells, VMs and disks are in the shared pool.
fn host(pool: &Filesystem) -> Option<Host> {
    Host::with(json!({
        "pools": {"nfs": {"path": pool.path(), "shared": true}}, "stemcell_pool": "nfs",
        "vm_defaults": {"pool": "nfs"}, "disk_defaults": {"pool": "nfs", "format": "raw"},
    }))
}

fn disk(host: &Host) -> DiskCid {
    text(&host.ok("create_disk", &json!([8, {}, null]))).parse().unwrap()
}

/// A file that only root may read, as large as a disk's image.
struct Secret(tempfile::TempDir);

impl Secret {
    fn new() -> Self {
        let secret = Self(tempfile::tempdir().unwrap());
        fs::write(secret.path(), vec![b's'; SIZE as usize]).unwrap();
        fs::set_permissions(secret.path(), fs::Permissions::from_mode(0o600)).unwrap();
        secret
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("disk.raw")
    }

    fn assert_unchanged(&self) {
        let content = fs::read(self.path()).unwrap();
        assert!(content.len() as u64 == SIZE && content.iter().all(|byte| *byte == b's'));
        assert_eq!(self.path().metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(self.0.path()).unwrap().count(), 1);
    }
}

/// Asserts that the call fails in time, and that its error names `path`.
fn assert_refused(host: &Host, method: &str, arguments: &Value, path: &Path) {
    let began = Instant::now();
    let answer = host.call(method, arguments);
    assert!(began.elapsed() < REFUSAL_TIMEOUT, "{method}: {:?}", began.elapsed());
    let message = &answer.failure().message;
    let path = format!("'{}'", path.display());
    assert!(message.contains(&path) && message.contains("find out who writes"), "{message}");
}

/// Replaces `path` by what `make` makes there while `act` runs.
fn replaced(path: &Path, make: impl FnOnce(&Path), act: impl FnOnce()) {
    let aside = path.with_file_name(".aside");
    fs::rename(path, &aside).unwrap();
    make(path);
    act();
    let _ = fs::remove_file(path).or_else(|_| fs::remove_dir(path));
    fs::rename(aside, path).unwrap();
}

#[test]
fn image_replaced_by_a_link_or_fifo_is_refused_and_target_is_unchanged() {
    let Some(pool) = Filesystem::new(256) else { return };
    let Some(host) = host(&pool) else { return };
    let (vm, disk, secret) = (host.booted_vm(), disk(&host), Secret::new());
    let dir = pool.path().join(disk.to_string());
    let image = dir.join("disk.raw");
    let refused = |path: &Path| {
        assert_refused(&host, "attach_disk", &json!([vm, disk]), path);
        assert_refused(&host, "snapshot_disk", &json!([disk, {}]), path);
        assert_refused(&host, "resize_disk", &json!([disk, 16]), path);
        assert_refused(&host, "update_disk", &json!([disk, 8, {"format": "qcow2"}]), path);
        assert_refused(&host, "delete_disk", &json!([disk]), path);
        secret.assert_unchanged();
    };
    let elsewhere = pool.path().join("elsewhere");
    fs::write(&elsewhere, vec![0; SIZE as usize]).unwrap();
    replaced(&image, |path| symlink(secret.path(), path).unwrap(), || refused(&image));
    replaced(&image, |path| mkfifo(path, Mode::S_IRWXU).unwrap(), || refused(&image));
    replaced(&image, |path| fs::create_dir(path).unwrap(), || refused(&image));
    replaced(&image, |path| symlink("/dev/zero", path).unwrap(), || refused(&image));
    replaced(&image, |path| fs::hard_link(&elsewhere, path).unwrap(), || refused(&image));
    replaced(&dir, |path| symlink(secret.0.path(), path).unwrap(), || refused(&dir));
    fs::remove_file(elsewhere).unwrap();

    host.ok("attach_disk", &json!([vm, disk]));
    host.ok("detach_disk", &json!([vm, disk]));
    assert_eq!(host.ok("has_disk", &json!([disk])), true);
    host.ok("delete_disk", &json!([disk]));
}

#[test]
fn stemcell_image_replaced_by_a_link_is_refused() {
    let Some(pool) = Filesystem::new(256) else { return };
    let Some(host) = host(&pool) else { return };
    let (stemcell, secret) = (host.stemcell(), Secret::new());
    let image = pool.path().join(&stemcell).join("image.raw");
    let arguments = host.vm_arguments(&stemcell);
    let refused = || assert_refused(&host, "create_vm", &arguments, &image);
    replaced(&image, |path| symlink(secret.path(), path).unwrap(), refused);
    replaced(&image, |path| mkfifo(path, Mode::S_IRWXU).unwrap(), refused);
    let mut names = pool.names();
    names.sort();
    assert_eq!(names, [".bosh-qemu-cpi", &stemcell], "a refused create leaves nothing");

    let vm = vm_cid(&host.ok("create_vm", &arguments));
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 1);
    host.power_off(&vm);
    for name in ["base.raw", "root.qcow2"] {
        let file = pool.path().join(vm.to_string()).join(name);
        let refused = || assert_refused(&host, "reboot_vm", &json!([vm]), &file);
        replaced(&file, |path| symlink(secret.path(), path).unwrap(), refused);
    }
    host.ok("reboot_vm", &json!([vm]));
    secret.assert_unchanged();
}

#[test]
fn owner_file_that_is_no_file_or_endless_is_refused() {
    let Some(pool) = Filesystem::new(256) else { return };
    let (Some(first), Some(second)) = (host(&pool), host(&pool)) else { return };
    let (disk, secret) = (disk(&first), Secret::new());
    let dir = pool.path().join(disk.to_string());
    let names = || {
        let names = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    };
    let owned = dir.join(names().into_iter().find(|name| name.starts_with("host-")).unwrap());
    let none = dir.join("host-none");
    fs::rename(&owned, &none).unwrap();
    let refused = || {
        assert_refused(&second, "resize_disk", &json!([disk, 16]), &none);
        assert_eq!(names(), [".aside", "disk.raw", "host-none"]);
        secret.assert_unchanged();
    };
    replaced(&none, |path| mkfifo(path, Mode::S_IRWXU).unwrap(), refused);
    replaced(&none, |path| symlink("/dev/zero", path).unwrap(), refused);
    replaced(&none, |path| symlink(secret.path(), path).unwrap(), refused);
    replaced(&none, |path| fs::create_dir(path).unwrap(), refused);
    replaced(&none, |path| fs::write(path, vec![b' '; 2 << 20]).unwrap(), refused);
    second.ok("resize_disk", &json!([disk, 16]));
    second.ok("delete_disk", &json!([disk]));
}
