//! Measures the cost of every operation against its floor, the least possible cost: `cargo bench`.
//!
//! ```text
//!   cpi     one process of this program per call, JSON in, JSON out, as a Director calls it
//!   floor   the same QEMU command line without anything else: no confinement, no bridge, no
//!           record, no fsync
//! ```
//!
//! Both are measured alternately in one run, because times vary by machine and by minute; the ratio
//! counts. The guest is the selftest's boot sector under emulation. It polls, which takes a CPU and
//! QEMU's big lock, so it is paused unless its output is awaited. Everything is in temporary
//! directories and in a separate network namespace. The benchmark needs root, `qemu-system-x86_64`,
//! `qemu-img` and `tar`. It fails only if an operation fails, never because of a time.
//!
//! `cargo bench -- 30` takes 30 rounds instead of 10, `cargo bench -- copies` runs the section
//! "copies" only. `FLOORS_CPI=<binary>` measures another build.
#![allow(clippy::print_stdout)]

mod bare;
mod copies;
mod disks;
mod lab;
mod libvirt;
mod stemcell;
mod table;

use std::process::Command;
use std::time::{Duration, Instant};

use bosh_qemu_cpi::cid::VmCid;
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};

use bare::BareQemu;
use lab::{Lab, Vm};
use table::{Table, Target};

/// A part of the benchmark: name and function.
type Section = (&'static str, fn(&Lab, &mut Table, u32));

const SECTIONS: [Section; 6] = [
    ("calls", calls),
    ("many-vms", among_many_vms),
    ("disks", |lab, table, rounds| disks::sequence(lab, table, rounds.min(5))),
    ("libvirt", compare_with_libvirt),
    ("import", |lab, table, rounds| stemcell::import(lab, table, rounds.min(3))),
    ("copies", |lab, table, rounds| copies::copies(lab, table, rounds.min(5))),
];

fn main() {
    let words: Vec<_> = std::env::args().collect();
    let rounds = words.iter().find_map(|word| word.parse().ok()).unwrap_or(10);
    let is_named = |(name, _): &&Section| words.iter().any(|word| word == name);
    let all = !SECTIONS.iter().any(|section| is_named(&section));
    // Before any thread is created, so that every thread and child is in the namespace.
    unshare(CloneFlags::CLONE_NEWNET).expect("create a network namespace: needs root");
    let lab = Lab::new();
    for (name, section) in SECTIONS.iter().filter(|section| all || is_named(section)) {
        let mut table = Table::default();
        section(&lab, &mut table, rounds);
        println!("{name}: medians of at most {rounds} rounds, milliseconds\n\n{table}");
    }
}

fn calls(lab: &Lab, table: &mut Table, rounds: u32) {
    for round in 0..=rounds {
        // The first round fills caches, the accelerator probe's result and the state directory.
        let mut warm_up = Table::default();
        let table = if round == 0 { &mut warm_up } else { &mut *table };
        call_overhead(lab, table);
        disk_images(lab, table);
        vm_lifecycle(lab, table);
    }
    println!("{}\n", lab.supervisor_memory());
}

fn compare_with_libvirt(lab: &Lab, table: &mut Table, rounds: u32) {
    if let Err(reason) = disks::compare_with_libvirt(lab, table, rounds.min(5)) {
        println!("libvirt is not measured: {reason}\n");
    }
}

/// Runs `job`. Returns its duration and its result.
fn timed<T>(job: impl FnOnce() -> T) -> (Duration, T) {
    let began = Instant::now();
    let result = job();
    (began.elapsed(), result)
}

/// Calls that do almost nothing, compared with a process that does nothing.
fn call_overhead(lab: &Lab, table: &mut Table) {
    let (floor, status) = timed(|| Command::new("/bin/true").status());
    assert!(status.expect("/bin/true").success());
    let (info, _) = lab.call("info", &json!([]));
    table.add("info", Target::Above(3.0), info, floor);
    let (has_vm, answer) = lab.call("has_vm", &json!(["vm-that-never-was"]));
    assert_eq!(answer, false);
    table.add("has_vm", Target::AtMost(3.0), has_vm, floor);
}

fn disk_images(lab: &Lab, table: &mut Table) {
    let (create, disk) = lab.call("create_disk", &json!([1024, {}, null]));
    let image = lab.scratch("disk.qcow2");
    let (floor, ()) =
        timed(|| lab::run("qemu-img", &["create", "-q", "-f", "qcow2", &image, "1G"]));
    table.add("create_disk", Target::Ratio(1.0), create, floor);
    let (delete, _) = lab.call("delete_disk", &json!([disk]));
    let (floor, removed) = timed(|| std::fs::remove_file(&image));
    removed.expect("remove the image");
    table.add("delete_disk", Target::AtMost(10.0), delete, floor);
}

/// A VM's operations, compared with those of a bare QEMU.
fn vm_lifecycle(lab: &Lab, table: &mut Table) {
    let (first_created, first) = lab.create_vm();
    first.pause();
    let (created, vm) = lab.create_vm();
    vm.wait_for("BOOTSECTOR-OK", 1);
    vm.pause();
    let (floor, mut bare) = timed(|| BareQemu::create(lab, &vm));
    bare.wait_for("BOOTSECTOR-OK");
    bare.pause();
    table.add("create_vm", Target::Ratio(1.35), created, floor);
    table.add("create_vm, first of its network", Target::Ratio(1.35), first_created, floor);

    let (_, disk) = lab.call("create_disk", &json!([64, {}, null]));
    let (attached, _) = lab.call("attach_disk", &json!([vm.cid, disk]));
    vm.resume();
    vm.wait_for("\nU", 1);
    let (detached, _) = lab.call("detach_disk", &json!([vm.cid, disk]));
    vm.pause();
    lab.call("delete_disk", &json!([disk]));
    let (attach_floor, ()) = timed(|| bare.attach(lab));
    bare.resume();
    bare.wait_for("U");
    let (detach_floor, ()) = timed(|| bare.detach());
    table.add("attach_disk", Target::AtMost(15.0), attached, attach_floor);
    table.add("detach_disk", Target::Above(10.0), detached, detach_floor);

    disks::until_seen(lab, &vm, &mut bare, table);
    bare.resume();

    let (reboot_floor, ()) = timed(|| bare.reboot(lab, &vm));
    bare.wait_for("BOOTSECTOR-OK");
    bare.pause();
    vm.resume();
    let (rebooted, _) = lab.call("reboot_vm", &json!([vm.cid]));
    vm.wait_for("BOOTSECTOR-OK", 2);
    table.add("reboot_vm", Target::Ratio(1.35), rebooted, reboot_floor);

    lab.sample_supervisor_memory(&vm);
    let (deleted, _) = lab.call("delete_vm", &json!([vm.cid]));
    let (last_deleted, _) = lab.call("delete_vm", &json!([first.cid]));
    let (floor, ()) = timed(|| bare.kill());
    table.add("delete_vm", Target::AtMost(40.0), deleted, floor);
    table.add("delete_vm, last of its network", Target::AtMost(40.0), last_deleted, floor);
}

/// The same among the records of 1,000 other VMs. The floor is the time without them.
fn among_many_vms(lab: &Lab, table: &mut Table, rounds: u32) {
    let (_, first) = lab.create_vm();
    first.pause();
    let alone: Vec<_> = (0..rounds).map(|_| has_and_create_vm(lab, &first)).collect();
    lab.add_vm_records(&first, 1000);
    let crowded = (0..rounds).map(|_| has_and_create_vm(lab, &first));
    for ((has_vm, create), (has_vm_alone, create_alone)) in crowded.zip(alone) {
        table.add("has_vm among 1,000 VMs", Target::Ratio(1.05), has_vm, has_vm_alone);
        table.add("create_vm among 1,000 VMs", Target::Ratio(1.05), create, create_alone);
    }
    lab.call("delete_vm", &json!([first.cid]));
}

fn has_and_create_vm(lab: &Lab, known: &Vm) -> (Duration, Duration) {
    let (has_vm, answer) = lab.call("has_vm", &json!([known.cid]));
    assert_eq!(answer, true);
    let (create, vm) = lab.create_vm();
    lab.call("delete_vm", &json!([vm.cid]));
    (has_vm, create)
}

/// Parses a VM's cid.
fn cid(answer: &Value) -> VmCid {
    serde_json::from_value(answer.clone()).expect("a VM's cid")
}
