//! Hot-plug: until the guest sees a disk, until it has released one, and sixteen disks in a row.

use std::time::Duration;

use serde_json::{Value, json};

use crate::bare::BareQemu;
use crate::lab::{Lab, Vm};
use crate::libvirt::Libvirt;
use crate::table::{Table, Target};
use crate::timed;

/// Number of hot-plug slots of a VM.
const DISKS: usize = 16;

/// Attaches and detaches one disk and waits for the guest's output. The VM has had one disk before.
pub fn until_seen(lab: &Lab, vm: &Vm, bare: &mut BareQemu, table: &mut Table) {
    let (_, disk) = lab.call("create_disk", &json!([64, {}, null]));
    vm.resume();
    let (attached, ()) = timed(|| {
        lab.call("attach_disk", &json!([vm.cid, disk]));
        vm.wait_for("\nU", 2);
    });
    let (detached, _) = lab.call("detach_disk", &json!([vm.cid, disk]));
    vm.pause();
    lab.call("delete_disk", &json!([disk]));
    bare.resume();
    let (attach_floor, ()) = timed(|| {
        bare.attach(lab);
        bare.wait_for("U");
    });
    let (detach_floor, ()) = timed(|| bare.detach());
    bare.pause();
    table.add("attach_disk until the guest sees", Target::Above(25.0), attached, attach_floor);
    table.add("detach_disk until it is unlocked", Target::Above(10.0), detached, detach_floor);
}

/// Attaches sixteen disks to one VM, one after the other. The cost of the last must not exceed that
/// of the first.
pub fn sequence(lab: &Lab, table: &mut Table, rounds: u32) {
    let (_, vm) = lab.create_vm();
    vm.wait_for("BOOTSECTOR-OK", 1);
    let disks: Vec<Value> =
        (0..DISKS).map(|_| lab.call("create_disk", &json!([64, {}, null])).1).collect();
    let each = |method: &str| -> Vec<Duration> {
        disks.iter().map(|disk| lab.call(method, &json!([vm.cid, disk])).0).collect()
    };
    for _ in 0..rounds {
        vm.pause();
        let attached = each("attach_disk");
        vm.resume();
        let detached = each("detach_disk");
        table.add(
            "attach_disk, 16th and 1st of 16",
            Target::Ratio(1.5),
            attached[DISKS - 1],
            attached[0],
        );
        // The first detach happens with sixteen disks attached.
        table.add(
            "detach_disk, 1st and 16th of 16",
            Target::Ratio(1.5),
            detached[0],
            detached[DISKS - 1],
        );
    }
    lab.call("delete_vm", &json!([vm.cid]));
    for disk in &disks {
        lab.call("delete_disk", &json!([disk]));
    }
}

/// Attaches and detaches a disk, with libvirt as the floor.
///
/// # Errors
/// Why libvirt cannot be measured.
pub fn compare_with_libvirt(lab: &Lab, table: &mut Table, rounds: u32) -> Result<(), String> {
    let mut libvirt = Libvirt::start(lab)?;
    let (_, vm) = lab.create_vm();
    vm.wait_for("BOOTSECTOR-OK", 1);
    let (_, disk) = lab.call("create_disk", &json!([64, {}, null]));
    vm.pause();
    for round in 1..=rounds as usize {
        vm.resume();
        let (attached, ()) = timed(|| {
            lab.call("attach_disk", &json!([vm.cid, disk]));
            vm.wait_for("\nU", round);
        });
        let (detached, _) = lab.call("detach_disk", &json!([vm.cid, disk]));
        vm.pause();
        libvirt.resume();
        let (libvirt_attach, ()) = timed(|| libvirt.attach());
        let (libvirt_detach, ()) = timed(|| libvirt.detach());
        libvirt.pause();
        table.add("attach_disk, floor: virsh", Target::Ratio(1.0), attached, libvirt_attach);
        table.add("detach_disk, floor: virsh", Target::Ratio(1.0), detached, libvirt_detach);
    }
    lab.call("delete_vm", &json!([vm.cid]));
    lab.call("delete_disk", &json!([disk]));
    Ok(())
}
