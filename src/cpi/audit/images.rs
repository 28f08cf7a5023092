//! Images: records whose image is not there, and files in pools that a record of ours does not know of. Nothing is removed:
//! pools can be shared with other hosts, and what looks like a leftover may be all there is of a disk.

use std::path::Path;

use super::{Audit, Kind};
use crate::cid::Cid;
use crate::cpi::leftovers;
use crate::error::{ErrorKind, IoContext, Result};
use crate::store::layout::{EPHEMERAL_IMAGE, ROOT_IMAGE, STEMCELL_IMAGE};
use crate::store::record::SnapshotRecord;
use crate::store::{DiskKey, DiskRecord, Phase, Rank, Record, StemcellRecord, Store, VmRecord};

/// Where the images of a record are.
type Images<R> = fn(&Store, &R) -> Result<Vec<std::path::PathBuf>>;

impl Audit<'_> {
    pub(super) fn images(&mut self) -> Result<()> {
        self.there::<DiskRecord>(Rank::Disk, |store, disk| Ok(vec![store.disk_image(disk)?]))?;
        self.there::<SnapshotRecord>(Rank::Snapshot, |store, snapshot| {
            Ok(vec![store.snapshot_image(snapshot)?])
        })?;
        self.there::<StemcellRecord>(Rank::Stemcell, |store, stemcell| {
            Ok(vec![match &stemcell.image_path {
                Some(path) => path.clone(),
                None => {
                    store.images_dir(&stemcell.cid, stemcell.pool.as_deref())?.join(STEMCELL_IMAGE)
                }
            }])
        })?;
        self.there::<VmRecord>(Rank::Vm, |store, vm| {
            let dir = store.images_dir(&vm.cid, vm.pool.as_deref())?;
            let ephemeral = vm.ephemeral.as_ref().map(|_| dir.join(EPHEMERAL_IMAGE));
            Ok([store.base_image(vm)?, dir.join(ROOT_IMAGE)].into_iter().chain(ephemeral).collect())
        })?;
        self.shared_disks()?;
        self.disk_key()?;
        let pools: Vec<_> = self.cpi.store.pools().names().map(str::to_owned).collect();
        for pool in pools {
            // One that can not be used is told of with the records that need it.
            if let Ok(dir) = self.cpi.store.pools().dir(&pool).map(Path::to_owned)
                && let Err(error) = self.strays(&pool, &dir)
            {
                self.unknown(&format!("pool {pool}"), &error);
            }
        }
        Ok(())
    }

    /// Disks in shared pools: those that another host took, and those that stopped half-way between two hosts.
    fn shared_disks(&mut self) -> Result<()> {
        let cpi = self.cpi;
        for cid in cpi.store.list::<DiskRecord>()? {
            let Some(hold) = self.idle(Rank::Disk, &cid) else { continue };
            let Ok(Some(disk)) = cpi.store.read::<DiskRecord>(&cid) else { continue };
            let Err(error) = cpi.store.ensure_owned(&disk) else { continue };
            match error.kind() {
                ErrorKind::Conflict => {}
                ErrorKind::Corrupt => {
                    self.unusable(&cid, &error);
                    continue;
                }
                // Its pool is told of with its image.
                _ => continue,
            }
            if !cpi.store.is_outdated(&disk).unwrap_or(false) {
                self.told(
                    Kind::Orphan,
                    &cid,
                    &error.chain(),
                    error.hint_text().unwrap_or_default(),
                );
                continue;
            }
            let lists = |vm: &VmRecord| vm.attachment(&cid).is_some();
            match cpi.store.list_readable::<VmRecord>()?.iter().find(|vm| lists(vm)) {
                Some(vm) => {
                    self.told(
                        Kind::Orphan,
                        &cid,
                        &error.chain(),
                        &format!("detach_disk from VM '{}', then `gc`", vm.cid),
                    );
                }
                None => {
                    let mut hold = Some(hold);
                    self.found(Kind::Orphan, &cid, &error.chain(), || {
                        let metadata = cpi.store.lock(Rank::Metadata, &cid, Self::deadline())?;
                        cpi.store.remove_local(&cid)?;
                        metadata.unlink()?;
                        hold.take().expect("taken once").unlink()
                    });
                }
            }
        }
        for cid in cpi.store.moving_disks()? {
            let Some(hold) = self.hold(Rank::Disk, &cid) else { continue };
            if matches!(cpi.store.find::<DiskRecord>(&cid), Ok(None)) {
                let why = "it was on its way from one host to another";
                self.found(Kind::Unfinished, &cid, why, || cpi.store.finish_release(&cid));
                hold.unlink()?;
            }
        }
        Ok(())
    }

    /// The key of encrypted disks, without which none of them can be opened.
    fn disk_key(&mut self) -> Result<()> {
        let (store, key) = (&self.cpi.store, DiskKey::from_config(&self.cpi.config));
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

    fn there<R: Record>(&mut self, rank: Rank, images: Images<R>) -> Result<()> {
        for cid in self.cpi.store.list::<R>()? {
            let Some(_lock) = self.idle(rank, &cid) else { continue };
            let Ok(Some(record)) = self.cpi.store.read::<R>(&cid) else { continue };
            if record.phase() != Phase::Ready {
                continue;
            }
            let next = "restore it from a backup before anything else";
            match images(&self.cpi.store, &record) {
                Ok(paths) => {
                    for path in paths.iter().filter(|path| !path.exists()) {
                        self.told(
                            Kind::NoImage,
                            &cid,
                            &format!("its image '{}' is not there", path.display()),
                            next,
                        );
                    }
                }
                Err(error) => {
                    let why = format!("its images can not be looked at: {error}");
                    self.told(
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

    /// Directories in a pool that are named after something of ours which does not say that it has files there.
    fn strays(&mut self, pool: &str, dir: &Path) -> Result<()> {
        for entry in dir.read_dir().at("list", dir)? {
            let Ok(name) = entry.at("list", dir)?.file_name().into_string() else { continue };
            let Some((rank, lock)) = leftovers::lock_of(&name) else { continue };
            let is_stray = match rank {
                Rank::Disk => self.is_stray::<DiskRecord>(&name, pool),
                Rank::Snapshot => self.is_stray::<SnapshotRecord>(&name, pool),
                Rank::Stemcell => self.is_stray::<StemcellRecord>(&name, pool),
                Rank::Vm => self.is_stray::<VmRecord>(&name, pool),
                _ => false,
            };
            if is_stray && self.idle(rank, &lock).is_some() {
                let why = format!(
                    "there is '{}', which its record does not know of",
                    dir.join(&name).display()
                );
                self.told(
                    Kind::NoRecord,
                    &name,
                    &why,
                    "look into it; remove it if nothing in it is missed",
                );
            }
        }
        Ok(())
    }

    /// Whether there is a record of that name, and it has no files in the pool.
    fn is_stray<R: Record>(&self, name: &str, pool: &str) -> bool {
        let record =
            R::Cid::parse(name).ok().and_then(|cid| self.cpi.store.read::<R>(&cid).ok()?);
        record
            .is_some_and(|record| record.phase() == Phase::Ready && !record.pools().contains(&pool))
    }
}
