//! Space: whether a new image fits, and how full each pool is.
//!
//! An image is admitted if its filesystem has room for what it *needs* now. That is
//!
//! - a preallocated image: all of its size
//! - a thin one: its headers with `overcommit`, all of its size without
//! - a copy: what its source takes; all of its size where holes do not stay holes
//!
//! and the room is what the filesystem has free, less what creates and copies at work in other processes will still take and,
//! without `overcommit`, less what all thin images on it may still grow to. One lock is held from the look until the
//! record, which others count, is written. Other hosts that use a shared pool are not seen.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;

use super::Cpi;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::store::layout::{EPHEMERAL_IMAGE, ROOT_IMAGE, STEMCELL_IMAGE};
use crate::store::record::{DiskImage, Preallocation};
use crate::store::{DiskRecord, Phase, Rank, Record, SnapshotRecord, StemcellRecord, VmRecord};
use crate::units::{Bytes, MiB};

/// What a new image takes without any data: headers and first tables. Also of a VM, whose config drive is the most of it.
const BIRTH: u64 = 1 << 20;
/// A LUKS header with its eight key slots, and what an image takes at birth.
const ENCRYPTED_BIRTH: u64 = 4 << 20;

/// How full a pool is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolUsage {
    /// Its directory.
    pub path: PathBuf,
    /// Size of its filesystem.
    pub capacity: Bytes,
    /// What is free there for root's programs and everybody else's.
    pub free: Bytes,
    /// What our images in the pool take. One with several names counts once.
    pub allocated: Bytes,
    /// What their guests see as their sizes, together.
    pub virtual_size: Bytes,
    /// What they may still grow by.
    pub growth: Bytes,
}

/// How much is left, in one word. The thresholds are those at which Ceph warns and stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Watermark {
    /// 15 % of the filesystem and more are free.
    Ok,
    /// Less: make room.
    Low,
    /// Less than 5 %: guests may stop soon, and creates be refused.
    Full,
}

impl PoolUsage {
    /// How much is left.
    pub fn watermark(&self) -> Watermark {
        match u128::from(self.free.get()) * 100 {
            free if free < u128::from(self.capacity.get()) * 5 => Watermark::Full,
            free if free < u128::from(self.capacity.get()) * 15 => Watermark::Low,
            _ => Watermark::Ok,
        }
    }
}

impl Watermark {
    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Low => "low",
            Self::Full => "full",
        }
    }
}

/// An image that is there, or about to be.
struct Image {
    path: PathBuf,
    virtual_size: Bytes,
    writable: bool,
}

/// Which images are counted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Scope {
    /// Those that creates work on.
    InTheMaking,
    All,
}

impl Cpi {
    /// Has `record` write down a new image that needs `need` bytes in `pool`, if there is room.
    ///
    /// # Errors
    /// [`ErrorKind::NoDiskSpace`] naming the pool, and what it needs and has. Those of [`crate::store::Pools::dir`].
    pub(super) fn admit(
        &self,
        pool: Option<&str>,
        need: Bytes,
        deadline: Instant,
        record: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let dir = self.pool_dir(pool)?;
        let _lock = self.store.short_lock(Rank::Space, "all", deadline)?;
        let scope = if self.config.overcommit { Scope::InTheMaking } else { Scope::All };
        let room = self.room(&dir, scope)?;
        if need <= room { record() } else { Err(no_space(pool, &dir, need, room)) }
    }

    /// What a new persistent disk needs at once.
    pub(super) fn need_of_disk(&self, size: MiB, image: &DiskImage) -> Bytes {
        let size = size.bytes().get();
        let birth = if image.encrypted { ENCRYPTED_BIRTH } else { BIRTH };
        Bytes(match image.preallocation {
            Preallocation::Falloc | Preallocation::Full => size + birth,
            _ if !self.config.overcommit => size + birth,
            // 8 bytes of tables and 2 of a reference count for 64 KiB of data.
            Preallocation::Metadata => (size >> 12) + birth,
            Preallocation::Off => birth,
        })
    }

    /// What new thin images of `size` together need at once.
    pub(super) fn need_of_thin(&self, size: Bytes) -> Bytes {
        Bytes(BIRTH.saturating_add(if self.config.overcommit { 0 } else { size.get() }))
    }

    /// What the image of a stemcell needs at least, from a file that takes `source`.
    pub(super) fn need_of_import(source: Bytes) -> Bytes {
        Bytes(BIRTH.saturating_add(source.get()))
    }

    /// How full the state directory (no name) and each pool is. A pool that is not mounted is an error of its own.
    pub fn usage(&self) -> Vec<(Option<&str>, Result<PoolUsage>)> {
        let pools = std::iter::once(None).chain(self.store.pools().names().map(Some));
        pools.map(|pool| (pool, self.pool_usage(pool))).collect()
    }

    /// What is free in the state directory (named with an empty word) and in each pool that can be used.
    pub(super) fn free_space(&self) -> BTreeMap<String, Bytes> {
        let pools = std::iter::once(None).chain(self.store.pools().names().map(Some));
        let scope = if self.config.overcommit { Scope::InTheMaking } else { Scope::All };
        let room = |pool: Option<&str>| self.pool_dir(pool).and_then(|dir| self.room(&dir, scope));
        pools
            .filter_map(|pool| Some((pool.unwrap_or_default().to_owned(), room(pool).ok()?)))
            .collect()
    }

    fn pool_usage(&self, pool: Option<&str>) -> Result<PoolUsage> {
        let path = self.pool_dir(pool)?;
        let stat = rustix::fs::statvfs(&path)
            .map_err(std::io::Error::from)
            .at("ask for the space of", &path)?;
        let (mut seen, mut usage) = (BTreeSet::new(), [0; 3]);
        for image in self.images(Scope::All, |of| of == pool)? {
            let meta = image.path.metadata().ok();
            if meta.as_ref().is_none_or(|meta| seen.insert((meta.dev(), meta.ino()))) {
                let allocated = meta.map_or(0, |meta| meta.blocks() * 512);
                usage[0] += allocated;
                usage[1] += image.virtual_size.get();
                usage[2] += image.growth(allocated);
            }
        }
        let [allocated, virtual_size, growth] = usage.map(Bytes);
        let capacity = Bytes(stat.f_blocks.saturating_mul(stat.f_frsize));
        Ok(PoolUsage { path, capacity, free: free(&stat), allocated, virtual_size, growth })
    }

    fn pool_dir(&self, pool: Option<&str>) -> Result<PathBuf> {
        match pool {
            Some(pool) => Ok(self.store.pools().dir(pool)?.to_owned()),
            None => Ok(self.store.state_dir().to_owned()),
        }
    }

    /// What the filesystem of `dir` has free that nobody was promised.
    fn room(&self, dir: &Path, scope: Scope) -> Result<Bytes> {
        let stat = rustix::fs::statvfs(dir)
            .map_err(std::io::Error::from)
            .at("ask for the space of", dir)?;
        let device = dir.metadata().at("look at", dir)?.dev();
        // Two pools can be on one filesystem.
        let is_here = |pool: Option<&str>| {
            let other = self.pool_dir(pool).and_then(|dir| dir.metadata().at("look at", &dir));
            other.is_ok_and(|other| other.dev() == device)
        };
        let images = self.images(scope, is_here)?;
        let allocated = |image: &Image| image.path.metadata().map_or(0, |meta| meta.blocks() * 512);
        let promised =
            images.iter().map(|image| image.growth(allocated(image))).fold(0, u64::saturating_add);
        Ok(Bytes(free(&stat).get().saturating_sub(promised)))
    }

    /// The images of records whose pool is `wanted`.
    fn images(&self, scope: Scope, wanted: impl Fn(Option<&str>) -> bool) -> Result<Vec<Image>> {
        let mut images = Vec::new();
        for disk in self.records::<DiskRecord>(scope)? {
            let counts = scope == Scope::All || disk.preallocation.reserves_space();
            if counts && wanted(disk.pool.as_deref()) {
                images.push(Image {
                    path: self.store.disk_image(&disk)?,
                    virtual_size: disk.size_after_resize().bytes(),
                    writable: true,
                });
            }
        }
        if scope == Scope::InTheMaking {
            images.extend(self.copies_in_the_making(wanted)?);
            return Ok(images);
        }
        for disk in self.records::<DiskRecord>(scope)? {
            // A copy that is being made, or what was in force before one.
            if let Some(image) =
                disk.inactive_image.as_ref().filter(|image| wanted(image.pool.as_deref()))
            {
                let path = self.store.disk_image_at(&disk.cid, image)?;
                images.push(Image { path, virtual_size: disk.size.bytes(), writable: true });
            }
        }
        for snapshot in self.records::<SnapshotRecord>(scope)? {
            if wanted(snapshot.disk.pool.as_deref()) {
                images.push(Image {
                    path: self.store.snapshot_image(&snapshot)?,
                    virtual_size: snapshot.disk.size.bytes(),
                    writable: snapshot.phase == Phase::Creating,
                });
            }
        }
        for stemcell in self.records::<StemcellRecord>(scope)? {
            if stemcell.image_path.is_none() && wanted(stemcell.pool.as_deref()) {
                let dir = self.store.images_dir(&stemcell.cid, stemcell.pool.as_deref())?;
                let virtual_size = stemcell.virtual_size;
                images.push(Image {
                    path: dir.join(STEMCELL_IMAGE),
                    virtual_size,
                    writable: false,
                });
            }
        }
        for vm in self.records::<VmRecord>(scope)? {
            if wanted(vm.pool.as_deref()) {
                let dir = self.store.images_dir(&vm.cid, vm.pool.as_deref())?;
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
                // The stemcell's image, which may have no other name left.
                images.push(Image {
                    path: self.store.base_image(&vm)?,
                    virtual_size: Bytes(0),
                    writable: false,
                });
            }
        }
        Ok(images)
    }

    /// The copies of disks that are being made, each as large as it will come to be. One whose source can not be looked at
    /// is left out.
    fn copies_in_the_making(&self, wanted: impl Fn(Option<&str>) -> bool) -> Result<Vec<Image>> {
        let mut copies = Vec::new();
        for disk in self.records::<DiskRecord>(Scope::InTheMaking)? {
            if let Some(copy) =
                disk.inactive_image.as_ref().filter(|copy| wanted(copy.pool.as_deref()))
            {
                copies.push((self.store.disk_image_at(&disk.cid, copy)?, copy.clone(), disk));
            }
        }
        for snapshot in self.records::<SnapshotRecord>(Scope::InTheMaking)? {
            if snapshot.phase == Phase::Creating && wanted(snapshot.disk.pool.as_deref()) {
                copies.push((
                    self.store.snapshot_image(&snapshot)?,
                    snapshot.image(),
                    snapshot.disk,
                ));
            }
        }
        let image = |(path, copy, of): (PathBuf, DiskImage, DiskRecord)| {
            let source = self.store.disk_image(&of).ok()?;
            let virtual_size = self.need_of_copy(&source, &of.current(), &copy, of.size).ok()?;
            Some(Image { path, virtual_size, writable: true })
        };
        Ok(copies.into_iter().filter_map(image).collect())
    }

    /// Records that can not be read are left out: one broken object must not keep others from being made.
    fn records<R: Record>(&self, scope: Scope) -> Result<Vec<R>> {
        let cids = match scope {
            Scope::All => self.store.list::<R>()?,
            Scope::InTheMaking => self.in_the_making::<R>()?,
        };
        Ok(cids.iter().filter_map(|cid| self.store.read::<R>(cid).ok().flatten()).collect())
    }
}

impl Image {
    /// What it may still take beyond `allocated` bytes.
    fn growth(&self, allocated: u64) -> u64 {
        if self.writable { self.virtual_size.get().saturating_sub(allocated) } else { 0 }
    }
}

/// What an image needs at once that has all of its data from the beginning.
pub(super) fn need_of_full(size: MiB) -> Bytes {
    Bytes(size.bytes().get() + ENCRYPTED_BIRTH)
}

fn free(stat: &rustix::fs::StatVfs) -> Bytes {
    Bytes(stat.f_bavail.saturating_mul(stat.f_frsize))
}

fn no_space(pool: Option<&str>, dir: &Path, need: Bytes, have: Bytes) -> Error {
    let what = pool.map_or("the state directory".to_owned(), |pool| format!("pool '{pool}'"));
    let (need, have) = (need.get().div_ceil(1 << 20), have.get() >> 20);
    let message =
        format!("{what} at '{}' has {have} MiB left, {need} MiB are needed", dir.display());
    Error::new(ErrorKind::NoDiskSpace, message).hint("free or add space there, or use another pool")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watermark_is_a_share_of_the_filesystem() {
        let none = Bytes(0);
        let left = |free| {
            let (capacity, free) = (Bytes(1000), Bytes(free));
            PoolUsage {
                path: PathBuf::new(),
                capacity,
                free,
                allocated: none,
                virtual_size: none,
                growth: none,
            }
        };
        let words = [1000, 150, 149, 50, 49, 0].map(|free| left(free).watermark().as_str());
        assert_eq!(words, ["ok", "ok", "low", "low", "full", "full"]);
    }
}
