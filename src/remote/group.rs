//! A group of hosts that execute one Director's calls.
//!
//! ```text
//!   the cid bears the trace of a host ──► that host executes the call, if it has the object
//!     │ it has not: the object was moved, or made otherwise
//!     ▼
//!   all hosts are asked at the same time who has the object ──► that host executes the call
//!     │ no host has it
//!     ▼
//!   all hosts answered? ── no ──► an error: the silent host may have it
//!     │ yes
//!     ▼
//!   the first host answers: the object does not exist
//! ```
//!
//! The client stores nothing between calls. A new VM goes to the host that the scheduler chooses, a
//! new disk to the host of its VM, a stemcell to all hosts under one cid.

use std::net::IpAddr;

use serde_json::{Map, Value};

use super::client::Client;
use super::forwarded_call::{Answered, ForwardedCall, Outcome, carried};
use super::members::{Member, Members, query_deadline};
use super::replicate;
use super::scheduler::{self, Candidate, Need};
use crate::cid::{Cid, DiskCid, VmCid};
use crate::config::Config;
use crate::cpi::Cpi;
use crate::cpi::capacity::report::HostQuery;
use crate::cpi::context::Context;
use crate::cpi::contract::networks::Addressing;
use crate::cpi::contract::{CreateDisk, CreateVm};
use crate::cpi::properties::{self, DiskCloudProperties, VmCloudProperties};
use crate::error::{Error, ErrorKind, Result};
use crate::rpc::call::Call;
use crate::rpc::request::Request;
use crate::rpc::response_writer::Delivery;
use crate::rpc::{Executed, Executor, LocalExecutor};

/// How often the scheduler chooses a host while concurrent calls put VMs of the same group there.
/// The last time it accepts any number of them.
const MAX_CHOICES: usize = 10;

/// Forwards calls to the hosts of a group.
pub struct Group {
    members: Members,
    config: Config,
    /// Keys of the configuration that go into each request's context.
    context: Map<String, Value>,
}

impl Group {
    /// Forwards calls to the hosts of `config`, with `context` added to each request's context.
    pub fn new(config: Config, context: Map<String, Value>) -> Self {
        Self { members: Members::new(&config), config, context }
    }

    fn outcome(&self, call: &ForwardedCall<'_>) -> Outcome {
        match call.call {
            Call::CreateVm(vm) => self.create_vm(call, vm),
            Call::CreateDisk(disk) => self.create_disk(call, disk),
            Call::CreateStemcell(_) => replicate::create(&self.members, call),
            Call::DeleteStemcell(_) => {
                // If a host does not answer, all others keep the stemcell: it may still be wanted.
                let deadline = query_deadline(call);
                self.members
                    .query_all(|client| client.find(&[], deadline))
                    .into_iter()
                    .collect::<Result<Vec<_>>>()?;
                replicate::delete(&self.members, call)
            }
            Call::CreateNetwork(_) => {
                Err(Error::new(ErrorKind::NotSupported, "a group of hosts has no managed networks")
                    .hint("give the subnet a network that each host has in its configuration"))
            }
            Call::AttachDisk(vm, disk) => self.attach_disk(call, vm, disk),
            Call::CalculateVmCloudProperties(_) => unreachable!("the client answers it itself"),
            other => self.send_by_cid(call, other.object().expect("only creates have none")),
        }
    }

    /// Has the host that has `cid` execute the call.
    fn send_by_cid(&self, call: &ForwardedCall<'_>, cid: &str) -> Outcome {
        for member in self.members.named_in(cid) {
            if let Some(answered) = send_if_present(call, member, &[cid])? {
                return Ok(answered.into_outcome());
            }
        }
        let member = self.members.find(call, &[cid])?.remove(0);
        Ok(send(call, member.unwrap_or(self.any_member()))?.into_outcome())
    }

    /// Returns the host that answers for an object that no host has.
    fn any_member(&self) -> &Member {
        &self.members.all()[0]
    }

    fn create_vm(&self, call: &ForwardedCall<'_>, vm: &CreateVm) -> Outcome {
        let properties: VmCloudProperties =
            properties::read(&self.config.vm_defaults, &vm.cloud_properties.0)?;
        let need = Need {
            ram: properties.ram,
            pool: properties.pool.unwrap_or_default(),
            stemcell: vm.stemcell.to_string(),
            disks: vm.disks.iter().map(ToString::to_string).collect(),
        };
        let query = HostQuery {
            cids: need.disks.iter().chain([&need.stemcell]).cloned().collect(),
            addresses: manual_addresses(vm),
            director: call.request.context.director().map(str::to_owned),
            spread: vm.env.spread(),
        };
        let mut candidates = self.candidates(call, &query);
        let call = call.with_new_deadline();
        for choice in 1.. {
            let order = scheduler::order(&candidates, &need)?;
            let limits_group = choice < MAX_CHOICES && order.len() > 1;
            if let Some(answered) =
                self.create_on_first(&call, &candidates, &order, limits_group)?
            {
                return Ok(answered.into_outcome());
            }
            candidates = self.candidates(&call, &query);
        }
        unreachable!("the last choice has no limit, so it returns")
    }

    /// Has the first host of `order` that has room create the VM.
    ///
    /// With `limits_group`, a host refuses the VM if it now has more VMs of the group than it
    /// reported. Then returns `None`, and the hosts must be asked again.
    fn create_on_first(
        &self,
        call: &ForwardedCall<'_>,
        candidates: &[Candidate<'_>],
        order: &[usize],
        limits_group: bool,
    ) -> Result<Option<Answered>> {
        for (turn, at) in order.iter().enumerate() {
            let member = &self.members.all()[*at];
            let host = &member.client.name;
            let reported = candidates[*at].report.as_ref().ok().map(|report| report.same_group);
            let same_group = reported.filter(|_| limits_group);
            let answered = send(&call.with_same_group(same_group), member)?;
            if limits_group && answered.reply.crowded {
                tracing::info!(host, "concurrent calls have put VMs of the group on the host");
                return Ok(None);
            }
            if !answered.reply.lacks_room || turn + 1 == order.len() {
                return Ok(Some(answered));
            }
            tracing::info!(host, "concurrent calls have used up the host's room");
        }
        unreachable!("an order is not empty, and its last host returns")
    }

    fn candidates(&self, call: &ForwardedCall<'_>, query: &HostQuery) -> Vec<Candidate<'_>> {
        let deadline = query_deadline(call);
        let reports = self.members.query_all(|client| client.report(query, deadline));
        self.members
            .all()
            .iter()
            .zip(reports)
            .map(|(member, report)| Candidate {
                name: &member.client.name,
                draining: member.draining,
                report: report.map_err(|error| short_reason(&error, &member.client)),
            })
            .collect()
    }

    /// Creates the disk on the host of its VM; without a VM, on the host with the most free space.
    fn create_disk(&self, call: &ForwardedCall<'_>, disk: &CreateDisk) -> Outcome {
        let vm = disk.vm.as_ref().map(|vm| self.members.find_one(call, vm.as_str()));
        if let Some(member) = vm.transpose()?.flatten() {
            return Ok(send(&call.with_new_deadline(), member)?.into_outcome());
        }
        let properties: DiskCloudProperties =
            properties::read(&self.config.disk_defaults, &disk.cloud_properties.0)?;
        let pool = properties.pool.unwrap_or_default();
        let candidates = self.candidates(call, &HostQuery::default());
        let call = call.with_new_deadline();
        let free = |at: usize| candidates[at].report.as_ref().ok()?.space.get(&pool).copied();
        let best = (0..candidates.len())
            .filter(|at| !candidates[*at].draining)
            .filter_map(|at| Some((free(at)?, at)))
            .max_by_key(|(space, at)| (*space, usize::MAX - at));
        match best {
            Some((_, at)) => Ok(send(&call, &self.members.all()[at])?.into_outcome()),
            None => Err(no_host_for_disk(&candidates, &pool)),
        }
    }

    fn attach_disk(&self, call: &ForwardedCall<'_>, vm: &VmCid, disk: &DiskCid) -> Outcome {
        let both = [vm.as_str(), disk.as_str()];
        for member in self.members.named_in(vm.as_str()) {
            if let Some(answered) = send_if_present(call, member, &both)? {
                return Ok(answered.into_outcome());
            }
        }
        match self.members.find(call, &both)?[..] {
            [Some(vm_host), Some(disk_host)] if !std::ptr::eq(vm_host, disk_host) => {
                release_disk(call, disk, disk_host, vm_host)
                    .map_err(|error| error.during(format!("attach it to VM '{vm}'")))?;
                let answered = send_if_present(call, vm_host, &both)?.ok_or_else(|| {
                    let host = &vm_host.client.name;
                    let message =
                        format!("VM '{vm}' or disk '{disk}' is no longer on host '{host}'");
                    Error::new(ErrorKind::Conflict, message).hint("repeat the call")
                })?;
                Ok(answered.into_outcome())
            }
            [Some(vm_host), _] => Ok(send(call, vm_host)?.into_outcome()),
            _ => Ok(send(call, self.any_member())?.into_outcome()),
        }
    }
}

/// Has the host of `member` execute the call. A new object's cid bears the host's trace.
fn send(call: &ForwardedCall<'_>, member: &Member) -> Result<Answered> {
    call.send(&member.client, call.call.choose_cid(Some(&member.client.name)).as_ref())
}

/// As [`send`], if the host has all of `cids`; else returns `None`.
fn send_if_present(
    call: &ForwardedCall<'_>,
    member: &Member,
    cids: &[&str],
) -> Result<Option<Answered>> {
    let undo = call.call.choose_cid(Some(&member.client.name));
    call.send_if_present(&member.client, cids, undo.as_ref())
}

/// Has the host `from` release ownership of the disk, if the host `to` reaches its pool, too.
fn release_disk(
    call: &ForwardedCall<'_>,
    disk: &DiskCid,
    from: &Member,
    to: &Member,
) -> Result<()> {
    let (disk_host, vm_host) = (&from.client.name, &to.client.name);
    let conflict = |reason: String| {
        let message =
            format!("disk '{disk}' is on host '{disk_host}', the VM on '{vm_host}', {reason}");
        Error::new(ErrorKind::Conflict, message)
            .hint("recreate the VM: the new one is placed on the host of its disks")
    };
    let query = HostQuery { cids: vec![disk.to_string()], ..HostQuery::default() };
    let report = to.client.report(&query, query_deadline(call)).map_err(|failed| failed.error)?;
    if report.shared.is_empty() {
        return Err(conflict("which has no shared pool with the disk".to_owned()));
    }
    from.client.release_disk(disk, call.deadline).map_err(|failed| {
        let reason = short_reason(&failed.error, &from.client);
        conflict(format!("and the disk cannot change hosts: {reason}"))
    })
}

/// Returns the addresses that the Director has assigned to the VM.
fn manual_addresses(vm: &CreateVm) -> Vec<IpAddr> {
    let address = |addressing: &Addressing| match addressing {
        Addressing::Manual { address, .. } => Some(address.ip()),
        Addressing::Dynamic { .. } | Addressing::Vip { .. } => None,
    };
    vm.networks.iter().filter_map(|network| address(&network.addressing)).collect()
}

fn no_host_for_disk(candidates: &[Candidate<'_>], pool: &str) -> Error {
    let reason = |host: &Candidate<'_>| match &host.report {
        Err(reason) => format!("{}: {reason}", host.name),
        Ok(_) if host.draining => format!("{}: it is draining", host.name),
        Ok(_) => format!("{}: it has no pool '{pool}'", host.name),
    };
    let reasons: Vec<_> = candidates.iter().map(reason).collect();
    Error::new(ErrorKind::Host, format!("no host can have the disk: {}", reasons.join("; ")))
        .hint("see `bosh-qemu-cpi host status` on these hosts")
}

/// Returns the first line of `error` without the host's name, for a list that names the host.
fn short_reason(error: &Error, client: &Client) -> String {
    let report = error.report();
    let line = report.lines().next().unwrap_or_default();
    line.strip_prefix(&format!("host '{}': ", client.name)).unwrap_or(line).to_owned()
}

impl Executor for Group {
    fn execute(&self, request: &Request, call: Call) -> Executed<'_> {
        if let Call::CalculateVmCloudProperties(_) = call {
            // The result does not depend on a host.
            let local = LocalExecutor::new(Cpi::new(Context::new(self.config.clone(), None)));
            let Executed { response, .. } = local.execute(request, call);
            return Executed { response, made: false, on_delivery: Box::new(|_: Delivery| {}) };
        }
        let forwarded = ForwardedCall::new(request, &call, &self.config, &self.context);
        carried(request, forwarded.and_then(|call| self.outcome(&call)))
    }
}
