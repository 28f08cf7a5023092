//! A user of its own for each VM's QEMU, so that one broken out of cannot touch another.
//!
//! The range is one that systemd's list of uid ranges leaves to nobody (UIDS-GIDS.md: above the container range, below
//! 2^31). A claim is a symlink `uids/<uid>` whose text is the VM's cid: made in one step, held by no lock, found
//! without reading a record.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::cid::{Cid, VmCid};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::store::atomic;

/// First uid of the range.
pub const FIRST: u32 = 1_900_000_000;
/// How many uids, and so VMs, a host has.
pub const COUNT: u32 = 65_536;

/// Claims a free uid for `vm`.
pub fn claim(state_dir: &Path, vm: &VmCid) -> Result<u32> {
    let start = hash(vm.as_str());
    for step in 0..COUNT {
        let uid = FIRST + start.wrapping_add(step) % COUNT;
        let path = path(state_dir, uid);
        match symlink(vm.as_str(), &path) {
            Ok(()) => return Ok(uid),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(Error::io("claim a uid with", &path, error)),
        }
    }
    Err(Error::new(ErrorKind::Host, format!("all {COUNT} uids for VMs are taken")))
}

/// The uid that `vm` claimed, if it did.
pub fn find(state_dir: &Path, vm: &VmCid) -> Result<Option<u32>> {
    let start = hash(vm.as_str());
    for step in 0..COUNT {
        let uid = FIRST + start.wrapping_add(step) % COUNT;
        let path = path(state_dir, uid);
        match std::fs::read_link(&path) {
            Ok(owner) if owner == Path::new(vm.as_str()) => return Ok(Some(uid)),
            Ok(_) => {}
            // Claiming would have stopped here.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).at("read", &path),
        }
    }
    Ok(None)
}

/// Gives `uid` back if it is `vm`'s. Only once its QEMU is gone: the next VM may get it at once.
pub fn release(state_dir: &Path, vm: &VmCid, uid: u32) -> Result<()> {
    let path = path(state_dir, uid);
    match std::fs::read_link(&path) {
        Ok(owner) if owner == Path::new(vm.as_str()) => atomic::remove_file(&path),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).at("read", &path),
    }
}

fn path(state_dir: &Path, uid: u32) -> PathBuf {
    state_dir.join("uids").join(uid.to_string())
}

/// FNV-1a: where to begin looking; collisions only cost a step.
fn hash(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uid_is_one_vms_until_it_gives_it_back() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("uids")).unwrap();
        let (a, b) = (VmCid::random(), VmCid::random());
        let uid = claim(dir.path(), &a).unwrap();
        assert_eq!(find(dir.path(), &a).unwrap(), Some(uid));
        assert_eq!(find(dir.path(), &b).unwrap(), None);
        assert_ne!(claim(dir.path(), &a).unwrap(), uid, "taken is taken");
        release(dir.path(), &b, uid).unwrap();
        assert!(path(dir.path(), uid).is_symlink(), "not b's to give back");
        release(dir.path(), &a, uid).unwrap();
        release(dir.path(), &a, uid).unwrap();
        assert_eq!(claim(dir.path(), &a).unwrap(), uid);
    }
}
