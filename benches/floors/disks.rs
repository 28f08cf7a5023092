//! Hot-plug: until the guest sees a disk, until it has let go of one, and sixteen of them in a row.

use std::time::Duration;

use serde_json::{Value, json};

use crate::bare::BareQemu;
use crate::lab::{Lab, Vm};
use crate::libvirt::Libvirt;
use crate::table::{Table, Target};
use crate::timed;

/// How many disks a VM has slots for.
const DISKS: usize = 16;

/// One disk, there and back, the guest running: its word is waited for. The VM has had one disk before.
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

/// Sixteen disks on one VM, one after the other. What the last costs, beside the first: it must not grow.
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
        // The first to go is the one among sixteen.
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

/// The same two through libvirt, whose time is the floor here.
///
/// # Errors
/// Why that can not be measured.
pub fn beside_libvirt(lab: &Lab, table: &mut Table, rounds: u32) -> Result<(), String> {
    let mut theirs = Libvirt::start(lab)?;
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
        theirs.resume();
        let (their_attach, ()) = timed(|| theirs.attach());
        let (their_detach, ()) = timed(|| theirs.detach());
        theirs.pause();
        table.add("attach_disk, floor: virsh", Target::Ratio(1.0), attached, their_attach);
        table.add("detach_disk, floor: virsh", Target::Ratio(1.0), detached, their_detach);
    }
    lab.call("delete_vm", &json!([vm.cid]));
    lab.call("delete_disk", &json!([disk]));
    Ok(())
}
