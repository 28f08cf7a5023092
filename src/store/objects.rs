//! Objects: stemcells, VMs, disks, snapshots and managed networks. Each is a directory with a
//! record and the files that the record names.
//!
//! A record that cannot be read is an error. Nothing replaces it by a guess.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::Store;
use super::atomic::{self, Staged};
use super::layout::SCHEMA;
use super::record::Record;
use crate::cid::{Cid, DiskCid};
use crate::crash;
use crate::error::{Error, ErrorKind, IoContext, Result};

impl Store {
    /// The record of `cid`; `None` if the object does not exist.
    ///
    /// # Errors
    /// As [`Self::read`] and [`Self::ensure_mounted`]. [`ErrorKind::Corrupt`] if the object has
    /// files but no record: calls write the record first and remove it last, so it was lost.
    pub fn find<R: Record>(&self, cid: &R::Cid) -> Result<Option<R>> {
        if let Some(record) = self.read::<R>(cid)? {
            return Ok(Some(record));
        }
        if !self.has_files::<R>(cid)? {
            return self.ensure_mounted().map(|()| None);
        }
        // A create may have written it after the first read.
        self.read::<R>(cid)?.map(Some).ok_or_else(|| {
            let dir = self.record_dir::<R>(cid);
            Error::new(ErrorKind::Corrupt, format!("'{}' has no record", dir.display())).hint(
                "restore its record from a backup; or move the directory away, and the object no \
                 longer exists",
            )
        })
    }

    /// Whether the object has any file except a record that is being written. A dangling symlink
    /// counts as a file.
    fn has_files<R: Record>(&self, cid: &R::Cid) -> Result<bool> {
        let dir = self.record_dir::<R>(cid);
        if !atomic::entry_exists(&dir) {
            return Ok(false);
        }
        if !dir.is_dir() || atomic::names(&dir)?.iter().any(|name| !name.starts_with(atomic::NEW)) {
            return Ok(true);
        }
        for pool in self.pools().names() {
            if atomic::entry_exists(&self.pools().dir(pool)?.join(cid)) {
                // A removal removes the images first. A release leaves them to the next owner.
                let disk =
                    DiskCid::parse(cid.as_str()).ok().filter(|_| R::Cid::PREFIX == DiskCid::PREFIX);
                return disk.map_or(Ok(true), |disk| self.can_take(&disk).map(|free| !free));
            }
        }
        Ok(false)
    }

    /// The records of one kind that can be read. Others are left out with a warning: one damaged
    /// record must not stop calls about other objects.
    pub fn list_readable<R: Record>(&self) -> Result<Vec<R>> {
        let read = |cid: R::Cid| {
            self.read::<R>(&cid).unwrap_or_else(|error| {
                tracing::warn!(%cid, error = error.report(), "record left out");
                None
            })
        };
        Ok(self.list::<R>()?.into_iter().filter_map(read).collect())
    }

    /// The record of `cid`; `None` if there is no record file.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] naming the file if it is damaged or of a newer version.
    pub fn read<R: Record>(&self, cid: &R::Cid) -> Result<Option<R>> {
        let path = self.record_path::<R>(cid);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("read", &path, error)),
        };
        parse(&text, cid).map(Some).map_err(|why| corrupt(&path, &why))
    }

    /// Writes a record, and makes its directory if it is missing. Durable when it returns.
    pub fn write<R: Record>(&self, record: &R) -> Result<()> {
        self.stage(record)?.commit()
    }

    /// Writes a record to the disk without replacing the old one. After that, a full filesystem
    /// cannot stop [`Staged::commit`], so the caller can take a step that it cannot undo in
    /// between.
    pub fn stage<R: Record>(&self, record: &R) -> Result<Staged> {
        let path = self.record_path::<R>(record.cid());
        atomic::make_dir(path.parent().expect("a record is in a directory"))?;
        atomic::stage_json(&path, record)
    }

    /// Writes a record in phase `deleting`. If the filesystem is full, the old record stays and the
    /// removal goes on, because it frees space.
    pub fn write_deleting<R: Record>(&self, record: &R) -> Result<()> {
        match self.write(record) {
            Err(error) if error.kind() == ErrorKind::NoDiskSpace => {
                let error = error.report();
                tracing::warn!(cid = %record.cid(), error, "removing without a record of it");
                Ok(())
            }
            written => written,
        }
    }

    /// Removes the object's images in pools, then its directory with the record last. After an
    /// interruption, the record still names what a later call must remove.
    pub fn remove<R: Record>(&self, cid: &R::Cid) -> Result<()> {
        for pool in self.read::<R>(cid)?.iter().flat_map(Record::pools) {
            let pool = self.pools().dir(pool)?;
            atomic::remove_dir(&pool.join(cid))?;
            crash::point!("a {}'s images removed from a pool", R::Cid::PREFIX);
            atomic::sync_dir(pool)?;
        }
        self.remove_record::<R>(cid)
    }

    /// As [`Self::remove`], without the images in pools.
    pub fn remove_record<R: Record>(&self, cid: &R::Cid) -> Result<()> {
        let record = self.record_path::<R>(cid);
        let dir = record.parent().expect("a record is in a directory");
        let entries = match dir.read_dir() {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            entries => entries.at("list", dir)?,
        };
        for entry in entries {
            let path = entry.at("list", dir)?.path();
            if path != record {
                atomic::remove_file(&path)?;
                crash::point!("a {}'s file removed", R::Cid::PREFIX);
            }
        }
        atomic::remove_file(&record)?;
        crash::point!("a {}'s record removed", R::Cid::PREFIX);
        atomic::remove_dir(dir)?;
        crash::point!("a {}'s directory removed", R::Cid::PREFIX);
        atomic::sync_dir(dir.parent().expect("an object's directory has a parent"))
    }

    /// The cids of all objects of one kind, in no order. Other names in the directory are left out.
    pub fn list<R: Record>(&self) -> Result<Vec<R::Cid>> {
        let names = atomic::names(&self.state_dir().join(format!("{}s", R::Cid::KIND)))?;
        if names.is_empty() {
            self.ensure_mounted()?;
        }
        // `networks/` also has the pins `<bridge>.json`. A cid that this CPI makes has no dot.
        let names = names.iter().filter(|name| !name.ends_with(".json"));
        Ok(names.filter_map(|name| R::Cid::parse(name).ok()).collect())
    }

    /// The directory of an object's record.
    pub fn record_dir<R: Record>(&self, cid: &R::Cid) -> PathBuf {
        self.dir_of(R::Cid::KIND, cid)
    }

    fn record_path<R: Record>(&self, cid: &R::Cid) -> PathBuf {
        self.record_dir::<R>(cid).join(format!("{}.json", R::Cid::KIND))
    }
}

/// The record of `cid` in `text`, or the reason why the text is not that record.
pub(super) fn parse<R: Record>(text: &[u8], cid: &R::Cid) -> Result<R, String> {
    // Checked first: the other fields of a newer record may have any shape.
    let Schema { schema } = serde_json::from_slice(text).map_err(|e| e.to_string())?;
    if schema > SCHEMA {
        return Err(format!("schema {schema} is newer than {SCHEMA}"));
    }
    let record: R = serde_json::from_slice(text).map_err(|e| e.to_string())?;
    if record.cid() != cid {
        return Err(format!("it is the record of '{}'", record.cid()));
    }
    Ok(record)
}

/// A record file that [`parse`] refuses.
pub(super) fn corrupt(path: &Path, why: &str) -> Error {
    let message = format!("record '{}' cannot be used: {why}", path.display());
    Error::new(ErrorKind::Corrupt, message)
        .hint("restore the file from a backup; the files beside it are unchanged")
}

/// The only field that every version of a record has in common.
#[derive(Deserialize)]
struct Schema {
    schema: u32,
}
