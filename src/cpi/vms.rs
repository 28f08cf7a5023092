//! create_vm, delete_vm, has_vm, reboot_vm.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::Map;
use serde_json::value::to_raw_value;

use super::Cpi;
use super::cloud_properties::{self, VmCloudProperties};
use super::networks::Networks;
use super::placement::Placed;
use super::verbs::CreateVm;
use crate::agent::{config_drive, settings};
use crate::cid::{Cid, VmCid};
use crate::crash;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::host::{cgroup::Cgroup, clock, probe, uids};
use crate::image::{self, Fresh};
use crate::net;
use crate::qemu::Template;
use crate::schema::Whole;
use crate::store::layout::{BASE_IMAGE, EPHEMERAL_IMAGE, ROOT_IMAGE, SCHEMA, STEMCELL_IMAGE};
use crate::store::record::{
    Base, Desired, Ephemeral, Format, Limits, Machine, Nic, StemcellRecord,
};
use crate::store::{Guard, Phase, Rank, Record, VmPaths, VmRecord, atomic};
use crate::supervisor::{self, Button};
use crate::units::Bytes;

/// Who only looks at a VM, as `audit` does, has its lock for a moment.
const LOOK: Duration = Duration::from_millis(250);

/// How long a guest is given to follow the power button at reboot_vm. systemd waits 90 s for a unit; without jobs, which
/// the Director stopped before, a stemcell needs 5 to 7 s.
const POWER_BUTTON: Duration = Duration::from_secs(120);

impl Cpi {
    pub(super) fn make_vm(&self, mut call: CreateVm) -> Result<(VmCid, Networks)> {
        let deadline = self.deadline("create_vm");
        let properties: VmCloudProperties =
            cloud_properties::read(&self.config.vm_defaults, &call.cloud_properties.0)?;
        self.known_pool(properties.pool.as_deref())?;
        let stemcell = self.stemcell(&call.stemcell)?;
        for pool in [&properties.pool, &stemcell.pool].into_iter().flatten() {
            self.store.pools().dir(pool)?;
        }
        let cid = self.new_cid::<VmRecord>()?;
        let mut placed = self
            .nics(&cid, &call.networks, &properties)
            .map_err(|error| creation_failed(error, &cid))?;
        let machine = self.machine(&properties)?;
        for Placed { nic, .. } in &placed {
            let network = call.networks.iter_mut().find(|network| network.name == nic.network);
            network.expect("a NIC is for a network").set("mac", &nic.mac.to_string());
        }
        self.store.prepare()?;
        self.is_told::<StemcellRecord>(&stemcell.cid);
        self.clear_leftovers(deadline);
        let (lock, uid) =
            self.begin_vm(&cid, &mut placed, &mut call.networks, &properties, deadline)?;
        let mut vm = VmRecord {
            schema: SCHEMA,
            phase: Phase::Creating,
            desired: Desired::Running,
            run: 1,
            created_at: clock::now(),
            agent_id: call.agent_id.as_str().to_owned(),
            director: self.director.clone(),
            spread: call.env.spread(),
            stemcell: stemcell.cid.clone(),
            machine,
            uid,
            nics: placed.into_iter().map(|placed| placed.nic).collect(),
            base: base_of(&stemcell),
            root_size: root_size(&stemcell, &properties),
            pool: properties.pool,
            ephemeral: properties
                .ephemeral_disk
                .map(|size| Ephemeral { serial: ephemeral_serial(&cid), size }),
            disks: Vec::new(),
            cpu_weight: properties.cpu_weight.map(Whole::get),
            disk_limits: Limits {
                iops: properties.iops.map(Whole::get),
                mbps: properties.mbps.map(Whole::get),
            },
            metadata: Map::new(),
            newer: Map::new(),
            cid,
        };
        let ephemeral = vm.ephemeral.as_ref().map_or(0, |ephemeral| ephemeral.size.bytes().get());
        let size = vm.root_size.get().saturating_add(ephemeral);
        let need = self.need_of_thin(Bytes(size));
        let admitted = self.admit(vm.pool.as_deref(), need, deadline, || {
            self.is_not_crowded(&vm)?;
            self.store.write(&vm)
        });
        let made = admitted.and_then(|()| {
            let images = self.make_images(&vm, &stemcell, &call)?;
            std::thread::scope(|threads| {
                // QEMU starts no faster for waiting until they are on the disk; the answer does wait for it.
                let durable = threads.spawn(|| self.make_durable(&vm, images));
                threads.spawn(|| Self::warn_of_findings(&vm.nics));
                supervisor::start(
                    &self.scope(&vm.cid),
                    self.config_file.as_deref(),
                    &lock,
                    deadline,
                )?;
                durable.join().expect("no panic")
            })?;
            self.untold::<VmRecord>(&vm.cid)?;
            vm.phase = Phase::Ready;
            self.store.write(&vm)?;
            self.settled(&vm.cid)
        });
        match made {
            Ok(()) => Ok((vm.cid, call.networks)),
            Err(error) => {
                let failed = creation_failed(error, &vm.cid);
                // The caller has no cid to clean up with.
                self.destroy(&vm, lock, deadline.max(Instant::now() + Duration::from_secs(30)))
                    .map_err(|e| {
                        e.during(format!("remove what was made before: {}", failed.report()))
                    })?;
                Err(failed)
            }
        }
    }

    /// What a VM has before its record: its lock, a uid, and claims on its addresses and ports. Of a failure nothing is left.
    fn begin_vm(
        &self,
        cid: &VmCid,
        placed: &mut [Placed],
        networks: &mut Networks,
        properties: &VmCloudProperties,
        deadline: Instant,
    ) -> Result<(Guard, u32)> {
        let lock = self.begin::<VmRecord>(Rank::Vm, cid, deadline)?;
        let uid = match uids::claim(self.store.state_dir(), cid) {
            Ok(uid) => uid,
            Err(error) => return lock.unlink().and(self.settled(cid)).and(Err(error)),
        };
        let claimed = match self.claim(cid, placed, networks, properties, deadline) {
            Err(held) if held.kind() == ErrorKind::Conflict => {
                self.claim_of_forgotten(held, cid, placed, networks, properties, deadline)
            }
            claimed => claimed,
        };
        if let Err(error) = claimed.and_then(|()| self.still_managed(placed)) {
            self.store.release_reservations(cid)?;
            uids::release(self.store.state_dir(), cid, uid)?;
            return lock.unlink().and(self.settled(cid)).and(Err(creation_failed(error, cid)));
        }
        Ok((lock, uid))
    }

    fn machine(&self, properties: &VmCloudProperties) -> Result<Machine> {
        let qemu = &self.config.qemu;
        let template = properties.machine.clone().unwrap_or_else(|| qemu.template.clone());
        // Read now, so that a mistake in it is the answer to this call and leaves nothing.
        Template::load(&template, qemu.templates_dir.as_deref())?;
        let model =
            properties.cpu_model.as_ref().map(|model| model.0.as_str()).or(qemu.cpu.as_deref());
        let choice = properties.accel.unwrap_or(qemu.accel);
        let (accel, mut cpu_model) =
            probe::accelerator(self.store.run_dir(), &qemu.binary, choice, model)?;
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
            hotplug_slots: u32::try_from(slots)
                .expect("at most 256")
                .min(crate::qemu::topology::MAX_PORTS),
        })
    }

    fn make_images(
        &self,
        vm: &VmRecord,
        stemcell: &StemcellRecord,
        call: &CreateVm,
    ) -> Result<Vec<Fresh>> {
        if stemcell.image_path.is_none() {
            let image = self
                .store
                .images_dir(&stemcell.cid, stemcell.pool.as_deref())?
                .join(STEMCELL_IMAGE);
            self.store.make_images_dir(&vm.cid, vm.base.pool.as_deref())?;
            std::fs::hard_link(&image, self.store.base_image(vm)?)
                .at("link the stemcell's image", &image)?;
            crash::point!("stemcell's image linked");
        }
        let images = self.store.make_images_dir(&vm.cid, vm.pool.as_deref())?;
        // For people and tools: QEMU is told which image is below, and never looks into the header.
        let below = if vm.base.pool == vm.pool {
            vm.base.path.clone()
        } else {
            self.store.base_image(vm)?
        };
        let backing =
            image::qcow2::Backing { file_name: &below.to_string_lossy(), format: vm.base.format };
        let mut made =
            vec![image::qcow2::create(&images.join(ROOT_IMAGE), vm.root_size, Some(backing))?];
        if let Some(ephemeral) = &vm.ephemeral {
            made.push(image::qcow2::create(
                &images.join(EPHEMERAL_IMAGE),
                ephemeral.size.bytes(),
                None,
            )?);
        }
        let networks = to_raw_value(&call.networks.for_agent()).map_err(|e| {
            Error::new(ErrorKind::Internal, "write the networks as JSON").because(e)
        })?;
        let facts = settings::Facts {
            agent_id: &vm.agent_id,
            vm: vm.cid.as_str(),
            networks: &networks,
            ephemeral: vm.ephemeral.as_ref().map(|ephemeral| ephemeral.serial.as_str()),
            env: call.env.get(),
        };
        made.push(config_drive::write(
            &self.store.vm(&vm.cid).config_drive(),
            &settings::settings(facts, &self.config.agent),
        )?);
        Ok(made)
    }

    /// Makes durable what the record in phase `ready` will name.
    fn make_durable(&self, vm: &VmRecord, images: Vec<Fresh>) -> Result<()> {
        images.into_iter().try_for_each(Fresh::sync)?;
        // The names beside the record are made durable with it.
        for pool in BTreeSet::from_iter(vm.pools()) {
            atomic::sync_dir(&self.store.images_dir(&vm.cid, Some(pool))?)?;
        }
        // The note first: a claim without it would keep others from the address until somebody calls `gc`.
        atomic::sync_dir(&self.store.pending_dir())?;
        uids::sync(self.store.state_dir())?;
        self.store.sync_reservations()
    }

    pub(super) fn remove_vm(&self, cid: &VmCid) -> Result<()> {
        let paths = self.store.vm(cid);
        if !atomic::entry_exists(&paths.dir) {
            self.store.ensure_mounted()?;
            if !paths.run.exists() && !self.store.has_lock(Rank::Vm, cid) {
                return Ok(());
            }
        }
        let deadline = self.deadline("delete_vm");
        let lock = match self.store.lock(Rank::Vm, cid, Instant::now() + LOOK) {
            // What starts the VM need not finish.
            Err(error) if error.kind() == ErrorKind::Timeout => {
                supervisor::call_off(&paths)?;
                self.store.lock(Rank::Vm, cid, deadline)?
            }
            free => free?,
        };
        match self.store.find::<VmRecord>(cid)? {
            Some(vm) => self.destroy(&vm, lock, deadline),
            // Its making was cut short before that, or its removal after it; or somebody removed its directory by hand.
            None => {
                supervisor::stop(&paths, Button::Quit, deadline)?;
                Cgroup::open(cid.as_str()).kill(deadline)?;
                self.remove_remains(cid)?;
                self.forget(cid, &paths, lock)
            }
        }
    }

    /// Ends a VM and removes everything that can be named after its record; the record last.
    pub(super) fn destroy(&self, vm: &VmRecord, lock: Guard, deadline: Instant) -> Result<()> {
        let paths = self.store.vm(&vm.cid);
        // A supervisor that sees this does not start the VM again.
        self.store.write_deleting(&VmRecord { phase: Phase::Deleting, ..vm.clone() })?;
        // A persistent disk may have writes that only QEMU's caches know: it ends in order.
        let button = if vm.disks.is_empty() { Button::Kill } else { Button::Quit };
        supervisor::stop(&paths, button, deadline)?;
        let group = Cgroup::open(vm.cid.as_str());
        // A QEMU that was broken out of may have closed the lock by which it is known to live; its group it can not leave.
        group.kill(deadline)?;
        std::thread::scope(|threads| {
            // Nobody sends any more, and each of the two waits for a pause of every CPU (RCU).
            let rules = threads.spawn(|| net::guard::remove(&vm.nics));
            let unplugged = self.unplug_nics(vm, deadline);
            rules.join().expect("no panic").and(unplugged)
        })?;
        self.store.release_reservations(&vm.cid)?;
        group.remove()?;
        uids::release(self.store.state_dir(), &vm.cid, vm.uid)?;
        self.forget(&vm.cid, &paths, lock)
    }

    /// Removes what may be left of the taps, and the networks that nobody needs any more.
    fn unplug_nics(&self, vm: &VmRecord, deadline: Instant) -> Result<()> {
        for (tap, segment) in vm.nics.iter().filter_map(Nic::tap) {
            let _network = self.store.short_lock(Rank::Network, &segment.bridge, deadline)?;
            net::apply::remove_tap(tap)?;
            if !self.store.is_pinned(&segment.bridge) {
                net::apply::release(segment)?;
            }
        }
        Ok(())
    }

    pub(super) fn forget(&self, cid: &VmCid, paths: &VmPaths, lock: Guard) -> Result<()> {
        atomic::remove_dir(&paths.run)?;
        crash::point!("run directory removed");
        self.store.remove::<VmRecord>(cid)?;
        lock.unlink()?;
        self.settled(cid)
    }

    pub(super) fn vm_exists(&self, cid: &VmCid) -> Result<bool> {
        // A VM that is still being made, or whose making was cut short, was never told to anybody.
        Ok(self.store.find::<VmRecord>(cid)?.is_some_and(|vm| vm.phase != Phase::Creating))
    }

    pub(super) fn power_cycle(&self, cid: &VmCid) -> Result<()> {
        let deadline = self.deadline("reboot_vm");
        let (lock, mut vm) = self.locked_vm(cid, deadline)?;
        // Half of the time is for the guest, so that the start has the rest.
        let patience = POWER_BUTTON.min(deadline.saturating_duration_since(Instant::now()) / 2);
        let (paths, scope) = (self.store.vm(cid), self.scope(cid));
        // Refused now it runs on; later it would be off.
        supervisor::admit(&scope, &vm)?;
        supervisor::stop(&paths, Button::Press(patience), deadline)?;
        // What lost its pid file, somebody having emptied the run directory.
        Cgroup::open(cid.as_str()).kill(deadline)?;
        vm.run += 1;
        vm.desired = Desired::Running;
        self.store.write(&vm)?;
        supervisor::start(&scope, self.config_file.as_deref(), &lock, deadline)
            .map_err(|e| e.during(format!("start VM '{cid}' again")))
    }
}

fn base_of(stemcell: &StemcellRecord) -> Base {
    match &stemcell.image_path {
        Some(path) => Base { path: path.clone(), pool: None, format: stemcell.format },
        None => Base { path: BASE_IMAGE.into(), pool: stemcell.pool.clone(), format: Format::Raw },
    }
}

fn root_size(stemcell: &StemcellRecord, properties: &VmCloudProperties) -> Bytes {
    properties
        .root_disk
        .map_or(stemcell.virtual_size, |asked| asked.bytes().max(stemcell.virtual_size))
}

/// At most 20 characters, like every virtio-blk serial; derived, so that it is the same after any restart.
fn ephemeral_serial(cid: &VmCid) -> String {
    let tail = cid.as_str().rsplit('-').next().unwrap_or_default();
    format!("eph-{tail}")
}

/// A create_vm that failed left nothing. Only what may pass by itself is worth the Director's five tries.
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
            // Of the whole: what is behind it says whether another host may do better.
            error
                .during(format!("create VM '{cid}'"))
                .with_kind(ErrorKind::VmCreationFailed { retry })
        }
    }
}
