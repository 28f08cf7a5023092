//! A user of its own for each VM's QEMU, so that one broken out of cannot touch another.
//!
//! The range is one that systemd's list of uid ranges leaves to nobody (UIDS-GIDS.md: above the container range, below
//! 2^31). A claim is a symlink `uids/<uid>` whose text is the VM's cid: made in one step, held by no lock, found
//! without reading a record. A VM's claim is always one of the `WINDOW` uids that follow from its cid, so it is found
//! again, and a call that is repeated claims no second one.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::cid::{Cid, VmCid};
use crate::crash;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::store::atomic;

/// First uid of the range.
pub const FIRST: u32 = 1_900_000_000;
/// How many uids a host has for VMs.
pub const COUNT: u32 = 65_536;
/// How many of them a cid can get. With 10,000 VMs on one host the chance that all are taken is below 10^-12.
const WINDOW: u32 = 64;

/// The uid of `vm`: the one it has, else a free one, claimed. Calls for one VM must not run at the same time.
pub fn claim(state_dir: &Path, vm: &VmCid) -> Result<u32> {
    if let Some(uid) = find(state_dir, vm)? {
        return Ok(uid);
    }
    for uid in window(vm) {
        let path = path(state_dir, uid);
        match symlink(vm.as_str(), &path) {
            Ok(()) => {
                crash::point!("uid claimed");
                return Ok(uid);
            }
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(Error::io("claim a uid with", &path, error)),
        }
    }
    Err(Error::new(ErrorKind::Host, format!("all {WINDOW} uids that VM '{vm}' can have are taken")).hint(format!(
        "each link in '{}' names its VM: remove those of VMs that are gone",
        state_dir.join("uids").display()
    )))
}

/// Makes the claims durable: a VM that is there after a power cut must have its uid for itself.
pub fn sync(state_dir: &Path) -> Result<()> {
    atomic::sync_dir(&state_dir.join("uids"))
}

/// The uid that `vm` claimed, if it did.
pub fn find(state_dir: &Path, vm: &VmCid) -> Result<Option<u32>> {
    // A free uid on the way means nothing: its VM may have gone after this one claimed.
    for uid in window(vm) {
        if owner(&path(state_dir, uid))?.is_some_and(|owner| owner == Path::new(vm.as_str())) {
            return Ok(Some(uid));
        }
    }
    Ok(None)
}

/// Gives `uid` back if it is `vm`'s. Only once its QEMU is gone: the next VM may get it at once.
pub fn release(state_dir: &Path, vm: &VmCid, uid: u32) -> Result<()> {
    let path = path(state_dir, uid);
    match owner(&path)? {
        Some(owner) if owner == Path::new(vm.as_str()) => {
            atomic::remove_file(&path)?;
            crash::point!("uid released");
        }
        _ => {}
    }
    Ok(())
}

/// All claims: a uid and the text of its link, which is a VM's cid.
pub fn claims(state_dir: &Path) -> Result<Vec<(u32, PathBuf)>> {
    let dir = state_dir.join("uids");
    let mut claims = Vec::new();
    for entry in dir.read_dir().at("list", &dir)? {
        let name = entry.at("list", &dir)?.file_name();
        let Some(uid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
        claims.extend(owner(&path(state_dir, uid))?.map(|owner| (uid, owner)));
    }
    Ok(claims)
}

/// Which VM has the uid of this link.
fn owner(path: &Path) -> Result<Option<PathBuf>> {
    match std::fs::read_link(path) {
        Ok(owner) => Ok(Some(owner)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).at("read", path),
    }
}

/// The uids `vm` can have.
fn window(vm: &VmCid) -> impl Iterator<Item = u32> {
    let start = hash(vm.as_str());
    (0..WINDOW).map(move |step| FIRST + start.wrapping_add(step) % COUNT)
}

fn path(state_dir: &Path, uid: u32) -> PathBuf {
    state_dir.join("uids").join(uid.to_string())
}

/// FNV-1a. Claims outlive this binary: it must never change.
fn hash(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state_dir() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("uids")).unwrap();
        dir
    }

    #[test]
    fn a_uid_is_one_vms_until_it_gives_it_back() {
        let dir = state_dir();
        let (a, b) = (VmCid::random(), VmCid::random());
        let uid = claim(dir.path(), &a).unwrap();
        assert_eq!(find(dir.path(), &a).unwrap(), Some(uid));
        assert_eq!(find(dir.path(), &b).unwrap(), None);
        release(dir.path(), &b, uid).unwrap();
        assert!(path(dir.path(), uid).is_symlink(), "not b's to give back");
        release(dir.path(), &a, uid).unwrap();
        release(dir.path(), &a, uid).unwrap();
        assert_eq!(std::fs::read_dir(dir.path().join("uids")).unwrap().count(), 0);
    }

    #[test]
    fn a_claim_is_found_again_though_a_better_place_became_free() {
        let dir = state_dir();
        let (first, vm) = (VmCid::random(), VmCid::random());
        let wanted = window(&vm).next().unwrap();
        symlink(first.as_str(), path(dir.path(), wanted)).unwrap();
        let uid = claim(dir.path(), &vm).unwrap();
        assert_eq!(Some(uid), window(&vm).nth(1));
        release(dir.path(), &first, wanted).unwrap();
        assert_eq!(find(dir.path(), &vm).unwrap(), Some(uid));
        assert_eq!(claim(dir.path(), &vm).unwrap(), uid);
    }

    #[test]
    fn no_uid_is_given_twice_and_a_full_window_is_an_error() {
        let dir = state_dir();
        let vm = VmCid::random();
        for uid in window(&vm) {
            symlink("vm-other", path(dir.path(), uid)).unwrap();
        }
        assert_eq!(claim(dir.path(), &vm).unwrap_err().kind(), ErrorKind::Host);
    }

    #[test]
    fn where_a_cid_looks_never_changes() {
        let vm = VmCid::parse("vm-aaaaaaaaaaaaaaa").unwrap();
        assert_eq!(window(&vm).next(), Some(1_900_009_360));
        assert!(window(&vm).all(|uid| (FIRST..FIRST + COUNT).contains(&uid)));
    }
}
