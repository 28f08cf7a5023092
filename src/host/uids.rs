//! Uid reservations: each VM's QEMU runs as a user of its own, so that a guest that breaks out of
//! its QEMU cannot reach another VM.
//!
//! The range is unassigned in systemd's list of uid ranges (UIDS-GIDS.md: above the container
//! range, below 2^31). A reservation is a symlink `uids/<uid>` whose target is the VM's cid. It is
//! made in one step, needs no lock, and can be found without reading a record.
//!
//! A VM's uid is always one of the `WINDOW` uids that follow from its cid. So a repeated call finds
//! the VM's reservation and does not make a second one.

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
/// How many uids one cid can get. With 10,000 VMs on one host, the probability that all of them are
/// reserved is below 10^-12.
const WINDOW: u32 = 64;

/// Returns the uid that `vm` has, or reserves a free one. Calls for one VM must not run at the same
/// time.
///
/// # Errors
/// [`ErrorKind::Host`] if all uids of this cid are reserved for other VMs.
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
    let message = format!("all {WINDOW} uids that VM '{vm}' can have are reserved for other VMs");
    Err(Error::new(ErrorKind::Host, message).hint(format!(
        "each link in '{}' names its VM: remove the links of VMs that no longer exist",
        state_dir.join("uids").display()
    )))
}

/// Makes the reservations durable: after a power cut, a VM that still exists must be the only one
/// with its uid.
pub fn sync(state_dir: &Path) -> Result<()> {
    atomic::sync_dir(&state_dir.join("uids"))
}

/// Returns the uid that is reserved for `vm`, if any.
pub fn find(state_dir: &Path, vm: &VmCid) -> Option<u32> {
    // Free uids do not end the search: another VM may have released one after `vm` reserved its
    // own.
    window(vm).find(|uid| owner(state_dir, *uid).as_ref() == Some(vm))
}

/// Removes the reservation of `uid` if it is `vm`'s. Only after its QEMU has ended, because the
/// next VM may get the uid at once.
pub fn release(state_dir: &Path, vm: &VmCid, uid: u32) -> Result<()> {
    if owner(state_dir, uid).as_ref() == Some(vm) {
        atomic::remove_file(&path(state_dir, uid))?;
        crash::point!("uid released");
    }
    Ok(())
}

/// Returns all reserved uids with their VMs. A link that names no VM has `None`, and its uid cannot
/// be reserved.
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

/// Returns the VM that `uid` is reserved for; `None` if the link is missing or names no VM.
pub fn owner(state_dir: &Path, uid: u32) -> Option<VmCid> {
    VmCid::parse(std::fs::read_link(path(state_dir, uid)).ok()?.to_str()?).ok()
}

/// Makes the reservation of `uid` again, which the record of `vm` names. Only if no other VM has
/// that uid.
pub fn restore(state_dir: &Path, vm: &VmCid, uid: u32) -> Result<()> {
    let path = path(state_dir, uid);
    atomic::remove_file(&path)?;
    symlink(vm.as_str(), &path).at("reserve a uid with", &path)
}

/// Returns the uids that `vm` can have, in the order in which they are tried.
fn window(vm: &VmCid) -> impl Iterator<Item = u32> {
    let start = hash(vm.as_str());
    (0..WINDOW).map(move |step| FIRST + start.wrapping_add(step) % COUNT)
}

/// Returns the path of the link that reserves `uid`.
pub fn path(state_dir: &Path, uid: u32) -> PathBuf {
    state_dir.join("uids").join(uid.to_string())
}

/// FNV-1a. It must never change, because reservations outlive this version of the program.
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
    fn release_by_another_vm_keeps_the_reservation() {
        let dir = state_dir();
        let (a, b) = (VmCid::random(), VmCid::random());
        let uid = reserve(dir.path(), &a).unwrap();
        assert_eq!(find(dir.path(), &a), Some(uid));
        assert_eq!(find(dir.path(), &b), None);
        release(dir.path(), &b, uid).unwrap();
        assert!(path(dir.path(), uid).is_symlink(), "it is a's reservation");
        release(dir.path(), &a, uid).unwrap();
        release(dir.path(), &a, uid).unwrap();
        assert_eq!(std::fs::read_dir(dir.path().join("uids")).unwrap().count(), 0);
    }

    #[test]
    fn find_returns_the_reservation_even_if_an_earlier_uid_became_free() {
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
    fn reserve_without_a_free_uid_is_an_error() {
        let dir = state_dir();
        let vm = VmCid::random();
        for uid in window(&vm) {
            symlink("vm-other", path(dir.path(), uid)).unwrap();
        }
        assert_eq!(reserve(dir.path(), &vm).unwrap_err().kind(), ErrorKind::Host);
    }

    #[test]
    fn window_of_a_cid_never_changes() {
        let vm = VmCid::parse("vm-aaaaaaaaaaaaaaa").unwrap();
        assert_eq!(window(&vm).next(), Some(1_900_009_360));
        assert!(window(&vm).all(|uid| (FIRST..FIRST + COUNT).contains(&uid)));
    }
}
