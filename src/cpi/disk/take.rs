//! `disk take`: this host takes a disk in a shared pool from a host that is gone for good.

use std::path::Path;

use super::{lock, ownership};
use crate::cid::DiskCid;
use crate::cpi::context::Context;
use crate::error::Result;
use crate::image;
use crate::store::{DiskRecord, atomic};

/// Makes this host the owner of a disk that another host owns.
///
/// # Errors
/// [`ErrorKind::DiskNotFound`](crate::error::ErrorKind::DiskNotFound) if no pool has the disk;
/// [`ErrorKind::Corrupt`](crate::error::ErrorKind::Corrupt) if its owner file cannot be used.
pub(crate) fn take(cx: &Context, cid: &DiskCid) -> Result<()> {
    let deadline = cx.deadline("attach_disk");
    ownership::take_unowned(cx, cid, deadline)?;
    if let Some(disk) = cx.store.find::<DiskRecord>(cid)? {
        let owned = cx.store.ensure_owned(&disk);
        if owned.is_ok() || !cx.store.is_outdated(&disk)? {
            return owned;
        }
    }
    cx.store.prepare()?;
    let lock = lock::lock(cx, cid, deadline)?;
    let ensure_released = |image: &Path| {
        image::ensure_unlocked(image).map_err(|e| e.during(format!("take disk '{cid}'")))
    };
    let taken = cx.store.take_from_lost_host(cid, ensure_released);
    if taken.is_err() && !atomic::entry_exists(&cx.store.disk_dir(cid)) {
        lock.unlink()?;
    }
    taken
}
