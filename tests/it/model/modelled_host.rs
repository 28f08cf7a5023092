//! The model, the host that it describes, and the comparison of both.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::os::unix::process::ExitStatusExt;

use bosh_qemu_cpi::cid::{Cid, DiskCid, SnapshotCid, StemcellCid, VmCid};
use bosh_qemu_cpi::store::record::StemcellRecord;
use bosh_qemu_cpi::store::{DiskRecord, Phase, Record, SnapshotRecord, VmRecord};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::random::Random;
use crate::support::answer::Failure;
use crate::support::crash_points::{call_with_crash, take_passed_points};
use crate::support::host::{Host, eventually, wait_for_exit};
use crate::support::vm_list::list_when_all_answer;

const HOST_START: &str = "host start";
/// Hot-plug slots of each VM.
pub const HOTPLUG_SLOTS: usize = 2;

/// Expected state of a VM.
#[derive(Debug, Clone)]
pub struct Vm {
    pub power: Power,
    pub disks: BTreeSet<DiskCid>,
    /// Its tag `name`.
    pub name: Option<String>,
    /// Pid of the supervisor that has restarted the VM once. It delays its next restart for longer.
    pub restarted_by: Option<i32>,
}

/// Expected state of a disk or a snapshot.
#[derive(Debug, Clone)]
pub struct Disk {
    /// MiB.
    pub size: u64,
    pub format: &'static str,
    /// The byte that fills its first MiB. The rest is zero.
    pub data: u8,
    pub metadata: Value,
}

/// Expected power state of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Power {
    On,
    /// Whether `host start` starts the VM.
    Off {
        should_run: bool,
    },
}

/// The expected objects, and the host.
pub struct ModelledHost {
    pub host: Host,
    pub stemcells: BTreeSet<StemcellCid>,
    pub vms: BTreeMap<VmCid, Vm>,
    pub disks: BTreeMap<DiskCid, Disk>,
    pub snapshots: BTreeMap<SnapshotCid, Disk>,
    /// Cids of deleted objects, which must not reappear.
    pub deleted: BTreeSet<String>,
    /// The VM whose reboot_vm or delete_vm was killed. Its power state is unknown until the next
    /// call.
    pub power_unknown: Option<VmCid>,
    pub killed: u32,
    pub power_cuts: u32,
    /// Crash points of each method, from its last call that was not killed.
    points: BTreeMap<String, Vec<String>>,
    calls: u32,
}

impl ModelledHost {
    pub fn new() -> Option<Self> {
        let host = Host::new()?;
        let stemcell = host.stemcell().parse().unwrap();
        Some(Self {
            host,
            stemcells: [stemcell].into(),
            vms: BTreeMap::new(),
            disks: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            deleted: BTreeSet::new(),
            power_unknown: None,
            killed: 0,
            power_cuts: 0,
            points: BTreeMap::new(),
            calls: 0,
        })
    }

    /// Calls `method` and, one time in three, kills it at one of its crash points. Returns `None`
    /// if the call was killed, or failed because its supervisor was killed: then its effect is
    /// unknown.
    pub fn attempt(
        &mut self,
        random: &mut Random,
        method: &str,
        arguments: &Value,
    ) -> Option<Result<Value, Failure>> {
        let points = self.points.get(method).cloned().unwrap_or_default();
        let (kill, point) = (random.one_in(3), random.pick(points));
        let point = point.filter(|_| kill);
        self.print(&format!(
            "{method} {arguments}, to be killed at {}",
            point.as_deref().unwrap_or("no point")
        ));
        self.calls += 1;
        let log = self.host.path(&format!("crash-points-{}", self.calls));
        let mut variables = vec![("LOG", log.to_str().unwrap())];
        variables.extend(point.as_deref().map(|point| ("AT", point)));
        let answer = call_with_crash(&self.host, method, arguments, variables);
        let passed = if log.exists() { take_passed_points(&log) } else { Vec::new() };
        match &answer {
            Some(answer) if point.is_none() && answer.outcome.is_ok() => {
                self.points.insert(method.to_owned(), passed);
            }
            _ => {}
        }
        self.kill_armed_supervisors();
        let outcome = answer.map(|answer| answer.outcome);
        let unknown = match &outcome {
            None => true,
            Some(outcome) => {
                outcome.is_err() && point.is_some_and(|point| point.starts_with("supervisor: "))
            }
        };
        self.killed += u32::from(unknown);
        self.print(&format!(
            "  {}",
            if unknown { "killed".to_owned() } else { format!("{outcome:?}") }
        ));
        outcome.filter(|_| !unknown)
    }

    /// Runs `host start` and kills it at one of its crash points, two times in three. The first run
    /// learns the points. Returns whether it ran.
    pub fn kill_host_start(&mut self, random: &mut Random) -> bool {
        let point = random.pick(self.points.get(HOST_START).cloned().unwrap_or_default());
        if random.one_in(3) {
            return false;
        }
        self.print(&format!(
            "{HOST_START}, to be killed at {}",
            point.as_deref().unwrap_or("no point")
        ));
        let log = self.host.path("crash-points-host-start");
        let mut command = self.host.cpi();
        command.args(HOST_START.split(' ')).env("BOSH_QEMU_CPI_CRASH_LOG", &log);
        if let Some(point) = &point {
            command.env("BOSH_QEMU_CPI_CRASH_AT", point);
        }
        let output = self.host.namespace().run(|| command.output().unwrap());
        self.killed += u32::from(output.status.signal().is_some());
        if log.exists() {
            let passed = take_passed_points(&log);
            if point.is_none() && passed.len() > 10 {
                self.points.insert(HOST_START.to_owned(), passed);
            }
        }
        self.kill_armed_supervisors();
        true
    }

    /// Kills the supervisors that have a crash point armed. Such a supervisor would otherwise die
    /// in a later step, at the end of QEMU or at a restart.
    fn kill_armed_supervisors(&self) {
        for vm in self.host.store().list::<VmRecord>().unwrap() {
            let Some(supervisor) = self.host.supervisor(&vm) else { continue };
            let environment =
                std::fs::read(format!("/proc/{}/environ", supervisor.pid())).unwrap_or_default();
            if String::from_utf8_lossy(&environment).contains("BOSH_QEMU_CPI_CRASH_AT") {
                supervisor.signal(Signal::SIGKILL).unwrap();
                wait_for_exit(&supervisor);
                self.print(&format!("  supervisor of {vm} killed"));
            }
        }
    }

    /// Result of a call that must succeed.
    pub fn call_ok(&self, method: &str, arguments: &Value) -> Value {
        self.print(&format!("{method} {arguments}"));
        self.host.ok(method, arguments)
    }

    #[allow(clippy::print_stdout)]
    pub fn print(&self, what: &str) {
        println!("  {what}");
    }

    /// The VM to which the disk is attached.
    pub fn holder(&self, disk: &DiskCid) -> Option<&VmCid> {
        self.vms.iter().find_map(|(cid, vm)| vm.disks.contains(disk).then_some(cid))
    }

    /// Adds a VM that create_vm has answered.
    pub fn add_vm(&mut self, cid: VmCid) {
        self.vms.insert(
            cid,
            Vm { power: Power::On, disks: BTreeSet::new(), name: None, restarted_by: None },
        );
    }

    /// Deletes whole objects of killed creates: the caller has no cid for them, so the model has
    /// none. The next create removes unfinished ones.
    pub fn delete_unknown_objects(&mut self) {
        let pending = self.host.store().pending_dir();
        eventually("the next create removes unfinished creates", || {
            let disk = self.host.disk();
            self.host.ok("delete_disk", &json!([disk]));
            pending.read_dir().unwrap().next().is_none().then_some(())
        });
        let store = self.host.store();
        self.delete_unknown::<VmRecord>(
            "delete_vm",
            |modelled, cid| modelled.vms.contains_key(cid),
            &store.list::<VmRecord>().unwrap(),
        );
        self.delete_unknown::<DiskRecord>(
            "delete_disk",
            |modelled, cid| modelled.disks.contains_key(cid),
            &store.list::<DiskRecord>().unwrap(),
        );
        let snapshots = store.list::<SnapshotRecord>().unwrap();
        self.delete_unknown::<SnapshotRecord>(
            "delete_snapshot",
            |modelled, cid| modelled.snapshots.contains_key(cid),
            &snapshots,
        );
        let stemcells = store.list::<StemcellRecord>().unwrap();
        self.delete_unknown::<StemcellRecord>(
            "delete_stemcell",
            |modelled, cid| modelled.stemcells.contains(cid),
            &stemcells,
        );
    }

    fn delete_unknown<R: Record>(
        &mut self,
        delete: &str,
        known: impl Fn(&Self, &R::Cid) -> bool,
        all: &[R::Cid],
    ) {
        for cid in all {
            if !known(self, cid) {
                let record = self.host.store().read::<R>(cid).unwrap().expect("a record");
                assert_eq!(record.phase(), Phase::Ready, "{cid} was not undone");
                self.call_ok(delete, &json!([cid.as_str()]));
                self.deleted.insert(cid.to_string());
            }
        }
    }

    /// Asserts that the host matches the model.
    pub fn check(&self) {
        assert_eq!(self.power_unknown, None, "a step left a VM in an unknown power state");
        let store = self.host.store();
        assert_same(
            "stemcells",
            store.list::<StemcellRecord>().unwrap(),
            self.stemcells.iter().cloned(),
        );
        assert_same("disks", store.list::<DiskRecord>().unwrap(), self.disks.keys().cloned());
        assert_same(
            "snapshots",
            store.list::<SnapshotRecord>().unwrap(),
            self.snapshots.keys().cloned(),
        );
        let listed = list_when_all_answer(&self.host);
        let cid = |line: &Value| line["cid"].as_str().unwrap().parse::<VmCid>().unwrap();
        assert_same("VMs", listed.as_array().unwrap().iter().map(cid), self.vms.keys().cloned());
        for line in listed.as_array().unwrap() {
            self.check_vm(&cid(line), line);
        }
        for disk in self.disks.keys() {
            assert_eq!(self.host.ok("has_disk", &json!([disk])), true, "{disk}");
            let record = store.read::<DiskRecord>(disk).unwrap().unwrap();
            assert_eq!(record.phase, Phase::Ready);
            if let Some(holder) = self.holder(disk) {
                assert_eq!(record.vm.as_ref(), Some(holder), "the record of {disk} names its VM");
            }
        }
        for cid in &self.deleted {
            let method = if cid.starts_with("vm-") { "has_vm" } else { "has_disk" };
            if !cid.starts_with("stemcell-") && !cid.starts_with("snap-") {
                assert_eq!(self.host.ok(method, &json!([cid])), false, "{cid} reappeared");
            }
        }
        let records: Vec<_> = self.vms.keys().map(|vm| self.host.record(vm)).collect();
        let nics = || records.iter().flat_map(|vm| &vm.nics);
        let distinct = [
            records.iter().map(|vm| vm.uid).collect::<BTreeSet<_>>().len(),
            nics().map(|nic| nic.mac.to_string()).collect::<BTreeSet<_>>().len(),
            nics()
                .map(|nic| nic.tap().expect("a tap").0.to_string())
                .collect::<BTreeSet<_>>()
                .len(),
        ];
        assert_eq!(distinct, [records.len(); 3], "uids, MACs and taps are each VM's own");
    }

    fn check_vm(&self, cid: &VmCid, line: &Value) {
        let vm = &self.vms[cid];
        assert_eq!(line["phase"], "ready", "{line}");
        let runs = line["state"] == "running";
        assert_eq!(runs, vm.power == Power::On, "{vm:?} is {line}");
        assert_eq!(line["metadata"]["name"].as_str(), vm.name.as_deref(), "{line}");
        assert_eq!(self.host.ok("has_vm", &json!([cid])), true);
        let disks = self.host.ok("get_disks", &json!([cid]));
        let parsed =
            disks.as_array().unwrap().iter().map(|disk| disk.as_str().unwrap().parse().unwrap());
        assert_same(&format!("get_disks {cid}"), parsed, vm.disks.iter().cloned());
        if runs {
            let devices =
                self.host.qmp(cid, "qom-list", &json!({"path": "/machine/peripheral"})).unwrap();
            let names =
                devices.as_array().unwrap().iter().filter_map(|device| device["name"].as_str());
            let plugged =
                names.filter(|name| name.starts_with("disk-")).map(|name| name.parse().unwrap());
            assert_same(&format!("disks in the QEMU of {cid}"), plugged, vm.disks.iter().cloned());
        }
    }
}

fn assert_same<T: Ord + Debug>(
    what: &str,
    there: impl IntoIterator<Item = T>,
    must: impl IntoIterator<Item = T>,
) {
    let (there, must): (BTreeSet<_>, BTreeSet<_>) =
        (there.into_iter().collect(), must.into_iter().collect());
    assert_eq!(there, must, "{what}: the host has the left, the model the right");
}
