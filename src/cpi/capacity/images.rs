//! The images that take space in pools, and the room that is left beside them.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::StatVfs;

use super::need;
use crate::cpi::context::Context;
use crate::cpi::creation::pending;
use crate::error::{IoContext, Result};
use crate::store::beneath;
use crate::store::layout::{EPHEMERAL_IMAGE, ROOT_IMAGE, STEMCELL_IMAGE};
use crate::store::record::DiskImage;
use crate::store::{DiskRecord, Phase, Record, SnapshotRecord, StemcellRecord, VmRecord};
use crate::units::Bytes;

/// An image that exists, or is being made.
pub(super) struct Image {
    pub path: PathBuf,
    /// Its size as its guest sees it.
    pub virtual_size: Bytes,
    pub writable: bool,
}

/// Which images to list.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    /// Those that creates and copies are making.
    Pending,
    All,
}

/// The images in the pools that are `wanted`.
pub(super) fn list(
    cx: &Context,
    scope: Scope,
    wanted: impl Fn(Option<&str>) -> bool,
) -> Result<Vec<Image>> {
    let mut images = Vec::new();
    for disk in records::<DiskRecord>(cx, scope)? {
        let counts = scope == Scope::All || disk.preallocation.reserves_space();
        if counts && wanted(disk.pool.as_deref()) {
            images.push(Image {
                path: cx.store.disk_image(&disk)?,
                virtual_size: disk.size_after_resize().bytes(),
                writable: true,
            });
        }
    }
    if scope == Scope::Pending {
        images.extend(copies_in_progress(cx, wanted)?);
        return Ok(images);
    }
    for disk in records::<DiskRecord>(cx, scope)? {
        // A copy that is being made, or the old image after one.
        if let Some(image) =
            disk.inactive_image.as_ref().filter(|image| wanted(image.pool.as_deref()))
        {
            let path = cx.store.disk_image_at(&disk.cid, image)?;
            images.push(Image { path, virtual_size: disk.size.bytes(), writable: true });
        }
    }
    for snapshot in records::<SnapshotRecord>(cx, scope)? {
        if wanted(snapshot.disk.pool.as_deref()) {
            images.push(Image {
                path: cx.store.snapshot_image(&snapshot)?,
                virtual_size: snapshot.disk.size.bytes(),
                writable: snapshot.phase == Phase::Creating,
            });
        }
    }
    for stemcell in records::<StemcellRecord>(cx, scope)? {
        if stemcell.image_path.is_none() && wanted(stemcell.pool.as_deref()) {
            let dir = cx.store.images_dir(&stemcell.cid, stemcell.pool.as_deref())?;
            let virtual_size = stemcell.virtual_size;
            images.push(Image { path: dir.join(STEMCELL_IMAGE), virtual_size, writable: false });
        }
    }
    for vm in records::<VmRecord>(cx, scope)? {
        if wanted(vm.pool.as_deref()) {
            let dir = cx.store.images_dir(&vm.cid, vm.pool.as_deref())?;
            images.push(Image {
                path: dir.join(ROOT_IMAGE),
                virtual_size: vm.root_size,
                writable: true,
            });
            images.extend(vm.ephemeral.as_ref().map(|ephemeral| Image {
                path: dir.join(EPHEMERAL_IMAGE),
                virtual_size: ephemeral.size.bytes(),
                writable: true,
            }));
        }
        if vm.base.path.is_relative() && wanted(vm.base.pool.as_deref()) {
            // The stemcell's image, which may have no other name: the stemcell may be deleted.
            images.push(Image {
                path: cx.store.base_image(&vm)?,
                virtual_size: Bytes(0),
                writable: false,
            });
        }
    }
    Ok(images)
}

/// The copies of disks that are being made, each with the size that it needs in the end. A copy
/// whose source cannot be inspected is left out.
fn copies_in_progress(cx: &Context, wanted: impl Fn(Option<&str>) -> bool) -> Result<Vec<Image>> {
    let mut copies = Vec::new();
    for disk in records::<DiskRecord>(cx, Scope::Pending)? {
        if let Some(copy) = disk.inactive_image.as_ref().filter(|copy| wanted(copy.pool.as_deref()))
        {
            copies.push((cx.store.disk_image_at(&disk.cid, copy)?, copy.clone(), disk));
        }
    }
    for snapshot in records::<SnapshotRecord>(cx, Scope::Pending)? {
        if snapshot.phase == Phase::Creating && wanted(snapshot.disk.pool.as_deref()) {
            copies.push((cx.store.snapshot_image(&snapshot)?, snapshot.image(), snapshot.disk));
        }
    }
    let image = |(path, copy, of): (PathBuf, DiskImage, DiskRecord)| {
        let source = cx.store.disk_image(&of).ok()?;
        let virtual_size = need::copy(cx, &source, &of.current(), &copy, of.size).ok()?;
        Some(Image { path, virtual_size, writable: true })
    };
    Ok(copies.into_iter().filter_map(image).collect())
}

/// The records. One that cannot be read is left out: a damaged object must not block new ones.
fn records<R: Record>(cx: &Context, scope: Scope) -> Result<Vec<R>> {
    let cids = match scope {
        Scope::All => cx.store.list::<R>()?,
        Scope::Pending => pending::list::<R>(cx)?,
    };
    Ok(cids.iter().filter_map(|cid| cx.store.read::<R>(cid).ok().flatten()).collect())
}

impl Image {
    /// What it may still take beyond the `allocated` bytes.
    pub fn growth(&self, allocated: u64) -> u64 {
        if self.writable { self.virtual_size.get().saturating_sub(allocated) } else { 0 }
    }
}

/// What the filesystem of `dir` has free, less what the images on it may still take.
pub(super) fn room(cx: &Context, dir: &Path) -> Result<Bytes> {
    let scope = if cx.config.overcommit { Scope::Pending } else { Scope::All };
    let stat = statvfs(dir)?;
    let device = dir.metadata().at("look at", dir)?.dev();
    // Two pools can be on one filesystem.
    let is_here = |pool: Option<&str>| {
        let other = pool_dir(cx, pool).and_then(|dir| dir.metadata().at("look at", &dir));
        other.is_ok_and(|other| other.dev() == device)
    };
    let images = list(cx, scope, is_here)?;
    let allocated =
        |image: &Image| beneath::metadata(&image.path).map_or(0, |meta| meta.blocks() * 512);
    let growth =
        images.iter().map(|image| image.growth(allocated(image))).fold(0, u64::saturating_add);
    Ok(Bytes(free(&stat).get().saturating_sub(growth)))
}

/// The directory of a pool; without a name, the state directory. Before the first call that does
/// not exist: its parent that does has the filesystem that it will be on.
pub(super) fn pool_dir(cx: &Context, pool: Option<&str>) -> Result<PathBuf> {
    if let Some(pool) = pool {
        return Ok(cx.store.pools().dir(pool)?.to_owned());
    }
    let state_dir = cx.store.state_dir();
    if state_dir.try_exists().at("look at", state_dir)? {
        return Ok(state_dir.to_owned());
    }
    cx.store.ensure_mounted()?;
    let existing = state_dir.ancestors().find(|dir| dir.is_dir());
    Ok(existing.unwrap_or(state_dir).to_owned())
}

/// The space of the filesystem of `dir`.
pub(super) fn statvfs(dir: &Path) -> Result<StatVfs> {
    rustix::fs::statvfs(dir).map_err(std::io::Error::from).at("ask for the space of", dir)
}

/// What a filesystem has free for programs that do not run as root, and so for every program.
pub(super) fn free(stat: &StatVfs) -> Bytes {
    Bytes(stat.f_bavail.saturating_mul(stat.f_frsize))
}
