//! Objects: a directory each, with a record and what the record names. Whoever reads here is told what can not be read,
//! and guesses nothing.

use std::path::PathBuf;

use serde::Deserialize;

use super::Store;
use super::atomic::{self, Staged};
use super::layout::SCHEMA;
use super::record::Record;
use crate::cid::{Cid, DiskCid};
use crate::crash;
use crate::error::{Error, ErrorKind, IoContext, Result};

impl Store {
    /// The record of `cid`, or `None` if there is nothing of it.
    ///
    /// # Errors
    /// As [`Self::read`] and [`Self::ensure_mounted`], and [`ErrorKind::Corrupt`] if there is something of it but no record: that
    /// was lost, because a record is written before anything else is made and removed after it.
    pub fn find<R: Record>(&self, cid: &R::Cid) -> Result<Option<R>> {
        if let Some(record) = self.read::<R>(cid)? {
            return Ok(Some(record));
        }
        if !self.has_something::<R>(cid)? {
            return self.ensure_mounted().map(|()| None);
        }
        // It may have been written between the two looks.
        self.read::<R>(cid)?.map(Some).ok_or_else(|| {
            let dir = self.record_dir::<R>(cid);
            Error::new(ErrorKind::Corrupt, format!("'{}' has no record", dir.display())).hint(
                "restore its record from a backup; or move it away, and all it stands for is gone",
            )
        })
    }

    /// Whether there is anything of an object but a record that was being written. A link to nothing is something.
    fn has_something<R: Record>(&self, cid: &R::Cid) -> Result<bool> {
        let dir = self.record_dir::<R>(cid);
        if !atomic::entry_exists(&dir) {
            return Ok(false);
        }
        if !dir.is_dir() || atomic::names(&dir)?.iter().any(|name| !name.starts_with(atomic::NEW)) {
            return Ok(true);
        }
        for pool in self.pools().names() {
            if atomic::entry_exists(&self.pools().dir(pool)?.join(cid)) {
                // A removal takes the images first; giving a disk up leaves them.
                let disk =
                    DiskCid::parse(cid.as_str()).ok().filter(|_| R::Cid::PREFIX == DiskCid::PREFIX);
                return disk.map_or(Ok(true), |disk| self.can_take(&disk).map(|free| !free));
            }
        }
        Ok(false)
    }

    /// The records of one kind that can be read: one that can not must not keep others from working.
    pub fn list_readable<R: Record>(&self) -> Result<Vec<R>> {
        let read = |cid: R::Cid| {
            self.read::<R>(&cid).unwrap_or_else(|error| {
                tracing::warn!(%cid, error = error.report(), "left out");
                None
            })
        };
        Ok(self.list::<R>()?.into_iter().filter_map(read).collect())
    }

    /// What the file says that is the record of `cid`; `None` if there is no such file.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] naming the file if it can not be understood; nothing is guessed.
    pub fn read<R: Record>(&self, cid: &R::Cid) -> Result<Option<R>> {
        let path = self.record_path::<R>(cid);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("read", &path, error)),
        };
        let corrupt = |why: String| {
            Error::new(
                ErrorKind::Corrupt,
                format!("record '{}' can not be used: {why}", path.display()),
            )
            .hint("restore the file from a backup; nothing beside it was touched")
        };
        understood(&text, cid).map(Some).map_err(corrupt)
    }

    /// Writes a record; its directory is made if need be. Durable when it returns.
    pub fn write<R: Record>(&self, record: &R) -> Result<()> {
        self.stage(record)?.commit()
    }

    /// Writes a record but for its taking effect, so that a step which can not be undone is not taken in vain.
    pub fn stage<R: Record>(&self, record: &R) -> Result<Staged> {
        let path = self.record_path::<R>(record.cid());
        atomic::make_dir(path.parent().expect("a record is in a directory"))?;
        atomic::stage_json(&path, record)
    }

    /// Writes a record that says that its object is being removed. On a full filesystem the old one stays and the removal
    /// goes on: it is what makes room.
    pub fn write_deleting<R: Record>(&self, record: &R) -> Result<()> {
        match self.write(record) {
            Err(error) if error.kind() == ErrorKind::NoDiskSpace => {
                tracing::warn!(cid = %record.cid(), error = error.report(), "removing without a note of it");
                Ok(())
            }
            written => written,
        }
    }

    /// Removes the object's images from pools and its directory: everything else first, the record last, so that whoever is
    /// interrupted leaves a record that says what to finish.
    pub fn remove<R: Record>(&self, cid: &R::Cid) -> Result<()> {
        for pool in self.read::<R>(cid)?.iter().flat_map(Record::pools) {
            let pool = self.pools().dir(pool)?;
            atomic::remove_dir(&pool.join(cid))?;
            crash::point!("a {}'s images removed from a pool", R::Cid::PREFIX);
            atomic::sync_dir(pool)?;
        }
        self.remove_record::<R>(cid)
    }

    /// The same without what is in pools.
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

    /// The cids of all objects of one kind, in no order. Names that are no cids are somebody else's and left out.
    pub fn list<R: Record>(&self) -> Result<Vec<R::Cid>> {
        let names = atomic::names(&self.state_dir().join(format!("{}s", R::Cid::KIND)))?;
        if names.is_empty() {
            self.ensure_mounted()?;
        }
        // Beside managed networks are the files of pinned ones; no cid of ours has a dot.
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

/// The record of `cid` in `text`, or why it is none.
pub(super) fn understood<R: Record>(text: &[u8], cid: &R::Cid) -> Result<R, String> {
    // First: the rest of a newer one may look like anything.
    let Schema { schema } = serde_json::from_slice(text).map_err(|e| e.to_string())?;
    if schema > SCHEMA {
        return Err(format!("schema {schema} is newer than {SCHEMA}"));
    }
    let record: R = serde_json::from_slice(text).map_err(|e| e.to_string())?;
    if record.cid() != cid {
        return Err(format!("it is about '{}'", record.cid()));
    }
    Ok(record)
}

/// All that is read of a record that may be of a newer version.
#[derive(Deserialize)]
struct Schema {
    schema: u32,
}
