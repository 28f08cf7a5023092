//! What nobody was told of: its create was killed, the latest when it was whole, before its answer was taken.
//!
//! The file `untold` in an object's directory is there from before the object is ready until after the answer was taken, or
//! until a call names the object. It is as durable as the record that says `ready`; its removal is not. What has it, and
//! whose create is dead, may have been told of all the same, so it is not removed for that alone; `audit` tells of it. But
//! a Director that has the same address given to another VM, or the same range to another network, does not know what has
//! it. Without this, one killed call would keep a static address until an operator looked into it, and a power cut in the
//! middle of a deployment would keep many.

use std::fs::File;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::Cpi;
use super::cloud_properties::VmCloudProperties;
use super::networks::Networks;
use super::placement::Placed;
use crate::cid::{Cid, VmCid};
use crate::crash;
use crate::error::{Error, ErrorKind, Result};
use crate::store::reservations::Reservation;
use crate::store::{Phase, Rank, Record, VmRecord, atomic};
use crate::sys::pidlock;

/// How long a launch whose call was killed may take to be undone. Also what breaks the circle of two creates that want what
/// the other has.
const UNDONE: Duration = Duration::from_secs(30);

impl Cpi {
    /// Claims again after a claim was refused with `refusal`, if what it wants is held by VMs that nobody knows.
    pub(super) fn claim_of_forgotten(
        &self,
        refusal: Error,
        vm: &VmCid,
        placed: &mut [Placed],
        networks: &mut Networks,
        properties: &VmCloudProperties,
        deadline: Instant,
    ) -> Result<()> {
        if !self.clear_forgotten(placed, properties, deadline)? {
            return Err(refusal);
        }
        self.store.release_reservations(vm)?;
        self.claim(vm, placed, networks, properties, deadline)
    }

    /// Removes the forgotten VMs that hold an address or a port that is wanted now. Whether there were any.
    fn clear_forgotten(
        &self,
        wanted: &[Placed],
        properties: &VmCloudProperties,
        deadline: Instant,
    ) -> Result<bool> {
        let mut cleared = false;
        for holder in self.holders(wanted, properties, deadline)? {
            cleared |= self.clear_if_forgotten(&holder, deadline)?;
        }
        Ok(cleared)
    }

    fn holders(
        &self,
        wanted: &[Placed],
        properties: &VmCloudProperties,
        deadline: Instant,
    ) -> Result<Vec<VmCid>> {
        let addresses = wanted
            .iter()
            .filter_map(|Placed { nic, .. }| Some((nic.tap()?.1, nic.rules.as_ref()?)));
        let addresses = addresses.flat_map(|(segment, rules)| {
            rules.addresses.iter().map(|a| Reservation::block(segment, *a))
        });
        let ports = properties.ports.iter().flat_map(|forward| {
            let range = forward.host.first..=forward.host.last;
            range.map(|port| Reservation::Port {
                protocol: forward.protocol,
                port,
                address: forward.address,
            })
        });
        let mut holders = self.store.with_reservations(deadline, |claims| {
            let holders = addresses.chain(ports).map(|claim| claims.holder(&claim));
            holders.filter_map(Result::transpose).collect::<Result<Vec<_>>>()
        })?;
        holders.dedup();
        Ok(holders)
    }

    fn clear_if_forgotten(&self, cid: &VmCid, deadline: Instant) -> Result<bool> {
        let phase = self.store.read::<VmRecord>(cid)?.map(|vm| vm.phase);
        // A launch whose call was killed is undone by itself, in a moment. Who works on a VM that is ready knows it.
        let patience = if phase == Some(Phase::Ready) { Duration::ZERO } else { UNDONE };
        let lock = match self.store.lock(Rank::Vm, cid, deadline.min(Instant::now() + patience)) {
            Err(error) if error.kind() == ErrorKind::Timeout => return Ok(false),
            lock => lock?,
        };
        match self.store.read::<VmRecord>(cid)? {
            Some(vm) if self.is_forgotten(&vm)? => {
                tracing::warn!(%cid, "removing a VM that its Director was never told of, and whose address it gives away again");
                self.destroy(&vm, lock, deadline).map(|()| true)
            }
            Some(vm) if vm.phase == Phase::Ready => Ok(false),
            _ => {
                drop(lock);
                self.clear_leftover(cid.as_str(), deadline).map(|()| true)
            }
        }
    }

    fn is_forgotten(&self, vm: &VmRecord) -> Result<bool> {
        let ours = vm.director.is_some() && vm.director == self.director;
        Ok(ours && self.is_untold_vm(vm)?)
    }

    /// Whether one of `vms` has one of these addresses that `director` was never told of. Nothing is locked or changed: who
    /// wants to know may put its VM elsewhere all the same.
    pub(super) fn has_forgotten(
        &self,
        vms: &[VmRecord],
        director: Option<&str>,
        addresses: &[IpAddr],
    ) -> Result<bool> {
        let wanted = |vm: &VmRecord| {
            let mut blocks = vm
                .nics
                .iter()
                .filter_map(|nic| nic.rules.as_ref())
                .flat_map(|rules| &rules.addresses);
            blocks.any(|block| addresses.iter().any(|address| block.contains(*address)))
        };
        for vm in vms
            .iter()
            .filter(|vm| director.is_some() && vm.director.as_deref() == director && wanted(vm))
        {
            if self.is_untold_vm(vm)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether nobody was told of the VM, as far as that can be known, and nobody will be.
    pub(super) fn is_untold_vm(&self, vm: &VmRecord) -> Result<bool> {
        let named = !vm.metadata.is_empty() || !vm.disks.is_empty();
        Ok(vm.phase == Phase::Ready && !named && self.is_untold::<VmRecord>(&vm.cid)?)
    }

    /// The same of anything that is ready.
    pub(super) fn is_untold<R: Record>(&self, cid: &R::Cid) -> Result<bool> {
        let untold = self.untold_note::<R>(cid);
        // The process that made it may be about to answer.
        Ok(untold.exists() && pidlock::holder(&untold)?.is_none() && untold.exists())
    }

    fn untold_note<R: Record>(&self, cid: &R::Cid) -> PathBuf {
        self.store.record_dir::<R>(cid).join("untold")
    }

    /// Notes, before an object is ready, that nobody was told of it yet. The note is locked as long as this process lives.
    pub(super) fn untold<R: Record>(&self, cid: &R::Cid) -> Result<()> {
        let path = self.untold_note::<R>(cid);
        let lock = pidlock::lock_self(&path)?;
        crash::point!("untold noted");
        // A call makes at most one thing.
        let _ = self.untold.set(Untold { path, _lock: lock });
        Ok(())
    }

    /// The object is named by somebody who so knows it.
    pub(super) fn is_told<R: Record>(&self, cid: &R::Cid) {
        told(&self.untold_note::<R>(cid));
    }
}

/// The note of what this process made.
pub(super) struct Untold {
    path: PathBuf,
    _lock: File,
}

impl Untold {
    /// The answer was taken.
    pub(super) fn is_told(&self) {
        told(&self.path);
    }
}

fn told(note: &Path) {
    if let Err(error) = atomic::remove_file(note) {
        tracing::warn!(error = error.report(), "it looks as if nobody was told of this");
    }
}
