//! The owner file of one disk in one shared pool, and the id that names this host in such files.

use std::path::PathBuf;

use crate::cid::{Cid, DiskCid};
use crate::crash;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::store::record::{DiskRecord, Phase};
use crate::store::{Store, atomic, beneath, objects};

/// Prefix of the owner file of a disk that a host owns.
const OWNED: &str = "host-";
/// Prefix of the owner file of a disk that a host takes or releases.
const MOVING: &str = "moving-";
/// Owner file of a disk without an owner.
pub(super) const NO_OWNER: &str = "host-none";
/// Most bytes of an owner file. The record in it has the disk's cloud properties and metadata.
const LARGEST: u64 = 1 << 20;
/// File in the state directory with the id of this host in owner files.
const HOST_ID: &str = "host-id";

/// Owner of a disk, by its owner file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// There is no owner file, so the disk's record decides: the disk is being made, or an old
    /// version made it.
    Unrecorded,
    /// No host.
    None,
    /// This host.
    ThisHost,
    /// This host, which takes or releases the disk.
    Moving,
    /// Another host.
    OtherHost,
}

/// Names of this host's owner files.
pub(super) struct OwnNames {
    pub(super) owned: String,
    pub(super) moving: String,
}

/// A disk's directory in a shared pool, and the owner file it had when it was read.
pub(super) struct DiskDir<'a> {
    pub(super) pool: &'a str,
    pub(super) dir: PathBuf,
    /// Name of the owner file, if there is one.
    pub(super) owner_file: Option<String>,
    pub(super) owner: Owner,
}

impl<'a> DiskDir<'a> {
    /// Reads the directory.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for more than one owner file.
    pub(super) fn read(store: &Store, pool: &'a str, dir: PathBuf) -> Result<Self> {
        let mut files = beneath::names(&dir)?;
        files.retain(|name| is_owner_file(name));
        if files.len() > 1 {
            files.sort();
            let message =
                format!("'{}' has more than one owner file: {}", dir.display(), files.join(", "));
            return Err(Error::new(ErrorKind::Corrupt, message)
                .hint("keep the file of the host that shall own the disk, and remove the others"));
        }
        let owner_file = files.pop();
        let owner = match (&owner_file, store.known_names()?) {
            (None, _) => Owner::Unrecorded,
            (Some(file), _) if file == NO_OWNER => Owner::None,
            (Some(file), Some(own)) if *file == own.owned => Owner::ThisHost,
            (Some(file), Some(own)) if *file == own.moving => Owner::Moving,
            (Some(_), _) => Owner::OtherHost,
        };
        Ok(Self { pool, dir, owner_file, owner })
    }

    /// Whether the disk's current image is in this pool.
    pub(super) fn has_current_image(&self, disk: &DiskRecord) -> bool {
        disk.pool.as_deref() == Some(self.pool)
    }

    /// The directory and its owner file, for messages.
    pub(super) fn describe(&self) -> String {
        let file = self.owner_file.as_deref().unwrap_or_default();
        format!("'{}' has '{file}'", self.dir.display())
    }

    /// Renames the owner file. `false`: there is none called `from`, because another host was
    /// faster.
    pub(super) fn rename(&self, from: &str, to: &str) -> Result<bool> {
        // An NFS client may repeat a rename whose reply was lost. The repetition finds no source.
        if !beneath::rename(&self.dir, from, to)? && !beneath::entry_exists(&self.dir.join(to))? {
            return Ok(false);
        }
        beneath::sync_dir(&self.dir)?;
        crash::point!("owner file renamed");
        Ok(true)
    }

    /// The disk's record in the owner file `file`, as a record of this host.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for a file without a valid record of `cid`.
    pub(super) fn record(&self, file: &str, cid: &DiskCid) -> Result<DiskRecord> {
        let path = self.dir.join(file);
        let text = beneath::read(&path, LARGEST)?;
        let record: DiskRecord =
            objects::parse(&text, cid).map_err(|why| objects::corrupt(&path, &why))?;
        // Owner files are written for idle disks only: no VM has the disk, and no call is
        // interrupted.
        Ok(DiskRecord {
            vm: None,
            inactive_image: None,
            resize_target: None,
            phase: Phase::Ready,
            pool: Some(self.pool.to_owned()),
            ..record
        })
    }
}

impl Store {
    /// Names of this host's owner files; `None` if it has no id yet.
    pub(super) fn known_names(&self) -> Result<Option<OwnNames>> {
        let path = self.host_id_file();
        let text = match std::fs::read_to_string(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            text => text.at("read", &path)?,
        };
        let id = text.trim();
        if DiskCid::parse_generated(&format!("{}-{id}", DiskCid::PREFIX)).is_ok() {
            return Ok(Some(OwnNames {
                owned: format!("{OWNED}{id}"),
                moving: format!("{MOVING}{id}"),
            }));
        }
        let message = format!("'{}' does not contain a host id", path.display());
        Err(Error::new(ErrorKind::Corrupt, message).hint(
            "write into it the part after 'host-' of the file name 'host-…' beside this host's \
             disks in shared pools",
        ))
    }

    /// Names of this host's owner files. Gives the host an id if it has none.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if the id is missing but disks of this host have owner files.
    pub(super) fn own_names(&self) -> Result<OwnNames> {
        loop {
            if let Some(names) = self.known_names()? {
                return Ok(names);
            }
            self.list_readable::<DiskRecord>()?
                .iter()
                .try_for_each(|disk| self.ensure_owned(disk))?;
            let random = DiskCid::random();
            let (_, id) = random.as_str().split_once('-').expect("a cid has a dash");
            atomic::write_once(&self.host_id_file(), format!("{id}\n").as_bytes())?;
        }
    }

    pub(super) fn host_id_file(&self) -> PathBuf {
        self.state_dir().join(HOST_ID)
    }
}

/// Whether a file beside a disk's images is an owner file.
pub(super) fn is_owner_file(name: &str) -> bool {
    name.starts_with(OWNED) || name.starts_with(MOVING)
}
