//! Several hosts that share the calls.
//!
//! ```text
//!   a cid bears a trace of its host ──► that host is asked to do it, if it has the thing
//!     │ it has not: the thing came here otherwise
//!     ▼
//!   all others are asked at once who has it ──► that one does it
//!     │ nobody has
//!     ▼
//!   all could be asked? ── no ──► an error: it may be on the silent one
//!     │ yes
//!     ▼
//!   any host says what is to be said of a thing that is not there
//! ```
//!
//! Nothing is remembered between calls. New VMs are put by what hosts offer (`place`), new disks where their VM is,
//! stemcells everywhere under one cid.

mod everywhere;
mod place;

use std::net::IpAddr;
use std::time::{Duration, Instant};

use serde_json::{Map, Value};

use self::place::{Candidate, Need};
use super::caller::{Host, Told, Untold};
use super::errand::{Answered, Errand, carried};
use crate::cid::{Cid, DiskCid, VmCid, is_from_host};
use crate::config::{Config, HostEntry};
use crate::cpi::Cpi;
use crate::cpi::cloud_properties::{self, DiskCloudProperties, VmCloudProperties};
use crate::cpi::networks::Addressing;
use crate::cpi::offer::Wish;
use crate::cpi::verbs::{CreateDisk, CreateVm};
use crate::error::{Error, ErrorKind, Result};
use crate::rpc::call::Call;
use crate::rpc::outlet::Delivery;
use crate::rpc::request::Request;
use crate::rpc::response::Response;
use crate::rpc::{Carried, Carrier, Here};

/// How long a host may take to say what it has.
const LOOKS: Duration = Duration::from_secs(20);

/// How often all are asked where a VM is best put, while others put theirs there.
const TURNS: usize = 10;

/// Has calls carried out on one of several hosts.
pub struct Group {
    members: Vec<Member>,
    config: Config,
    /// What the request's context says to the hosts beside its own keys.
    told: Map<String, Value>,
}

/// One of the hosts.
struct Member {
    host: Host,
    draining: bool,
}

/// The answer, and the hosts that wait to hear what became of it.
type Outcome = Result<(Response, Vec<Told>)>;

impl Group {
    /// Has them carried out on the hosts of `config`, which are `told` so much of it.
    pub fn new(config: Config, told: Map<String, Value>) -> Self {
        let member = |entry: &HostEntry| Member { host: Host::of(entry), draining: entry.draining };
        Self { members: config.hosts.iter().map(member).collect(), config, told }
    }

    fn outcome(&self, errand: &Errand<'_>) -> Outcome {
        match errand.call {
            Call::CreateVm(vm) => self.create_vm(errand, vm),
            Call::CreateDisk(disk) => self.create_disk(errand, disk),
            Call::CreateStemcell(_) => everywhere::create(&self.members, errand),
            Call::DeleteStemcell(_) => {
                // While a host is silent the others keep it: VMs of it may still be wanted.
                self.ask_all(|host| host.find(&[], soon(errand)))
                    .into_iter()
                    .collect::<Result<Vec<_>>>()?;
                everywhere::delete(&self.members, errand)
            }
            Call::CreateNetwork(_) => {
                Err(Error::new(ErrorKind::NotSupported, "a group of hosts has no managed networks")
                    .hint("give the subnet a network that each host has in its configuration"))
            }
            Call::AttachDisk(vm, disk) => self.attach(errand, vm, disk),
            Call::DeleteVm(vm)
            | Call::HasVm(vm)
            | Call::RebootVm(vm)
            | Call::SetVmMetadata(vm, _)
            | Call::GetDisks(vm)
            | Call::DetachDisk(vm, _) => self.by(errand, vm.as_str()),
            Call::DeleteDisk(disk)
            | Call::HasDisk(disk)
            | Call::SetDiskMetadata(disk, _)
            | Call::SnapshotDisk(disk, _)
            | Call::ResizeDisk(disk, _)
            | Call::UpdateDisk(disk, ..) => self.by(errand, disk.as_str()),
            Call::DeleteSnapshot(snapshot) => self.by(errand, snapshot.as_str()),
            Call::DeleteNetwork(network) => self.by(errand, network.as_str()),
            Call::CalculateVmCloudProperties(_) => unreachable!("no host is asked for these"),
        }
    }

    /// Has the host that has `cid` do it.
    fn by(&self, errand: &Errand<'_>, cid: &str) -> Outcome {
        for member in self.members.iter().filter(|member| is_from_host(cid, &member.host.name)) {
            if let Some(answered) = self.send_if_there(errand, member, &[cid])? {
                return Ok(answered.into_outcome());
            }
        }
        match self.find(errand, &[cid])?.remove(0) {
            Some(member) => Ok(self.send_to(errand, member)?.into_outcome()),
            None => Ok(self.send_to(errand, &self.members[0])?.into_outcome()),
        }
    }

    fn send_to(&self, errand: &Errand<'_>, member: &Member) -> Result<Answered> {
        errand.send(&member.host, errand.call.creates(Some(&member.host.name)).as_ref())
    }

    fn send_if_there(
        &self,
        errand: &Errand<'_>,
        member: &Member,
        cids: &[&str],
    ) -> Result<Option<Answered>> {
        errand.send_if_there(
            &member.host,
            cids,
            errand.call.creates(Some(&member.host.name)).as_ref(),
        )
    }

    /// The host that has each of `cids`, asking all at once.
    ///
    /// # Errors
    /// If a cid is not found, and a host that may have it can not be asked.
    fn find(&self, errand: &Errand<'_>, cids: &[&str]) -> Result<Vec<Option<&Member>>> {
        let wanted: Vec<_> = cids.iter().map(|cid| (*cid).to_owned()).collect();
        let until = soon(errand);
        let answers = self.ask_all(|host| host.find(&wanted, until));
        let of = |cid: &String| {
            let has = |answer: &Result<Vec<String>>| {
                answer.as_ref().is_ok_and(|found| found.contains(cid))
            };
            let found = self
                .members
                .iter()
                .zip(&answers)
                .find(|(_, answer)| has(answer))
                .map(|(member, _)| member);
            match (found, answers.iter().find_map(|answer| answer.as_ref().err())) {
                (None, Some(silence)) => {
                    let message = format!(
                        "'{cid}' is on no host that answers, and one does not: {}",
                        silence.report()
                    );
                    Err(Error::new(silence.kind(), message).hint(
                        "bring that host back, or take it out of 'hosts' if it is gone for good",
                    ))
                }
                (found, _) => Ok(found),
            }
        };
        wanted.iter().map(of).collect()
    }

    /// What each host answers to `question`, asked at the same time.
    fn ask_all<T: Send>(
        &self,
        question: impl Fn(&Host) -> Result<T, Untold> + Sync,
    ) -> Vec<Result<T>> {
        std::thread::scope(|threads| {
            let ask = |member| {
                let question = &question;
                threads.spawn(move || question(member).map_err(|untold| untold.error))
            };
            let asked: Vec<_> = self.members.iter().map(|member| ask(&member.host)).collect();
            asked.into_iter().map(|answer| answer.join().expect("no panic")).collect()
        })
    }

    fn create_vm(&self, errand: &Errand<'_>, vm: &CreateVm) -> Outcome {
        let properties: VmCloudProperties =
            cloud_properties::read(&self.config.vm_defaults, &vm.cloud_properties.0)?;
        let need = Need {
            ram: properties.ram,
            pool: properties.pool.unwrap_or_default(),
            stemcell: vm.stemcell.to_string(),
            disks: vm.disks.iter().map(ToString::to_string).collect(),
        };
        let wish = Wish {
            cids: need.disks.iter().chain([&need.stemcell]).cloned().collect(),
            addresses: addresses(vm),
            director: errand.request.context.director().map(str::to_owned),
            spread: vm.env.spread(),
        };
        let mut candidates = self.candidates(errand, &wish);
        let errand = errand.afresh();
        for turn in 1.. {
            let order = place::order(&candidates, &need)?;
            // Where there is no choice, and at last, it is put there however many are there.
            let counts = turn < TURNS && order.len() > 1;
            if let Some(answered) = self.put(&errand, &candidates, &order, counts)? {
                return Ok(answered.into_outcome());
            }
            candidates = self.candidates(&errand, &wish);
        }
        unreachable!("the last turn has an end")
    }

    /// Has the first of `order` that has room make the VM. `None` if others put VMs on one meanwhile that had better not be
    /// with this one, and that `counts`: then all are to be asked again.
    fn put(
        &self,
        errand: &Errand<'_>,
        candidates: &[Candidate<'_>],
        order: &[usize],
        counts: bool,
    ) -> Result<Option<Answered>> {
        for (turn, at) in order.iter().enumerate() {
            let member = &self.members[*at];
            let alike =
                candidates[*at].offer.as_ref().ok().map(|offer| offer.alike).filter(|_| counts);
            let answered = self.send_to(&errand.beside(alike), member)?;
            if counts && answered.told.crowded {
                tracing::info!(
                    host = member.host.name,
                    "others were faster to put VMs of its group there"
                );
                return Ok(None);
            }
            if !answered.told.lacks_room || turn + 1 == order.len() {
                return Ok(Some(answered));
            }
            // Others were faster.
            tracing::info!(host = member.host.name, "it has no room for the VM after all");
        }
        unreachable!("an order has a first and a last")
    }

    fn candidates(&self, errand: &Errand<'_>, wish: &Wish) -> Vec<Candidate<'_>> {
        let until = soon(errand);
        let offers = self.ask_all(|host| host.offer(wish, until));
        let named = self.members.iter().zip(offers);
        named
            .map(|(member, offer)| Candidate {
                name: &member.host.name,
                draining: member.draining,
                offer: offer.map_err(|error| in_short(&error, &member.host.name)),
            })
            .collect()
    }

    /// A disk is made where its VM is, or, for no VM, where there is most room.
    fn create_disk(&self, errand: &Errand<'_>, disk: &CreateDisk) -> Outcome {
        let near =
            disk.vm.as_ref().map(|vm| self.find_one(errand, vm.as_str())).transpose()?.flatten();
        if let Some(member) = near {
            return Ok(self.send_to(&errand.afresh(), member)?.into_outcome());
        }
        let properties: DiskCloudProperties =
            cloud_properties::read(&self.config.disk_defaults, &disk.cloud_properties.0)?;
        let pool = properties.pool.unwrap_or_default();
        let candidates = self.candidates(errand, &Wish::default());
        let errand = &errand.afresh();
        let space =
            |candidate: &Candidate<'_>| candidate.offer.as_ref().ok()?.space.get(&pool).copied();
        let open = (0..candidates.len()).filter(|at| !candidates[*at].draining);
        let best = open
            .filter_map(|at| Some((space(&candidates[at])?, at)))
            .max_by_key(|(space, at)| (*space, usize::MAX - at));
        let Some((_, at)) = best else {
            let said = |host: &Candidate<'_>| match &host.offer {
                Err(why) => format!("{}: {why}", host.name),
                Ok(_) if host.draining => format!("{}: it is draining", host.name),
                Ok(_) => format!("{}: it has no pool '{pool}'", host.name),
            };
            let reasons: Vec<_> = candidates.iter().map(said).collect();
            return Err(Error::new(
                ErrorKind::Host,
                format!("no host can have the disk: {}", reasons.join("; ")),
            ));
        };
        Ok(self.send_to(errand, &self.members[at])?.into_outcome())
    }

    /// The host of `cid`: the one whose trace it bears, if that has it.
    fn find_one(&self, errand: &Errand<'_>, cid: &str) -> Result<Option<&Member>> {
        let wanted = [cid.to_owned()];
        for member in self.members.iter().filter(|member| is_from_host(cid, &member.host.name)) {
            if !member.host.find(&wanted, soon(errand)).map_err(|untold| untold.error)?.is_empty() {
                return Ok(Some(member));
            }
        }
        Ok(self.find(errand, &[cid])?.remove(0))
    }

    fn attach(&self, errand: &Errand<'_>, vm: &VmCid, disk: &DiskCid) -> Outcome {
        for member in self.members.iter().filter(|member| vm.is_from_host(&member.host.name)) {
            if let Some(answered) =
                self.send_if_there(errand, member, &[vm.as_str(), disk.as_str()])?
            {
                return Ok(answered.into_outcome());
            }
        }
        match self.find(errand, &[vm.as_str(), disk.as_str()])?[..] {
            [Some(here), Some(there)] if !std::ptr::eq(here, there) => {
                self.hand_over(errand, disk, there, here)
                    .map_err(|e| e.during(format!("attach it to VM '{vm}'")))?;
                match self.send_if_there(errand, here, &[vm.as_str(), disk.as_str()])? {
                    Some(answered) => Ok(answered.into_outcome()),
                    None => {
                        let message = format!(
                            "VM '{vm}' or disk '{disk}' is not on host '{}' any more",
                            here.host.name
                        );
                        Err(Error::new(ErrorKind::Conflict, message).hint("repeat the call"))
                    }
                }
            }
            [Some(here), _] => Ok(self.send_to(errand, here)?.into_outcome()),
            _ => Ok(self.send_to(errand, &self.members[0])?.into_outcome()),
        }
    }

    /// Has the host that has the disk give it up, if `to` reaches it, too.
    fn hand_over(
        &self,
        errand: &Errand<'_>,
        disk: &DiskCid,
        from: &Member,
        to: &Member,
    ) -> Result<()> {
        let (there, here) = (&from.host.name, &to.host.name);
        let apart = |why: String| {
            let message = format!("disk '{disk}' is on host '{there}', the VM on '{here}', {why}");
            Error::new(ErrorKind::Conflict, message)
                .hint("recreate the VM: a new one is put where its disks are")
        };
        let wish = Wish { cids: vec![disk.to_string()], ..Wish::default() };
        let offer = to.host.offer(&wish, soon(errand)).map_err(|untold| untold.error)?;
        if offer.shared.is_empty() {
            return Err(apart("which has no shared pool with the disk".to_owned()));
        }
        let given_up = from.host.give_up(disk, errand.deadline);
        given_up.map_err(|untold| {
            apart(format!("and can not change hosts: {}", in_short(&untold.error, there)))
        })
    }
}

/// Until when hosts are waited for that are asked about something. One that hangs must not take the time of the call itself,
/// which goes to another.
fn soon(errand: &Errand<'_>) -> Instant {
    let now = Instant::now();
    now + LOOKS.min(errand.deadline.saturating_duration_since(now) / 2)
}

/// The addresses that the Director gives the VM.
fn addresses(vm: &CreateVm) -> Vec<IpAddr> {
    let given = vm.networks.iter().filter_map(|network| match network.addressing {
        Addressing::Manual { address, .. } => Some(address.ip()),
        Addressing::Dynamic { .. } | Addressing::Vip { .. } => None,
    });
    given.collect()
}

/// What is wrong with a host, for a list that has its name already.
fn in_short(error: &Error, host: &str) -> String {
    let report = error.report();
    let line = report.lines().next().unwrap_or_default();
    line.strip_prefix(&format!("host '{host}': ")).unwrap_or(line).to_owned()
}

impl Answered {
    fn into_outcome(self) -> (Response, Vec<Told>) {
        (self.response, vec![self.told])
    }
}

impl Carrier for Group {
    fn carry(&self, request: &Request, call: Call) -> Carried<'_> {
        if let Call::CalculateVmCloudProperties(_) = call {
            // No host has a say in it.
            let Carried { response, .. } =
                Here::new(Cpi::new(self.config.clone(), None)).carry(request, call);
            return Carried { response, made: false, delivered: Box::new(|_: Delivery| {}) };
        }
        let errand = Errand::new(request, &call, &self.config, &self.told);
        carried(request, errand.and_then(|errand| self.outcome(&errand)))
    }
}
