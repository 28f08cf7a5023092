//! What this host reports to the scheduler of a group: its capacity, and which objects it has.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::usage;
use crate::cid::{Cid, DiskCid};
use crate::cpi::context::Context;
use crate::cpi::creation::acknowledgement;
use crate::cpi::presence;
use crate::error::{Error, ErrorKind, Result};
use crate::host::probe;
use crate::store::{Phase, VmRecord};
use crate::supervisor;
use crate::units::Bytes;

/// What the scheduler asks each host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostQuery {
    /// Cids of objects that may be on the host.
    #[serde(default)]
    pub cids: Vec<String>,
    /// Addresses of a new VM.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
    /// Uuid of the Director that calls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub director: Option<String>,
    /// The group of a new VM: its anti-affinity tag or instance group. Its VMs go to different
    /// hosts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spread: Option<String>,
}

/// What a host has. Fields that an older version does not send have their defaults.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HostReport {
    /// Its version of this program.
    pub version: String,
    /// The accelerator of its VMs, `kvm` or `tcg`; else why there is none.
    pub accelerator: String,
    /// How many CPUs it has.
    pub cpus: usize,
    /// The largest `ram` that a new VM can have.
    pub memory: Bytes,
    /// The room in the state directory, whose name is empty, and in each pool that can be used.
    pub space: BTreeMap<String, Bytes>,
    /// How many VMs it has.
    pub vms: usize,
    /// How many of them are of the new VM's group.
    #[serde(rename = "alike")]
    pub same_group: usize,
    /// Whether an unacknowledged VM of the Director has one of the addresses. It makes way for the
    /// new VM.
    #[serde(rename = "forgotten")]
    pub unacknowledged: bool,
    /// Which of the objects are on the host.
    pub has: Vec<String>,
    /// Which of the disks have an image that the host reaches in a shared pool, whichever host owns
    /// them.
    pub shared: Vec<String>,
}

/// Reports what this host has.
///
/// # Errors
/// If the state directory cannot be read.
pub fn report(cx: &Context, query: &HostQuery) -> Result<HostReport> {
    let qemu = &cx.config.qemu;
    let accelerator = probe::accelerator(cx.store.run_dir(), &qemu.binary, qemu.accel, None);
    let vms = cx.store.list_readable::<VmRecord>()?;
    let has = presence::present(cx, &query.cids)?;
    let is_reached = |cid: &&String| {
        let disk = DiskCid::parse(cid).ok().filter(|_| cid.starts_with(DiskCid::PREFIX));
        // A pool that does not answer does not reach the disk.
        disk.is_some_and(|disk| cx.store.is_in_shared_pool(&disk).unwrap_or(false))
    };
    let director = query.director.as_deref();
    Ok(HostReport {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        accelerator: accelerator
            .map_or_else(|error| error.report(), |(accel, _)| accel.as_str().to_owned()),
        cpus: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        memory: supervisor::largest_vm(&cx.config, &cx.store)?,
        space: usage::room_by_pool(cx),
        same_group: count_group(&vms, query.spread.as_deref()),
        unacknowledged: has_unacknowledged_vm(cx, &vms, director, &query.addresses)?,
        vms: vms.len(),
        shared: query.cids.iter().filter(is_reached).cloned().collect(),
        has,
    })
}

/// Refuses the VM if this host now has more VMs of its group than when the scheduler chose it:
/// concurrent creates all saw the old count.
///
/// # Errors
/// [`ErrorKind::StalePlacement`].
pub(in crate::cpi) fn ensure_group_not_grown(cx: &Context, vm: &VmRecord) -> Result<()> {
    let Some(expected) = cx.remote.as_ref().and_then(|remote| remote.same_group) else {
        return Ok(());
    };
    let now = count_group(&cx.store.list_readable()?, vm.spread.as_deref());
    if now <= expected {
        return Ok(());
    }
    let message = format!("the host's count of VMs in the new VM's group is {now}, not {expected}");
    Err(Error::new(ErrorKind::StalePlacement, message))
}

/// How many of `vms` are of the group.
fn count_group(vms: &[VmRecord], group: Option<&str>) -> usize {
    let Some(group) = group else { return 0 };
    let is_member =
        |vm: &&VmRecord| vm.phase != Phase::Deleting && vm.spread.as_deref() == Some(group);
    vms.iter().filter(is_member).count()
}

/// Whether one of `vms` has one of the addresses, and its cid never reached the same Director.
/// Nothing is locked: the answer is advice to the scheduler.
fn has_unacknowledged_vm(
    cx: &Context,
    vms: &[VmRecord],
    director: Option<&str>,
    addresses: &[IpAddr],
) -> Result<bool> {
    let Some(director) = director else { return Ok(false) };
    let has_address = |vm: &VmRecord| {
        let rules = vm.nics.iter().filter_map(|nic| nic.rules.as_ref());
        let mut blocks = rules.flat_map(|rules| &rules.addresses);
        blocks.any(|block| addresses.iter().any(|address| block.contains(*address)))
    };
    for vm in vms {
        if vm.director.as_deref() == Some(director)
            && has_address(vm)
            && acknowledgement::is_vm_unacknowledged(cx, vm)?
        {
            return Ok(true);
        }
    }
    Ok(false)
}
