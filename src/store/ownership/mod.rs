//! Ownership of persistent disks in pools that several hosts share.
//!
//! A disk in a shared pool has one owner file beside its images. The file's name is the owner, and
//! its content is the disk's record for the next owner. A change of owner is a rename: of several
//! hosts that try, the filesystem lets one succeed.
//!
//! ```text
//!   <pool>/<cid>/host-<id>     that host owns the disk, whatever a record on another host says
//!   <pool>/<cid>/moving-<id>   the same, while that host takes or releases the disk: no VM uses it
//!   <pool>/<cid>/host-none     the disk has no owner: the first host that needs it takes it
//!
//!   on A            in the pool      on B
//!   a record        host-<A>                       in use on A
//!   a record        moving-<A>                     A releases the disk
//!   –               moving-<A>                     A was killed here; finishes when asked again
//!   –               host-none                      any host may take the disk
//!   –               moving-<B>                     B was killed here; finishes when asked again
//!   –               moving-<B>       a record
//!   –               host-<B>         a record      in use on B
//! ```
//!
//! A disk without an owner file belongs to the host that has its record: a version without owner
//! files made it. A host opens an image only after [`Store::ensure_owned`].

mod owner_file;

use std::path::Path;

use super::record::{DiskRecord, Record};
use super::{Store, atomic, beneath};
use crate::cid::{Cid, DiskCid};
use crate::error::{Error, ErrorKind, Result};

use owner_file::{DiskDir, NO_OWNER, Owner, is_owner_file};

/// Hint if this host lost the disk's current image.
const RECORD_OUTDATED: &str = "this host's record of the disk is out of date: \
    detach the disk from its VM, then run `bosh-qemu-cpi gc`";
/// Hint if this host lost an older image than its current one.
const RECORD_NEWER: &str = "update_disk moved the disk out of that pool, and this host's image is \
    newer: delete the disk on that host, or remove its directory here by hand";

impl Store {
    /// The disk's directories in all shared pools.
    ///
    /// # Errors
    /// Those of [`super::Pools::dir`].
    fn disk_dirs(&self, cid: &DiskCid) -> Result<Vec<DiskDir<'_>>> {
        let mut dirs = Vec::new();
        for pool in self.pools().shared() {
            let dir = self.pools().dir(pool)?.join(cid);
            if atomic::entry_exists(&dir) {
                dirs.push(DiskDir::read(self, pool, dir)?);
            }
        }
        Ok(dirs)
    }

    /// The disk's directories in the shared pools of its record. A pool that cannot be read is left
    /// out if it holds only an inactive image.
    fn recorded_dirs(&self, disk: &DiskRecord) -> Result<Vec<DiskDir<'_>>> {
        let (recorded, mut dirs) = (disk.pools(), Vec::new());
        for pool in self.pools().shared().filter(|pool| recorded.contains(pool)) {
            match self.pools().dir(pool) {
                Ok(dir) => dirs.push(DiskDir::read(self, pool, dir.join(&disk.cid))?),
                Err(error) if disk.pool.as_deref() == Some(pool) => return Err(error),
                Err(_) => {}
            }
        }
        Ok(dirs)
    }

    /// Whether the disk has images in a shared pool, whichever host owns it.
    ///
    /// # Errors
    /// Those of [`super::Pools::dir`].
    pub fn is_in_shared_pool(&self, cid: &DiskCid) -> Result<bool> {
        self.disk_dirs(cid).map(|dirs| !dirs.is_empty())
    }

    /// Whether this host can take a disk that it has no record of: the disk has no owner, or this
    /// host was killed while it took or released the disk.
    ///
    /// # Errors
    /// Those of [`super::Pools::dir`]: a pool that cannot be read may have the disk.
    pub fn can_take(&self, cid: &DiskCid) -> Result<bool> {
        Ok(self.disk_dirs(cid)?.iter().any(|dir| matches!(dir.owner, Owner::None | Owner::Moving)))
    }

    /// Refuses a disk without a record on this host that another host owns.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] naming the owner file. Those of [`super::Pools::dir`].
    pub fn ensure_not_owned_elsewhere(&self, cid: &DiskCid) -> Result<()> {
        let dirs = self.disk_dirs(cid)?;
        let Some(other) = dirs.iter().find(|dir| dir.owner == Owner::OtherHost) else {
            return Ok(());
        };
        let message = format!("disk '{cid}' is owned by another host: {}", other.describe());
        Err(Error::new(ErrorKind::Conflict, message).hint(format!(
            "repeat the call on that host; if it is gone for good, run `bosh-qemu-cpi disk take \
             {cid}` here"
        )))
    }

    /// Refuses a disk with a record on this host that this host does not own.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] if this host released the disk or another host took it.
    /// [`ErrorKind::Corrupt`] if the file with this host's id is missing.
    pub fn ensure_owned(&self, disk: &DiskRecord) -> Result<()> {
        self.ensure_owned_in(disk, &self.recorded_dirs(disk)?)
    }

    fn ensure_owned_in(&self, disk: &DiskRecord, dirs: &[DiskDir<'_>]) -> Result<()> {
        for dir in dirs {
            let (cid, found) = (&disk.cid, dir.describe());
            let state = match dir.owner {
                Owner::Unrecorded | Owner::ThisHost | Owner::Moving => continue,
                Owner::None => "has no owner now",
                Owner::OtherHost if self.known_names()?.is_none() => {
                    let file = self.host_id_file();
                    let message = format!(
                        "cannot tell whether this host owns disk '{cid}': '{}' is missing",
                        file.display()
                    );
                    let hint = format!(
                        "{found}: if this host owns the disk, write the part after '-' into '{}'",
                        file.display()
                    );
                    return Err(Error::new(ErrorKind::Corrupt, message).hint(hint));
                }
                Owner::OtherHost => "is owned by another host now",
            };
            let message = format!("disk '{cid}' {state}: {found}");
            let hint = if dir.has_current_image(disk) { RECORD_OUTDATED } else { RECORD_NEWER };
            return Err(Error::new(ErrorKind::Conflict, message).hint(hint));
        }
        Ok(())
    }

    /// Whether this host has certainly lost a disk that it has a record of.
    pub fn is_no_longer_owned(&self, disk: &DiskRecord) -> bool {
        self.ensure_owned(disk).is_err_and(|error| error.kind() == ErrorKind::Conflict)
    }

    /// Whether this host's record of a disk it lost is out of date. It is not if update_disk had
    /// moved the disk out of the pool before.
    ///
    /// # Errors
    /// Those of [`super::Pools::dir`].
    pub fn is_outdated(&self, disk: &DiskRecord) -> Result<bool> {
        let is_lost = |dir: &DiskDir<'_>| matches!(dir.owner, Owner::None | Owner::OtherHost);
        Ok(self.recorded_dirs(disk)?.iter().any(|dir| dir.has_current_image(disk) && is_lost(dir)))
    }

    /// Whether a disk with a record on this host has no owner: this host released the disk after it
    /// wrote the record.
    ///
    /// # Errors
    /// Those of [`super::Pools::dir`].
    pub fn has_no_owner(&self, disk: &DiskRecord) -> Result<bool> {
        let is_free = |dir: &DiskDir<'_>| dir.owner == Owner::None && dir.has_current_image(disk);
        Ok(self.recorded_dirs(disk)?.iter().any(is_free))
    }

    /// Cancels an interrupted release: this host keeps the disk. The caller holds the disk's lock.
    ///
    /// # Errors
    /// As [`Self::ensure_owned`].
    pub fn cancel_move(&self, disk: &DiskRecord) -> Result<()> {
        let dirs = self.recorded_dirs(disk)?;
        self.ensure_owned_in(disk, &dirs)?;
        for dir in dirs.iter().filter(|dir| dir.owner == Owner::Moving) {
            let names = self.own_names()?;
            dir.rename(&names.moving, &names.owned)?;
        }
        Ok(())
    }

    /// Writes the disk's owner file, with this host as the owner, if its current image is in a
    /// shared pool.
    ///
    /// # Errors
    /// As [`Self::ensure_owned`].
    pub fn write_owner_file(&self, disk: &DiskRecord) -> Result<()> {
        let Some(pool) = disk.pool.as_deref().filter(|pool| self.pools().is_shared(pool)) else {
            return Ok(());
        };
        let names = self.own_names()?;
        self.cancel_move(disk)?;
        let path = self.pools().dir(pool)?.join(&disk.cid).join(names.owned);
        beneath::write(&path, &atomic::json(disk))
    }

    /// Writes the record of a complete disk: beside its image in a shared pool for the next owner,
    /// then here. Durable when it returns.
    pub fn write_disk(&self, disk: &DiskRecord) -> Result<()> {
        self.write_owner_file(disk)?;
        self.write(disk)
    }

    /// Releases a disk that nothing on this host uses: the disk has no owner, and this host has no
    /// record of it. The caller holds the disk's locks.
    pub fn release(&self, disk: &DiskRecord) -> Result<()> {
        let metadata = self.disk_metadata(disk)?;
        // Into the record, too: remove_record removes the metadata's own file first.
        self.write_disk(&DiskRecord { vm: None, metadata, ..disk.clone() })?;
        let names = self.own_names()?;
        for dir in self.recorded_dirs(disk)? {
            dir.rename(&names.owned, &names.moving)?;
        }
        self.remove_record::<DiskRecord>(&disk.cid)?;
        self.finish_release(&disk.cid)
    }

    /// Removes the record of a disk that this host lost, and its images outside of shared pools.
    pub fn remove_local(&self, cid: &DiskCid) -> Result<()> {
        for pool in self.read::<DiskRecord>(cid)?.iter().flat_map(Record::pools) {
            if !self.pools().is_shared(pool) {
                atomic::remove_dir(&self.pools().dir(pool)?.join(cid))?;
            }
        }
        self.remove_record::<DiskRecord>(cid)
    }

    /// Ends an interrupted release, or an interrupted take, of a disk without a record here: the
    /// disk has no owner.
    pub fn finish_release(&self, cid: &DiskCid) -> Result<()> {
        for dir in self.disk_dirs(cid)?.iter().filter(|dir| dir.owner == Owner::Moving) {
            dir.rename(&self.own_names()?.moving, NO_OWNER)?;
        }
        Ok(())
    }

    /// Takes ownership of a disk without an owner, or finishes an interrupted take. `false`: there
    /// is no such disk. The caller holds the disk's lock.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] if another host was faster.
    pub fn take_unowned(&self, cid: &DiskCid) -> Result<bool> {
        let names = self.own_names()?;
        for dir in self.disk_dirs(cid)? {
            match dir.owner {
                Owner::None => {
                    // A file that cannot be used keeps its name.
                    if let Err(error) = dir.record(NO_OWNER, cid) {
                        let is_there = beneath::entry_exists(&dir.dir.join(NO_OWNER))?;
                        return Err(if is_there { error } else { just_taken(cid) });
                    }
                    if !dir.rename(NO_OWNER, &names.moving)? {
                        return Err(just_taken(cid));
                    }
                }
                Owner::Moving => {}
                Owner::Unrecorded | Owner::ThisHost | Owner::OtherHost => continue,
            }
            self.write(&dir.record(&names.moving, cid)?)?;
            return dir.rename(&names.moving, &names.owned);
        }
        Ok(false)
    }

    /// Takes ownership of a disk from any owner, which is gone for good. `check_image` may refuse
    /// the disk's image; it gets the image's path. The caller holds the disk's lock.
    ///
    /// # Errors
    /// [`ErrorKind::DiskNotFound`]; [`ErrorKind::Corrupt`] if the owner file or the images do not
    /// define the disk; those of `check_image`.
    pub fn take_from_lost_host(
        &self,
        cid: &DiskCid,
        check_image: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        let names = self.own_names()?;
        let dirs = self.disk_dirs(cid)?;
        let Some(dir) = dirs.first() else {
            let pools: Vec<_> = self.pools().shared().map(|pool| format!("'{pool}'")).collect();
            let searched = match pools.as_slice() {
                [] => "this host has no shared pool".to_owned(),
                pools => format!("this host has [{}]", pools.join(", ")),
            };
            let message = format!("no shared pool has disk '{cid}'; {searched}");
            return Err(Error::new(ErrorKind::DiskNotFound, message)
                .hint("check 'pools' in the configuration of this host"));
        };
        let undefined = |why: &str| {
            let message = format!("cannot take disk '{cid}': '{}' {why}", dir.dir.display());
            Error::new(ErrorKind::Corrupt, message).hint(
                "restore the disk's record from a backup of the other host into this state \
                 directory",
            )
        };
        let file = dir.owner_file.as_ref().ok_or_else(|| {
            undefined("has no owner file 'host-…', which would hold the disk's record")
        })?;
        let record = dir.record(file, cid)?;
        let mut images = beneath::names(&dir.dir)?;
        images.retain(|name| !is_owner_file(name) && !name.starts_with(atomic::NEW));
        if dirs.len() > 1 || images != [record.image()] {
            let (found, expected) = (images.join(", "), record.image());
            return Err(undefined(&format!(
                "has the images [{found}], and {} shared pools have the disk; expected '{expected}' in \
                 one pool",
                dirs.len()
            )));
        }
        check_image(&dir.dir.join(record.image()))?;
        // An old record of this host must not count for the disk once this host owns it.
        self.remove_record::<DiskRecord>(cid)?;
        if *file != names.moving && !dir.rename(file, &names.moving)? {
            return Err(just_taken(cid));
        }
        self.write(&record)?;
        dir.rename(&names.moving, &names.owned).map(drop)
    }

    /// The disks that this host takes or releases, in all shared pools that can be read.
    pub fn moving_disks(&self) -> Result<Vec<DiskCid>> {
        let Some(names) = self.known_names()? else { return Ok(Vec::new()) };
        let mut disks = Vec::new();
        for pool in self.pools().shared() {
            let Ok(dir) = self.pools().dir(pool) else { continue };
            let cids =
                atomic::names(dir)?.into_iter().filter_map(|name| DiskCid::parse(&name).ok());
            // A directory that cannot be used belongs to no call.
            let is_moving =
                |cid: &DiskCid| beneath::entry_exists(&dir.join(cid).join(&names.moving));
            disks.extend(cids.filter(|cid| is_moving(cid).unwrap_or(false)));
        }
        Ok(disks)
    }
}

fn just_taken(disk: &DiskCid) -> Error {
    Error::new(ErrorKind::Conflict, format!("another host has just taken disk '{disk}'"))
        .hint("repeat the task in BOSH, or use the disk on that host")
}
