//! A user of its own for each VM's QEMU, so that one broken out of cannot touch another.
//!
//! The range is one that systemd's list of uid ranges leaves to nobody (UIDS-GIDS.md: above the container range, below
//! 2^31). A claim is a symlink `uids/<uid>` whose text is the VM's cid: made in one step, held by no lock, found
//! without reading a record. A VM's claim is always one of the `WINDOW` uids that follow from its cid, so it is found
//! again, and a call that is repeated reservations no second one.

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
pub fn reserve(state_dir: &Path, vm: &VmCid) -> Result<u32> {
    if let Some(uid) = find(state_dir, vm) {
        return Ok(uid);
    }
    for uid in window(vm) {
        let path = path(state_dir, uid);
        match symlink(vm.as_str(), &path) {
            Ok(()) => {
                crash::point!("uid reserved");
                return Ok(uid);
            }
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(Error::io("reserve a uid with", &path, error)),
        }
    }
    Err(Error::new(ErrorKind::Host, format!("all {WINDOW} uids that VM '{vm}' can have are taken"))
        .hint(format!(
            "each link in '{}' names its VM: remove those of VMs that are gone",
            state_dir.join("uids").display()
        )))
}

/// Makes the reservations durable: a VM that is there after a power cut must have its uid for itself.
pub fn sync(state_dir: &Path) -> Result<()> {
    atomic::sync_dir(&state_dir.join("uids"))
}

/// The uid that `vm` claimed, if it did.
pub fn find(state_dir: &Path, vm: &VmCid) -> Option<u32> {
    // A free uid on the way means nothing: its VM may have gone after this one claimed.
    window(vm).find(|uid| owner(state_dir, *uid).as_ref() == Some(vm))
}

/// Gives `uid` back if it is `vm`'s. Only once its QEMU is gone: the next VM may get it at once.
pub fn release(state_dir: &Path, vm: &VmCid, uid: u32) -> Result<()> {
    if owner(state_dir, uid).as_ref() == Some(vm) {
        atomic::remove_file(&path(state_dir, uid))?;
        crash::point!("uid released");
    }
    Ok(())
}

/// All reservations: a uid and whose it is; `None` for one that does not say so, and which nobody can get.
pub fn reservations(state_dir: &Path) -> Result<Vec<(u32, Option<VmCid>)>> {
    let dir = state_dir.join("uids");
    let mut reservations = Vec::new();
    let entries = match dir.read_dir() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(reservations),
        entries => entries.at("list", &dir)?,
    };
    for entry in entries {
        let name = entry.at("list", &dir)?.file_name();
        if let Some(uid) = name.to_str().and_then(|name| name.parse().ok()) {
            reservations.push((uid, owner(state_dir, uid)));
        }
    }
    Ok(reservations)
}

/// Which VM has `uid`. What does not say so is nobody's to take.
pub fn owner(state_dir: &Path, uid: u32) -> Option<VmCid> {
    VmCid::parse(std::fs::read_link(path(state_dir, uid)).ok()?.to_str()?).ok()
}

/// Has `uid`, which is `vm`'s by its record, be so by name again. Only if no other VM has it.
pub fn restore(state_dir: &Path, vm: &VmCid, uid: u32) -> Result<()> {
    let path = path(state_dir, uid);
    atomic::remove_file(&path)?;
    symlink(vm.as_str(), &path).at("reserve a uid with", &path)
}

/// The uids `vm` can have.
fn window(vm: &VmCid) -> impl Iterator<Item = u32> {
    let start = hash(vm.as_str());
    (0..WINDOW).map(move |step| FIRST + start.wrapping_add(step) % COUNT)
}

/// The link that says whose `uid` is.
pub fn path(state_dir: &Path, uid: u32) -> PathBuf {
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
        let uid = reserve(dir.path(), &a).unwrap();
        assert_eq!(find(dir.path(), &a), Some(uid));
        assert_eq!(find(dir.path(), &b), None);
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
        let uid = reserve(dir.path(), &vm).unwrap();
        assert_eq!(Some(uid), window(&vm).nth(1));
        release(dir.path(), &first, wanted).unwrap();
        assert_eq!(find(dir.path(), &vm), Some(uid));
        assert_eq!(reserve(dir.path(), &vm).unwrap(), uid);
    }

    #[test]
    fn no_uid_is_given_twice_and_a_full_window_is_an_error() {
        let dir = state_dir();
        let vm = VmCid::random();
        for uid in window(&vm) {
            symlink("vm-other", path(dir.path(), uid)).unwrap();
        }
        assert_eq!(reserve(dir.path(), &vm).unwrap_err().kind(), ErrorKind::Host);
    }

    #[test]
    fn where_a_cid_looks_never_changes() {
        let vm = VmCid::parse("vm-aaaaaaaaaaaaaaa").unwrap();
        assert_eq!(window(&vm).next(), Some(1_900_009_360));
        assert!(window(&vm).all(|uid| (FIRST..FIRST + COUNT).contains(&uid)));
    }
}
