//! Pending notes: what calls are creating, or have left half created.
//!
//! A note is the symbolic link `pending/<cid>` in the state directory; its text is the pid of the
//! process that made it. It exists from before the object's lock is taken until the record is
//! ready, or until nothing of the object is left, not even its lock. So a create finds what earlier
//! calls left by listing one directory, which is usually empty.
//!
//! A copy of a disk that update_disk makes has a note, too: if the call is killed, QEMU goes on
//! copying, or keeps the guest's I/O waiting, until a later call settles the copy.

use std::fs::Metadata;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use crate::cid::{Cid, DiskCid, NetworkCid, SnapshotCid, StemcellCid, VmCid};
use crate::cpi::context::Context;
use crate::crash;
use crate::error::{IoContext, Result};
use crate::store::record::NetworkRecord;
use crate::store::{Rank, Record, atomic};
use crate::sys::pidfd::Process;

/// After this time a note or a lock file counts as abandoned: a call holds its lock within
/// milliseconds.
const LOCK_TAKEN_TIMEOUT: Duration = Duration::from_secs(60);

/// Adds the note that `cid` is being created or copied. Returns whether there was none.
pub(in crate::cpi) fn add(cx: &Context, cid: &impl Cid) -> Result<bool> {
    let path = path(cx, cid.as_str());
    match symlink(std::process::id().to_string(), &path) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
        made => made.at("make", &path).map(|()| true),
    }
}

/// Removes the note: `cid` is complete, or nothing of it is left, not even its lock.
pub(in crate::cpi) fn remove(cx: &Context, cid: &impl Cid) -> Result<()> {
    atomic::remove_file(&path(cx, cid.as_str()))?;
    crash::point!("pending note removed");
    Ok(())
}

/// The objects of one kind that have a note, the one that this call creates included.
pub(in crate::cpi) fn list<R: Record>(cx: &Context) -> Result<Vec<R::Cid>> {
    let dir = cx.store.pending_dir();
    let entries = match dir.read_dir() {
        // The state directory is new.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.at("list", &dir)?,
    };
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let ours = names.filter(|name| name.split('-').next() == Some(R::Cid::PREFIX));
    Ok(ours.filter_map(|name| R::Cid::parse(&name).ok()).collect())
}

/// The names of all notes.
pub(crate) fn names(cx: &Context) -> Vec<String> {
    let names = cx.store.pending_dir().read_dir().into_iter().flatten().flatten();
    names.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// Whether `cid` has a note.
pub(crate) fn contains(cx: &Context, cid: &impl Cid) -> bool {
    contains_name(cx, cid.as_str())
}

/// Whether there is a note called `name`.
pub(crate) fn contains_name(cx: &Context, name: &str) -> bool {
    atomic::entry_exists(&path(cx, name))
}

/// Whether the create that made the note lives and may not have its lock yet. A recovery that takes
/// the lock first would remove the note after the create has taken the lock, and the create relies
/// on it.
pub(crate) fn is_starting(cx: &Context, name: &str) -> bool {
    let creator = creator(cx, name);
    creator.is_some() && !is_abandoned(&path(cx, name), creator)
}

/// The pid of the process that made the note.
pub(crate) fn creator(cx: &Context, name: &str) -> Option<i32> {
    std::fs::read_link(path(cx, name)).ok()?.to_str()?.parse().ok()
}

/// Whether the process `creator`, which made the note or lock file at `path`, is dead or made it
/// long ago: then no process is between making the file and taking the lock.
pub(crate) fn is_abandoned(path: &Path, creator: Option<i32>) -> bool {
    let age = |meta: Metadata| SystemTime::now().duration_since(meta.modified().ok()?).ok();
    let age = path.symlink_metadata().ok().and_then(age);
    let lives = |pid| {
        Process::open(pid).is_ok_and(|process| !process.wait_exit(Instant::now()).unwrap_or(true))
    };
    age.is_some_and(|age| age > LOCK_TAKEN_TIMEOUT) || creator.is_some_and(|pid| !lives(pid))
}

/// The lock of the object whose note is called `name`; `None` if the name is no cid's.
pub(crate) fn lock_of(name: &str) -> Option<(Rank, String)> {
    let rank = match name.split('-').next()? {
        VmCid::PREFIX => Rank::Vm,
        SnapshotCid::PREFIX => Rank::Snapshot,
        DiskCid::PREFIX => Rank::Disk,
        StemcellCid::PREFIX => Rank::Stemcell,
        NetworkCid::PREFIX => {
            let cid = NetworkCid::parse(name).ok()?;
            return Some((Rank::Network, NetworkRecord::lock_name(&cid)));
        }
        _ => return None,
    };
    Some((rank, name.to_owned()))
}

fn path(cx: &Context, name: &str) -> PathBuf {
    cx.store.pending_dir().join(name)
}
