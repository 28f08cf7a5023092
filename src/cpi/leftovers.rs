//! Creates that were cut short by SIGKILL or a power cut: nobody was told their cid, so nobody can ask for their removal.
//!
//! While a create works there is a file `pending/<cid>`, made after the object's lock was taken and removed when its
//! record is ready. The next create finds those whose lock is free, and finishes the removal. In the usual case that
//! costs one look at an empty directory, however many objects there are.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::Cpi;
use crate::cid::{Cid, DiskCid, NetworkCid, StemcellCid, VmCid};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::host::uids;
use crate::store::record::NetworkRecord;
use crate::store::{DiskRecord, Phase, Rank, Record, StemcellRecord, VmRecord, atomic};

/// How long removing one leftover may hold up the create that found it.
const PATIENCE: Duration = Duration::from_secs(30);

impl Cpi {
    fn pending(&self, cid: &impl Cid) -> PathBuf {
        self.store.pending_dir().join(cid)
    }

    /// Notes that `cid` is being made. The caller holds its lock.
    pub(super) fn begin(&self, cid: &impl Cid) -> Result<()> {
        let path = self.pending(cid);
        std::fs::write(&path, "").at("make", &path)
    }

    /// Notes that `cid` is made, or that nothing of it is left.
    pub(super) fn settled(&self, cid: &impl Cid) -> Result<()> {
        atomic::remove_file(&self.pending(cid))
    }

    /// Removes what creates left that were cut short. What can not be removed now is left for the next create: it must not
    /// fail this one.
    pub(super) fn clear_leftovers(&self) {
        let names = self.store.pending_dir().read_dir().into_iter().flatten().flatten();
        for name in names.filter_map(|entry| entry.file_name().into_string().ok()) {
            match self.clear_leftover(&name) {
                Ok(()) => {}
                // Its create still works.
                Err(error) if error.kind() == ErrorKind::Timeout => {}
                Err(error) => tracing::warn!(cid = name, error = error.report(), "a leftover can not be removed"),
            }
        }
    }

    fn clear_leftover(&self, name: &str) -> Result<()> {
        match name.split('-').next() {
            Some(VmCid::PREFIX) => self.clear_vm(&cid(name)?),
            Some(DiskCid::PREFIX) => self.clear_files::<DiskRecord>(&cid(name)?, Rank::Disk),
            Some(StemcellCid::PREFIX) => self.clear_files::<StemcellRecord>(&cid(name)?, Rank::Stemcell),
            Some(NetworkCid::PREFIX) => self.clear_network(&cid(name)?),
            _ => Err(Error::new(ErrorKind::Corrupt, "it is none of ours")),
        }
    }

    fn clear_vm(&self, cid: &VmCid) -> Result<()> {
        let lock = self.store.lock(Rank::Vm, cid, Instant::now())?;
        let deadline = Instant::now() + PATIENCE;
        match self.store.read::<VmRecord>(cid)? {
            Some(vm) if vm.phase == Phase::Creating => {
                tracing::warn!(%cid, "removing a VM whose create_vm was cut short");
                self.destroy(&vm, lock, deadline)?;
            }
            Some(_) => {}
            None => {
                self.store.release_claims(cid)?;
                if let Some(uid) = uids::find(self.store.state_dir(), cid)? {
                    uids::release(self.store.state_dir(), cid, uid)?;
                }
                lock.retire()?;
            }
        }
        self.settled(cid)
    }

    fn clear_network(&self, cid: &NetworkCid) -> Result<()> {
        let lock = self.store.lock(Rank::Network, super::managed_networks::bridge(cid), Instant::now())?;
        if self.store.read::<NetworkRecord>(cid)?.is_none_or(|network| network.phase == Phase::Creating) {
            tracing::warn!(%cid, "removing a network whose create_network was cut short");
            self.unmake_network(cid)?;
        }
        lock.retire()?;
        self.settled(cid)
    }

    /// For what is nothing but files.
    fn clear_files<R: Record>(&self, cid: &R::Cid, rank: Rank) -> Result<()> {
        let lock = self.store.lock(rank, cid, Instant::now())?;
        if self.store.read::<R>(cid)?.is_none_or(|record| record.phase() == Phase::Creating) {
            tracing::warn!(%cid, "removing what a create that was cut short left");
            self.store.remove::<R>(cid)?;
            lock.retire()?;
        }
        self.settled(cid)
    }
}

fn cid<C: Cid>(name: &str) -> Result<C> {
    C::parse(name).map_err(|e| Error::new(ErrorKind::Corrupt, "it is no cid").because(e))
}
