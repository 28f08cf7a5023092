//! The steps, one function each.

use bosh_qemu_cpi::cid::{Cid, DiskCid, VmCid};
use bosh_qemu_cpi::sys::pidfd::Process;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::disks;
use super::modelled_host::{Disk, HOTPLUG_SLOTS, ModelledHost, Power};
use super::random::Random;
use crate::support::answer::Failure;
use crate::support::host::{eventually, vm_cid, wait_for_exit};

/// A step: it acts on the host and updates the model.
pub type Step = fn(&mut ModelledHost, &mut Random);

/// Weight of each step.
const STEPS: &[(u64, Step)] = &[
    (4, create_vm),
    (2, delete_vm),
    (3, reboot_vm),
    (4, create_disk),
    (2, delete_disk),
    (8, attach_disk),
    (6, detach_disk),
    (2, set_vm_metadata),
    (1, disks::set_disk_metadata),
    (3, disks::write_data),
    (2, disks::resize_disk),
    (2, disks::update_disk),
    (2, disks::snapshot_disk),
    (1, disks::delete_snapshot),
    (1, disks::restore),
    (1, create_stemcell),
    (1, delete_stemcell),
    (2, |modelled, random| kill_qemu(modelled, random, None)),
    (2, |modelled, random| kill_supervisor(modelled, random, None)),
    (2, power_guest_off),
    (1, restart_host),
    (1, cut_power),
];

/// Most VMs at a time, because their guests are emulated.
const MOST_VMS: usize = 4;
pub const MOST_DISKS: usize = 6;
const MOST_STEMCELLS: usize = 3;

/// Picks a step by weight.
pub fn pick_step(random: &mut Random) -> Step {
    let all = STEPS.iter().flat_map(|(weight, step)| std::iter::repeat_n(*step, *weight as usize));
    random.pick(all).expect("there are steps")
}

/// Makes an idempotent call. If it is killed, another step may follow before it is repeated.
fn call_until_done(
    modelled: &mut ModelledHost,
    random: &mut Random,
    method: &str,
    arguments: &Value,
) -> Result<Value, Failure> {
    let vm = arguments[0].as_str().and_then(|cid| cid.parse::<VmCid>().ok());
    match modelled.attempt(random, method, arguments) {
        Some(outcome) => outcome,
        None => {
            modelled.power_unknown =
                vm.clone().filter(|_| ["reboot_vm", "delete_vm"].contains(&method));
            step_between_calls(modelled, random, vm);
            modelled.power_unknown = None;
            modelled.print(&format!("{method} again"));
            modelled.host.call(method, arguments).outcome
        }
    }
}

/// A step that may follow a killed call, before the next call.
pub fn step_between_calls(modelled: &mut ModelledHost, random: &mut Random, vm: Option<VmCid>) {
    match random.next() % 6 {
        0 => kill_qemu(modelled, random, vm),
        1 => kill_supervisor(modelled, random, vm),
        2 => {
            lose_power(modelled);
            // The next call may come before `host start`.
            if random.one_in(2) {
                host_start(modelled, random);
            }
        }
        _ => {}
    }
}

pub fn assert_refused(outcome: Result<Value, Failure>, why: &str) {
    let failure = outcome.expect_err(why);
    assert!(failure.message.contains(why), "{why:?} in {failure:?}");
}

fn random_vm(modelled: &ModelledHost, random: &mut Random) -> Option<VmCid> {
    random.pick(modelled.vms.keys().cloned())
}

fn random_disk(modelled: &ModelledHost, random: &mut Random) -> Option<DiskCid> {
    random.pick(modelled.disks.keys().cloned())
}

fn create_vm(modelled: &mut ModelledHost, random: &mut Random) {
    let Some(stemcell) = random.pick(modelled.stemcells.iter().cloned()) else { return };
    if modelled.vms.len() >= MOST_VMS {
        return;
    }
    let arguments = modelled.host.vm_arguments(stemcell.as_str());
    match modelled.attempt(random, "create_vm", &arguments) {
        Some(made) => modelled.add_vm(vm_cid(&made.expect("create_vm"))),
        None => {
            step_between_calls(modelled, random, None);
            let made = modelled.call_ok("create_vm", &arguments);
            modelled.add_vm(vm_cid(&made));
            modelled.delete_unknown_objects();
        }
    }
}

fn delete_vm(modelled: &mut ModelledHost, random: &mut Random) {
    let Some(vm) = random_vm(modelled, random) else { return };
    call_until_done(modelled, random, "delete_vm", &json!([vm])).expect("delete_vm");
    modelled.vms.remove(&vm);
    modelled.deleted.insert(vm.to_string());
}

fn reboot_vm(modelled: &mut ModelledHost, random: &mut Random) {
    let Some(vm) = random_vm(modelled, random) else { return };
    call_until_done(modelled, random, "reboot_vm", &json!([vm])).expect("reboot_vm");
    let vm = modelled.vms.get_mut(&vm).unwrap();
    (vm.power, vm.restarted_by) = (Power::On, None);
}

fn create_disk(modelled: &mut ModelledHost, random: &mut Random) {
    if modelled.disks.len() >= MOST_DISKS {
        return;
    }
    let disk = |made: &Value| made.as_str().unwrap().parse().unwrap();
    match modelled.attempt(random, "create_disk", &json!([8, {}, null])) {
        Some(made) => {
            let new = Disk { size: 8, format: "qcow2", data: 0, metadata: json!({}) };
            modelled.disks.insert(disk(&made.expect("create_disk")), new);
        }
        None => {
            step_between_calls(modelled, random, None);
            modelled.delete_unknown_objects();
        }
    }
}

fn delete_disk(modelled: &mut ModelledHost, random: &mut Random) {
    let Some(disk) = random_disk(modelled, random) else { return };
    let outcome = call_until_done(modelled, random, "delete_disk", &json!([disk]));
    match modelled.holder(&disk) {
        Some(_) => assert_refused(outcome, "is attached to VM"),
        None => {
            // A repeated call may find that the killed one has deleted the disk.
            let is_deleted =
                outcome.is_ok() || outcome.is_err_and(|failure| failure.kind == "DiskNotFound");
            assert!(is_deleted, "delete_disk");
            modelled.disks.remove(&disk);
            modelled.deleted.insert(disk.to_string());
        }
    }
}

fn attach_disk(modelled: &mut ModelledHost, random: &mut Random) {
    let (Some(vm), Some(disk)) = (random_vm(modelled, random), random_disk(modelled, random))
    else {
        return;
    };
    let arguments = json!([vm, disk]);
    let refusal = match modelled.holder(&disk) {
        Some(holder) if *holder != vm => Some("is attached to VM"),
        None if modelled.vms[&vm].disks.len() == HOTPLUG_SLOTS => Some("disk slots of VM"),
        _ => None,
    };
    let take_back = random.one_in(3);
    let outcome = match modelled.attempt(random, "attach_disk", &arguments) {
        Some(outcome) => outcome,
        None => {
            step_between_calls(modelled, random, Some(vm.clone()));
            if take_back && refusal.is_none() {
                modelled.call_ok("detach_disk", &arguments);
                modelled.vms.get_mut(&vm).unwrap().disks.remove(&disk);
                return;
            }
            modelled.host.call("attach_disk", &arguments).outcome
        }
    };
    match refusal {
        Some(why) => assert_refused(outcome, why),
        None => {
            assert_eq!(
                outcome.expect("attach_disk")["path"],
                format!("/dev/disk/by-id/virtio-{disk}")
            );
            modelled.vms.get_mut(&vm).unwrap().disks.insert(disk.clone());
            disks::assert_disk(modelled, &disk);
        }
    }
}

fn detach_disk(modelled: &mut ModelledHost, random: &mut Random) {
    let attached = modelled
        .vms
        .iter()
        .flat_map(|(cid, vm)| vm.disks.iter().map(move |disk| (cid.clone(), disk.clone())));
    let Some((vm, disk)) = random.pick(attached.collect::<Vec<_>>()) else { return };
    // Sometimes a disk that is not attached.
    let disk = if random.one_in(6) { random_disk(modelled, random).unwrap_or(disk) } else { disk };
    call_until_done(modelled, random, "detach_disk", &json!([vm, disk])).expect("detach_disk");
    modelled.vms.get_mut(&vm).unwrap().disks.remove(&disk);
    disks::assert_disk(modelled, &disk);
}

fn set_vm_metadata(modelled: &mut ModelledHost, random: &mut Random) {
    let Some(vm) = random_vm(modelled, random) else { return };
    let name = format!("job/{}", random.next() % 100);
    call_until_done(modelled, random, "set_vm_metadata", &json!([vm, {"name": name}]))
        .expect("set_vm_metadata");
    modelled.vms.get_mut(&vm).unwrap().name = Some(name);
}

fn create_stemcell(modelled: &mut ModelledHost, random: &mut Random) {
    if modelled.stemcells.len() >= MOST_STEMCELLS {
        return;
    }
    match modelled.attempt(random, "create_stemcell", &json!([modelled.host.path("image"), {}])) {
        Some(made) => drop(
            modelled
                .stemcells
                .insert(made.expect("create_stemcell").as_str().unwrap().parse().unwrap()),
        ),
        None => {
            step_between_calls(modelled, random, None);
            modelled.delete_unknown_objects();
        }
    }
}

/// VMs of the stemcell keep running.
fn delete_stemcell(modelled: &mut ModelledHost, random: &mut Random) {
    if modelled.stemcells.len() < 2 {
        return;
    }
    let Some(stemcell) = random.pick(modelled.stemcells.iter().cloned()) else { return };
    call_until_done(modelled, random, "delete_stemcell", &json!([stemcell]))
        .expect("delete_stemcell");
    modelled.stemcells.remove(&stemcell);
    modelled.deleted.insert(stemcell.to_string());
}

fn kill_qemu(modelled: &mut ModelledHost, random: &mut Random, vm: Option<VmCid>) {
    let Some(vm) = vm.or_else(|| random_vm(modelled, random)) else { return };
    let (Some(qemu), supervisor) = (modelled.host.qemu(&vm), modelled.host.supervisor(&vm)) else {
        return;
    };
    modelled.print(&format!(
        "QEMU of {vm} dies, supervisor {:?}",
        supervisor.as_ref().map(Process::pid)
    ));
    qemu.signal(Signal::SIGKILL).unwrap();
    wait_for_exit(&qemu);
    if modelled.power_unknown.as_ref() == Some(&vm) {
        return;
    }
    let Some(model) = modelled.vms.get_mut(&vm) else { return };
    match supervisor.as_ref().map(Process::pid) {
        // The supervisor restarts the VM after a second. Its next restart takes longer, so this
        // step calls reboot_vm instead.
        Some(pid) if model.restarted_by != Some(pid) => {
            model.restarted_by = Some(pid);
            eventually("the supervisor restarts QEMU", || {
                modelled.host.qemu(&vm).filter(|new| new.pid() != qemu.pid())
            });
            eventually("the guest runs", || {
                modelled
                    .host
                    .qmp(&vm, "query-status", &json!({}))
                    .ok()
                    .filter(|status| status["running"] == true)
            });
        }
        Some(_) => {
            modelled.call_ok("reboot_vm", &json!([vm]));
            modelled.vms.get_mut(&vm).unwrap().restarted_by = None;
        }
        None => model.power = Power::Off { should_run: true },
    }
}

fn kill_supervisor(modelled: &mut ModelledHost, random: &mut Random, vm: Option<VmCid>) {
    let Some(vm) = vm.or_else(|| random_vm(modelled, random)) else { return };
    let Some(supervisor) = modelled.host.supervisor(&vm) else { return };
    modelled.print(&format!("supervisor of {vm} dies"));
    supervisor.signal(Signal::SIGKILL).unwrap();
    wait_for_exit(&supervisor);
}

/// A supervisor records that the guest powered itself off. Without a supervisor the reason is
/// unknown, so the VM should run.
fn power_guest_off(modelled: &mut ModelledHost, random: &mut Random) {
    let Some(vm) = random_vm(modelled, random).filter(|vm| modelled.vms[vm].power == Power::On)
    else {
        return;
    };
    let (qemu, supervisor) =
        (modelled.host.qemu(&vm).expect("QEMU"), modelled.host.supervisor(&vm));
    modelled
        .print(&format!("guest of {vm} powers itself off, supervised: {}", supervisor.is_some()));
    eventually("the guest follows its power button", || {
        let _ = modelled.host.qmp(&vm, "system_powerdown", &json!({}));
        qemu.wait_exit(std::time::Instant::now() + std::time::Duration::from_millis(500))
            .unwrap()
            .then_some(())
    });
    if let Some(supervisor) = &supervisor {
        wait_for_exit(supervisor);
    }
    modelled.vms.get_mut(&vm).unwrap().power = Power::Off { should_run: supervisor.is_none() };
}

fn restart_host(modelled: &mut ModelledHost, random: &mut Random) {
    modelled.print("host stop");
    let (passed, printed) = modelled.host.command(&["host", "stop", "--timeout", "5", "--json"]);
    assert!(passed, "{printed}");
    for vm in modelled.vms.values_mut().filter(|vm| vm.power == Power::On) {
        vm.power = Power::Off { should_run: true };
    }
    if random.one_in(2) {
        modelled.check();
    }
    host_start(modelled, random);
}

fn cut_power(modelled: &mut ModelledHost, random: &mut Random) {
    lose_power(modelled);
    if random.one_in(2) {
        modelled.check();
    }
    host_start(modelled, random);
}

fn lose_power(modelled: &mut ModelledHost) {
    modelled.print("power cut");
    modelled.power_cuts += 1;
    modelled.host.lose_power();
    for vm in modelled.vms.values_mut().filter(|vm| vm.power == Power::On) {
        vm.power = Power::Off { should_run: true };
    }
}

fn host_start(modelled: &mut ModelledHost, random: &mut Random) {
    let killed = modelled.kill_host_start(random);
    modelled.print("host start");
    let (passed, printed) = modelled.host.command(&["host", "start", "--json"]);
    assert!(passed, "{printed}");
    for (cid, vm) in &mut modelled.vms {
        if modelled.power_unknown.as_ref() == Some(cid) {
            continue;
        }
        let line = printed["vms"].as_array().unwrap().iter().find(|line| line["vm"] == json!(cid));
        let state = &line.unwrap_or_else(|| panic!("{cid} is not in {printed}"))["state"];
        match vm.power {
            Power::On => assert!(state == "running" || state == "adopted", "{cid} {state}"),
            Power::Off { should_run: true } if killed => {
                assert!(
                    ["started", "running", "adopted"].iter().any(|word| state == word),
                    "{cid} {state}"
                );
            }
            Power::Off { should_run: true } => assert_eq!(state, "started", "{cid}"),
            Power::Off { should_run: false } => assert!(state["off"].is_string(), "{cid} {state}"),
        }
        if vm.power == (Power::Off { should_run: true }) {
            (vm.power, vm.restarted_by) = (Power::On, None);
        }
    }
}
