//! What this host has to offer: for callers who have several hosts, and a VM or a disk to put on one of them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::Cpi;
use crate::cid::{Cid, DiskCid, NetworkCid, SnapshotCid, StemcellCid, VmCid};
use crate::error::{Error, ErrorKind, Result};
use crate::host::probe;
use crate::store::record::NetworkRecord;
use crate::store::{
    DiskRecord, Phase, Rank, Record, SnapshotRecord, StemcellRecord, VmRecord, atomic,
};
use crate::supervisor;
use crate::units::Bytes;

/// What a caller wants to know.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wish {
    /// Things that may be here.
    #[serde(default)]
    pub cids: Vec<String>,
    /// Addresses that a new VM shall have.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
    /// The uuid of the Director that asks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub director: Option<String>,
    /// The word that VMs share which had better not be on one host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spread: Option<String>,
}

/// What a host has. What its version does not say is nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Offer {
    /// Its version of this program.
    pub version: String,
    /// What its VMs run under, `kvm` or `tcg`; else why none can.
    pub accelerator: String,
    /// Its CPUs.
    pub cpus: usize,
    /// The largest `ram` that a new VM could have.
    pub memory: Bytes,
    /// What is free in the state directory (named with an empty word) and in each pool that can be used.
    pub space: BTreeMap<String, Bytes>,
    /// Its VMs.
    pub vms: usize,
    /// Those of them that share the word.
    pub alike: usize,
    /// Whether a VM that the Director was never told of has one of the addresses here. It makes way for the new one.
    pub forgotten: bool,
    /// Which of the things are here.
    pub has: Vec<String>,
    /// The disks among the things whose images this host reaches in a shared pool, whoever has them.
    pub shared: Vec<String>,
}

impl Cpi {
    /// What this host has to offer.
    ///
    /// # Errors
    /// If the state directory can not be read.
    pub fn offer(&self, wish: &Wish) -> Result<Offer> {
        let accelerator = probe::accelerator(
            self.store.run_dir(),
            &self.config.qemu.binary,
            self.config.qemu.accel,
            None,
        );
        let vms = self.store.list_readable::<VmRecord>()?;
        let has = self.found(&wish.cids)?;
        let within_reach = |cid: &&String| {
            let disk = DiskCid::parse(cid).ok().filter(|_| cid.starts_with(DiskCid::PREFIX));
            // Through a pool that can not be looked at it is not reached.
            disk.is_some_and(|disk| self.store.is_in_shared_pool(&disk).unwrap_or(false))
        };
        Ok(Offer {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            accelerator: accelerator
                .map_or_else(|error| error.report(), |(accel, _)| accel.as_str().to_owned()),
            cpus: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            memory: supervisor::largest_vm(&self.config, &self.store)?,
            space: self.free_space(),
            alike: alike(&vms, wish.spread.as_deref()),
            forgotten: self.has_forgotten(&vms, wish.director.as_deref(), &wish.addresses)?,
            vms: vms.len(),
            shared: wish.cids.iter().filter(within_reach).cloned().collect(),
            has,
        })
    }

    /// Whether so few VMs are here that had better not be with the new `vm` as when this host was chosen for it. Creates that
    /// began at the same time were told of as few.
    ///
    /// # Errors
    /// [`ErrorKind::StalePlacement`] if there are more.
    pub(super) fn is_not_crowded(&self, vm: &VmRecord) -> Result<()> {
        let Some(expected) = self.afar.as_ref().and_then(|afar| afar.alike) else { return Ok(()) };
        let now = alike(&self.store.list_readable()?, vm.spread.as_deref());
        if now <= expected {
            return Ok(());
        }
        let message = format!("of its group's VMs this host has {now} now, not {expected}");
        Err(Error::new(ErrorKind::StalePlacement, message))
    }

    /// Which of `cids` are here.
    ///
    /// # Errors
    /// As [`Self::has_of`].
    pub fn found(&self, cids: &[String]) -> Result<Vec<String>> {
        let has = |cid: &String| Ok(self.has_of(cid)?.then(|| cid.clone()));
        cids.iter().filter_map(|cid| has(cid).transpose()).collect()
    }

    /// Whether there is anything of `cid` here, be it only a lock that its removal left; or a disk that is nobody's.
    ///
    /// # Errors
    /// If it can not be told: the state directory is not mounted, or there is no record, and a shared pool that may have the
    /// disk can not be looked at.
    pub fn has_of(&self, cid: &str) -> Result<bool> {
        self.store.ensure_mounted()?;
        Ok(match cid.split('-').next() {
            Some(VmCid::PREFIX) => {
                self.has_record::<VmRecord>(Rank::Vm, cid)
                    || VmCid::parse(cid).is_ok_and(|vm| self.store.vm(&vm).run.exists())
            }
            Some(DiskCid::PREFIX) => {
                return DiskCid::parse(cid).map_or(Ok(false), |disk| self.has_disk_here(&disk));
            }
            Some(SnapshotCid::PREFIX) => self.has_record::<SnapshotRecord>(Rank::Snapshot, cid),
            Some(StemcellCid::PREFIX) => self.has_record::<StemcellRecord>(Rank::Stemcell, cid),
            Some(NetworkCid::PREFIX) => self.has_record::<NetworkRecord>(Rank::Network, cid),
            _ => false,
        })
    }

    fn has_disk_here(&self, cid: &DiskCid) -> Result<bool> {
        if !self.has_record::<DiskRecord>(Rank::Disk, cid.as_str()) {
            return self.store.can_take(cid);
        }
        let record = self.store.read::<DiskRecord>(cid).ok().flatten();
        if record.is_some_and(|disk| self.store.is_no_longer_owned(&disk)) {
            self.store.can_take(cid)
        } else {
            Ok(true)
        }
    }

    fn has_record<R: Record>(&self, rank: Rank, cid: &str) -> bool {
        let there = |cid: R::Cid| {
            atomic::entry_exists(&self.store.record_dir::<R>(&cid))
                || self.store.has_lock(rank, &cid)
        };
        R::Cid::parse(cid).is_ok_and(there)
    }
}

/// How many of `vms` share the word.
fn alike(vms: &[VmRecord], spread: Option<&str>) -> usize {
    let Some(word) = spread else { return 0 };
    vms.iter()
        .filter(|vm| vm.phase != Phase::Deleting && vm.spread.as_deref() == Some(word))
        .count()
}
