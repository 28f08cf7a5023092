//! The locks of a state directory: `locks/<rank>.<name>`, where most names are cids.

use std::path::PathBuf;
use std::time::Instant;

use super::lock::{Guard, Rank, ShortLock, TryLock, last_holder};
use super::{Store, atomic};
use crate::cid::{Cid, DiskCid, SnapshotCid, StemcellCid, VmCid};
use crate::error::Result;

impl Store {
    /// Takes the lock of one object. Waits for its holder until `deadline`.
    pub fn lock(
        &self,
        rank: Rank,
        name: impl std::fmt::Display,
        deadline: Instant,
    ) -> Result<Guard> {
        Guard::acquire(self.lock_path(rank, name), rank, deadline)
    }

    /// As [`Self::lock`], for a lock whose file goes when it is released.
    pub fn short_lock(
        &self,
        rank: Rank,
        name: impl std::fmt::Display,
        deadline: Instant,
    ) -> Result<ShortLock> {
        self.lock(rank, name, deadline).map(Guard::into_short_lock)
    }

    /// Takes the lock shared if it is free; `None` if another process holds it. Writes nothing.
    ///
    /// # Errors
    /// As [`TryLock::at`].
    pub fn try_lock(&self, rank: Rank, name: impl std::fmt::Display) -> Result<Option<TryLock>> {
        TryLock::at(&self.lock_path(rank, name))
    }

    /// Whether an object's lock file exists, held or not. A removal of the object removes it last.
    pub fn has_lock(&self, rank: Rank, name: impl std::fmt::Display) -> bool {
        self.lock_path(rank, name).exists()
    }

    /// Rank and name of every lock file. Other names in the directory are left out.
    pub fn locks(&self) -> Result<Vec<(Rank, String)>> {
        let lock = |name: String| {
            let (rank, name) = name.split_once('.')?;
            Some((Rank::ALL.into_iter().find(|known| known.as_str() == rank)?, name.to_owned()))
        };
        Ok(atomic::names(&self.state_dir().join("locks"))?.into_iter().filter_map(lock).collect())
    }

    /// Whether the object exists that the lock protects. `false` for ranks without objects.
    pub fn lock_has_object(&self, rank: Rank, name: &str) -> bool {
        let prefix = match rank {
            Rank::Stemcell => StemcellCid::PREFIX,
            Rank::Disk | Rank::Metadata => DiskCid::PREFIX,
            Rank::Vm => VmCid::PREFIX,
            Rank::Snapshot => SnapshotCid::PREFIX,
            Rank::Memory | Rank::Boot | Rank::Network | Rank::Space | Rank::Reservations => {
                return false;
            }
        };
        atomic::entry_exists(&self.state_dir().join(format!("{prefix}s")).join(name))
    }

    /// The pid of the lock's current or last holder.
    pub fn last_holder(&self, rank: Rank, name: impl std::fmt::Display) -> Option<i32> {
        last_holder(&self.lock_path(rank, name))
    }

    /// The file of a lock. It may not exist.
    pub fn lock_path(&self, rank: Rank, name: impl std::fmt::Display) -> PathBuf {
        self.state_dir().join("locks").join(format!("{}.{name}", rank.as_str()))
    }
}
