//! create_vm.

use std::time::{Duration, Instant};

use serde_json::Map;

use super::{delete, images, reclaim};
use crate::cid::{Cid, VmCid};
use crate::cpi::capacity::{self, need};
use crate::cpi::context::Context;
use crate::cpi::contract::CreateVm;
use crate::cpi::contract::networks::Networks;
use crate::cpi::creation::{self, Creatable, Creation, acknowledgement};
use crate::cpi::network::nics::{self, PlannedNic};
use crate::cpi::network::{self, addresses};
use crate::cpi::properties::{self, VmCloudProperties};
use crate::cpi::stemcell;
use crate::error::{Error, ErrorKind, Result};
use crate::host::{clock, probe, uids};
use crate::qemu::Template;
use crate::qemu::topology::MAX_PORTS;
use crate::schema::Whole;
use crate::store::layout::SCHEMA;
use crate::store::record::{Desired, Ephemeral, Limits, Machine, Nic, StemcellRecord};
use crate::store::{Guard, Phase, VmRecord};
use crate::supervisor;
use crate::units::Bytes;

/// Creates the VM and starts it. Returns its cid, and the networks with the MACs and addresses that
/// were chosen here.
pub(in crate::cpi) fn create(cx: &Context, mut call: CreateVm) -> Result<(VmCid, Networks)> {
    let deadline = cx.deadline("create_vm");
    let properties: VmCloudProperties =
        properties::read(&cx.config.vm_defaults, &call.cloud_properties.0)?;
    properties::ensure_pool_exists(&cx.config, properties.pool.as_deref())?;
    addresses::ensure_valid_ports(&properties.ports)?;
    let stemcell = stemcell::find(cx, &call.stemcell)?;
    for pool in [&properties.pool, &stemcell.pool].into_iter().flatten() {
        cx.store.pools().dir(pool)?;
    }
    let cid = creation::new_cid::<VmRecord>(cx)?;
    let explain = |error| creation_failed(error, &cid);
    let mut nics = nics::plan(cx, &cid, &call.networks, &properties).map_err(explain)?;
    let plan = Plan { machine: plan_machine(cx, &properties)?, properties, stemcell };
    for PlannedNic { nic, .. } in &nics {
        let network = call.networks.iter_mut().find(|network| network.name == nic.network);
        network.expect("a NIC is for a network").set("mac", &nic.mac.to_string());
    }
    acknowledgement::acknowledge::<StemcellRecord>(cx, &plan.stemcell.cid);
    let creation = Creation::<VmRecord>::begin_with(cx, cid.clone(), deadline)?;
    let work = |creation: &Creation<'_, VmRecord>| {
        let uid = uids::reserve(cx.store.state_dir(), &cid)?;
        reserve(cx, &cid, &mut nics, &mut call.networks, &plan.properties, deadline)?;
        let nics = nics.into_iter().map(|planned| planned.nic).collect();
        let vm = plan.record(cid.clone(), uid, nics, cx.director.clone(), &call);
        admit(cx, &vm, deadline)?;
        start(cx, creation, &vm, &plan.stemcell, &call, deadline)?;
        Ok(vm)
    };
    let vm = creation.run(work, explain)?;
    Ok((vm.cid, call.networks))
}

/// What is decided before anything of the VM exists.
struct Plan {
    properties: VmCloudProperties,
    stemcell: StemcellRecord,
    machine: Machine,
}

impl Creatable for VmRecord {
    /// QEMU and its supervisor have to end.
    const ROLL_BACK_TIMEOUT: Duration = Duration::from_secs(30);

    fn roll_back(cx: &Context, cid: &VmCid, lock: Guard, deadline: Instant) -> Result<()> {
        if let Some(vm) = cx.store.read::<Self>(cid)? {
            return delete::destroy(cx, &vm, lock, deadline);
        }
        cx.store.release_reservations(cid)?;
        if let Some(uid) = uids::find(cx.store.state_dir(), cid) {
            uids::release(cx.store.state_dir(), cid, uid)?;
        }
        delete::remove(cx, cid, lock)
    }
}

/// Reserves the addresses and host ports of the VM. VMs whose cid the same Director never received
/// make way.
fn reserve(
    cx: &Context,
    cid: &VmCid,
    nics: &mut [PlannedNic],
    networks: &mut Networks,
    properties: &VmCloudProperties,
    deadline: Instant,
) -> Result<()> {
    match addresses::reserve(cx, cid, nics, networks, properties, deadline) {
        Err(refusal) if refusal.kind() == ErrorKind::Conflict => {
            if !reclaim::reclaim(cx, nics, properties, deadline)? {
                return Err(refusal);
            }
            addresses::reserve(cx, cid, nics, networks, properties, deadline)?;
        }
        reserved => reserved?,
    }
    network::ensure_exist(cx, nics.iter().filter_map(|planned| planned.managed.as_ref()))
}

/// Writes the record, if the pool has room for the VM's images and the scheduler's count of its
/// group still holds.
fn admit(cx: &Context, vm: &VmRecord, deadline: Instant) -> Result<()> {
    let ephemeral = vm.ephemeral.as_ref().map_or(0, |ephemeral| ephemeral.size.bytes().get());
    let size = vm.root_size.get().saturating_add(ephemeral);
    let need = need::thin(cx, Bytes(size));
    capacity::admit(cx, vm.pool.as_deref(), need, deadline, || {
        capacity::ensure_group_not_grown(cx, vm)?;
        cx.store.write(vm)
    })
}

/// Makes the images and starts the VM.
fn start(
    cx: &Context,
    creation: &Creation<'_, VmRecord>,
    vm: &VmRecord,
    stemcell: &StemcellRecord,
    call: &CreateVm,
    deadline: Instant,
) -> Result<()> {
    let images = images::make(cx, vm, stemcell, call)?;
    std::thread::scope(|threads| {
        // QEMU needs no durable images; the answer to the call does.
        let durable = threads.spawn(|| images::sync(cx, vm, images));
        threads.spawn(|| network::host::warn_of_findings(&vm.nics));
        supervisor::start(&cx.vm_context(&vm.cid), cx.config_file(), creation.lock(), deadline)?;
        durable.join().expect("no panic")
    })
}

/// The virtual hardware of a VM with these cloud properties.
fn plan_machine(cx: &Context, properties: &VmCloudProperties) -> Result<Machine> {
    let qemu = &cx.config.qemu;
    let template = properties.machine.clone().unwrap_or_else(|| qemu.template.clone());
    // A mistake in the template is reported before anything is made.
    Template::load(&template, qemu.templates_dir.as_deref())?;
    let model = properties.cpu_model.as_ref().map(|model| model.0.as_str()).or(qemu.cpu.as_deref());
    let choice = properties.accel.unwrap_or(qemu.accel);
    let (accel, mut cpu_model) =
        probe::accelerator(cx.store.run_dir(), &qemu.binary, choice, model)?;
    if !properties.nested {
        cpu_model.push_str(",vmx=off,svm=off");
    }
    let slots = qemu.hotplug_slots.get() + properties.extra_disks_slots.get();
    Ok(Machine {
        template,
        uuid: clock::random_uuid()?,
        cpus: u32::try_from(properties.cpu.get()).expect("at most 512"),
        ram: properties.ram,
        accel,
        cpu_model,
        hotplug_slots: u32::try_from(slots).expect("at most 256").min(MAX_PORTS),
    })
}

impl Plan {
    fn record(
        &self,
        cid: VmCid,
        uid: u32,
        nics: Vec<Nic>,
        director: Option<String>,
        call: &CreateVm,
    ) -> VmRecord {
        let properties = &self.properties;
        let ephemeral = |size| Ephemeral { serial: ephemeral_serial(&cid), size };
        VmRecord {
            schema: SCHEMA,
            phase: Phase::Creating,
            desired: Desired::Running,
            run: 1,
            created_at: clock::now(),
            agent_id: call.agent_id.as_str().to_owned(),
            director,
            spread: call.env.spread(),
            stemcell: self.stemcell.cid.clone(),
            machine: self.machine.clone(),
            uid,
            nics,
            base: images::base_of(&self.stemcell),
            root_size: images::root_size(&self.stemcell, properties),
            pool: properties.pool.clone(),
            ephemeral: properties.ephemeral_disk.map(ephemeral),
            disks: Vec::new(),
            cpu_weight: properties.cpu_weight.map(Whole::get),
            disk_limits: Limits {
                iops: properties.iops.map(Whole::get),
                mbps: properties.mbps.map(Whole::get),
            },
            metadata: Map::new(),
            newer: Map::new(),
            cid,
        }
    }
}

/// The virtio-blk serial of the ephemeral disk: at most 20 characters, and the same after every
/// restart.
fn ephemeral_serial(cid: &VmCid) -> String {
    let tail = cid.as_str().rsplit('-').next().unwrap_or_default();
    format!("eph-{tail}")
}

/// Gives the error of a create that was rolled back the kind that the Director acts on. It repeats
/// a call with `retry` up to four times (Director 283), so only what passes by itself gets that.
fn creation_failed(error: Error, cid: &VmCid) -> Error {
    match error.kind() {
        ErrorKind::BadRequest
        | ErrorKind::BadConfig
        | ErrorKind::NotSupported
        | ErrorKind::NetworkNotFound
        | ErrorKind::NoDiskSpace => error,
        kind => {
            let retry = matches!(
                kind,
                ErrorKind::Timeout
                    | ErrorKind::NotEnoughMemory { temporary: true }
                    | ErrorKind::StalePlacement
            );
            // The source keeps its kind: a group tries another host by it.
            error
                .during(format!("create VM '{cid}'"))
                .with_kind(ErrorKind::VmCreationFailed { retry })
        }
    }
}
