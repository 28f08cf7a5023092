//! Images that do not exist, and files in pools that no record names. Nothing is removed: other
//! hosts may share the pool, and a stray image may be all that is left of a disk.

use std::path::{Path, PathBuf};

use super::{Audit, Kind};
use crate::cid::Cid;
use crate::cpi::creation::pending;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::store::beneath::{self, Expected};
use crate::store::layout::{EPHEMERAL_IMAGE, ROOT_IMAGE, STEMCELL_IMAGE};
use crate::store::record::{SnapshotRecord, VerifiedFile};
use crate::store::{DiskKey, DiskRecord, Phase, Rank, Record, StemcellRecord, Store, VmRecord};

/// The images of a record.
type Images<R> = fn(&Store, &R) -> Result<Vec<(PathBuf, Expected)>>;

impl Audit<'_> {
    pub(super) fn images(&mut self) -> Result<()> {
        self.check_images::<DiskRecord>(Rank::Disk, |store, disk| {
            Ok(vec![(store.disk_image(disk)?, Expected::Own)])
        })?;
        self.check_images::<SnapshotRecord>(Rank::Snapshot, |store, snapshot| {
            Ok(vec![(store.snapshot_image(snapshot)?, Expected::Own)])
        })?;
        self.check_images::<StemcellRecord>(Rank::Stemcell, |store, stemcell| {
            Ok(vec![match &stemcell.image_path {
                Some(path) => (path.clone(), Expected::OfOperator),
                None => {
                    let dir = store.images_dir(&stemcell.cid, stemcell.pool.as_deref())?;
                    (dir.join(STEMCELL_IMAGE), Expected::Shared)
                }
            }])
        })?;
        self.check_images::<VmRecord>(Rank::Vm, |store, vm| {
            let dir = store.images_dir(&vm.cid, vm.pool.as_deref())?;
            let own = |name| (dir.join(name), Expected::Own);
            let ephemeral = vm.ephemeral.as_ref().map(|_| own(EPHEMERAL_IMAGE));
            let base = (store.base_image(vm)?, store.base_expected(vm));
            Ok([base, own(ROOT_IMAGE)].into_iter().chain(ephemeral).collect())
        })?;
        self.light_images()?;
        self.ownership()?;
        self.disk_key()?;
        let pools: Vec<_> = self.cx.store.pools().names().map(str::to_owned).collect();
        for pool in pools {
            // A pool that cannot be used is reported with the records that need it.
            if let Ok(dir) = self.cx.store.pools().dir(&pool).map(Path::to_owned)
                && let Err(error) = self.strays(&pool, &dir)
            {
                self.unknown(&format!("pool {pool}"), &error);
            }
        }
        Ok(())
    }

    /// Images of light stemcells that are not the verified ones any more.
    fn light_images(&mut self) -> Result<()> {
        let store = &self.cx.store;
        let stemcells = store.list_readable::<StemcellRecord>()?.into_iter();
        let stemcells = stemcells.filter(|stemcell| stemcell.phase == Phase::Ready);
        let mut images: Vec<_> = stemcells
            .filter_map(|it| Some((it.image_path?, it.verified?, it.cid.to_string())))
            .collect();
        let vms = store.list_readable::<VmRecord>()?.into_iter();
        let vms = vms.filter(|vm| vm.phase == Phase::Ready);
        images.extend(
            vms.filter_map(|vm| Some((vm.base.path, vm.base.verified?, vm.cid.to_string()))),
        );
        // An image that does not exist is reported with its record.
        images.retain(|(path, ..)| path.exists());
        // A changed image is read once, not once for each of its VMs.
        let mut checked: Vec<(PathBuf, VerifiedFile, Option<Error>)> = Vec::new();
        for (path, verified, cid) in images {
            let known = checked.iter().position(|(p, v, _)| (p, v) == (&path, &verified));
            let at = known.unwrap_or_else(|| {
                let changed = verified.ensure_unchanged(&path).err();
                checked.push((path, verified, changed));
                checked.len() - 1
            });
            if let Some(error) = &checked[at].2 {
                self.unusable(&cid, error);
            }
        }
        Ok(())
    }

    /// Disks in shared pools: those that another host has taken, and those whose change of owner
    /// was interrupted.
    fn ownership(&mut self) -> Result<()> {
        let cx = self.cx;
        for cid in cx.store.list::<DiskRecord>()? {
            let Some(lock) = self.lock_object(Rank::Disk, &cid) else { continue };
            let Ok(Some(disk)) = cx.store.read::<DiskRecord>(&cid) else { continue };
            let Err(error) = cx.store.ensure_owned(&disk) else { continue };
            match error.kind() {
                ErrorKind::Conflict => {}
                ErrorKind::Corrupt => {
                    self.unusable(&cid, &error);
                    continue;
                }
                // The pool is reported with the image.
                _ => continue,
            }
            if !cx.store.is_outdated(&disk).unwrap_or(false) {
                self.for_operator(
                    Kind::Orphan,
                    &cid,
                    &error.chain(),
                    error.hint_text().unwrap_or_default(),
                );
                continue;
            }
            let lists = |vm: &VmRecord| vm.attachment(&cid).is_some();
            match cx.store.list_readable::<VmRecord>()?.iter().find(|vm| lists(vm)) {
                Some(vm) => {
                    self.for_operator(
                        Kind::Orphan,
                        &cid,
                        &error.chain(),
                        &format!("detach_disk from VM '{}', then `gc`", vm.cid),
                    );
                }
                None => {
                    let mut lock = Some(lock);
                    self.found(Kind::Orphan, &cid, &error.chain(), || {
                        let metadata = cx.store.lock(Rank::Metadata, &cid, Self::deadline())?;
                        cx.store.remove_local(&cid)?;
                        metadata.unlink()?;
                        lock.take().expect("taken once").unlink()
                    });
                }
            }
        }
        for cid in cx.store.moving_disks()? {
            let Some(lock) = self.lock(Rank::Disk, &cid) else { continue };
            if matches!(cx.store.find::<DiskRecord>(&cid), Ok(None)) {
                let why = "its change of owner was interrupted";
                self.found(Kind::Unfinished, &cid, why, || cx.store.finish_release(&cid));
                lock.unlink()?;
            }
        }
        Ok(())
    }

    /// The key of encrypted disks. Without it none of them can be opened.
    fn disk_key(&mut self) -> Result<()> {
        let (store, key) = (&self.cx.store, DiskKey::from_config(&self.cx.config));
        let disks = store.list_readable::<DiskRecord>()?.into_iter();
        let mut disks = disks.chain(
            store.list_readable::<SnapshotRecord>()?.into_iter().map(|snapshot| snapshot.disk),
        );
        if disks.any(|disk| disk.encrypted)
            && let Err(error) = key.read()
        {
            self.unusable(&key.path().display(), &error);
        }
        Ok(())
    }

    fn check_images<R: Record>(&mut self, rank: Rank, images: Images<R>) -> Result<()> {
        for cid in self.cx.store.list::<R>()? {
            let Some(_lock) = self.lock_object(rank, &cid) else { continue };
            let Ok(Some(record)) = self.cx.store.read::<R>(&cid) else { continue };
            if record.phase() != Phase::Ready {
                continue;
            }
            let next = "restore it from a backup before anything else";
            match images(&self.cx.store, &record) {
                Ok(paths) => {
                    for (path, expected) in paths {
                        let why = match beneath::find(&path, expected) {
                            Ok(Some(_)) => continue,
                            Ok(None) => format!("its image '{}' does not exist", path.display()),
                            Err(error) => format!("its image cannot be used: {}", error.chain()),
                        };
                        self.for_operator(Kind::NoImage, &cid, &why, next);
                    }
                }
                Err(error) => {
                    let why = format!("cannot inspect its images: {error}");
                    self.for_operator(
                        Kind::NoImage,
                        &cid,
                        &why,
                        "mount the pool, or correct 'pools' in the configuration",
                    );
                }
            }
        }
        Ok(())
    }

    /// Directories in a pool with the cid of an object whose record names no image there.
    fn strays(&mut self, pool: &str, dir: &Path) -> Result<()> {
        for entry in dir.read_dir().at("list", dir)? {
            let Ok(name) = entry.at("list", dir)?.file_name().into_string() else { continue };
            let Some((rank, lock_name)) = pending::lock_of(&name) else { continue };
            let is_stray = match rank {
                Rank::Disk => self.is_stray::<DiskRecord>(&name, pool),
                Rank::Snapshot => self.is_stray::<SnapshotRecord>(&name, pool),
                Rank::Stemcell => self.is_stray::<StemcellRecord>(&name, pool),
                Rank::Vm => self.is_stray::<VmRecord>(&name, pool),
                _ => false,
            };
            if is_stray && self.lock_object(rank, &lock_name).is_some() {
                let why = format!("its record does not name '{}'", dir.join(&name).display());
                self.for_operator(
                    Kind::NoRecord,
                    &name,
                    &why,
                    "inspect the directory, and remove it if its files are not needed",
                );
            }
        }
        Ok(())
    }

    /// Whether the object of that name has a record, and no files in the pool by it.
    fn is_stray<R: Record>(&self, name: &str, pool: &str) -> bool {
        let record = R::Cid::parse(name).ok().and_then(|cid| self.cx.store.read::<R>(&cid).ok()?);
        record
            .is_some_and(|record| record.phase() == Phase::Ready && !record.pools().contains(&pool))
    }
}
