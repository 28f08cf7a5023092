//! Steps about the size, the image, the data and the snapshots of disks.

use std::path::Path;

use bosh_qemu_cpi::cid::{Cid, DiskCid, SnapshotCid, VmCid};
use bosh_qemu_cpi::store::{DiskRecord, SnapshotRecord};
use serde_json::{Value, json};

use super::modelled_host::{Disk, ModelledHost, Power};
use super::random::Random;
use super::steps::{MOST_DISKS, assert_refused, step_between_calls};
use crate::support::answer::Failure;
use crate::support::disks::metadata;
use crate::support::images::{guest_writes, image, qemu_io, record};

/// Most snapshots at a time.
const MOST_SNAPSHOTS: usize = 3;
/// Size of the largest disk, MiB.
const LARGEST_DISK_MIB: u64 = 40;

fn random_disk(modelled: &ModelledHost, random: &mut Random) -> Option<DiskCid> {
    random.pick(modelled.disks.keys().cloned())
}

/// The running VM to which the disk is attached.
fn running_vm_of(modelled: &ModelledHost, disk: &DiskCid) -> Option<VmCid> {
    modelled.holder(disk).filter(|vm| modelled.vms[*vm].power == Power::On).cloned()
}

/// Makes an idempotent call about a disk. If it is killed, another step may follow before it is
/// repeated.
fn call_until_done(
    modelled: &mut ModelledHost,
    random: &mut Random,
    method: &str,
    arguments: &Value,
) -> Result<Value, Failure> {
    let disk: DiskCid = arguments[0].as_str().unwrap().parse().unwrap();
    let holder = modelled.holder(&disk).cloned();
    modelled.attempt(random, method, arguments).unwrap_or_else(|| {
        step_between_calls(modelled, random, holder);
        modelled.print(&format!("{method} again"));
        modelled.host.call(method, arguments).outcome
    })
}

pub fn write_data(modelled: &mut ModelledHost, random: &mut Random) {
    let Some(disk) = random_disk(modelled, random) else { return };
    let data = (random.next() % 256) as u8;
    modelled.print(&format!("{data} is written to {disk}"));
    let write = format!("write -P {data} 0 1M");
    match running_vm_of(modelled, &disk) {
        Some(vm) => {
            guest_writes(&modelled.host, &vm, &disk, &write);
            guest_writes(&modelled.host, &vm, &disk, "flush");
        }
        None => qemu_io(
            &modelled.host,
            &image(&modelled.host, &disk),
            &record(&modelled.host, &disk),
            &[&write, "flush"],
        ),
    }
    modelled.disks.get_mut(&disk).unwrap().data = data;
}

pub fn resize_disk(modelled: &mut ModelledHost, random: &mut Random) {
    let Some(disk) = random_disk(modelled, random) else { return };
    let is = modelled.disks[&disk].size;
    let size =
        if random.one_in(5) { is - 1 } else { (is + random.next() % 3).min(LARGEST_DISK_MIB) };
    let outcome = call_until_done(modelled, random, "resize_disk", &json!([disk, size]));
    if size < is {
        assert_refused(outcome, "a disk cannot shrink");
    } else {
        outcome.expect("resize_disk");
        modelled.disks.get_mut(&disk).unwrap().size = size;
    }
    assert_disk(modelled, &disk);
}

pub fn update_disk(modelled: &mut ModelledHost, random: &mut Random) {
    let Some(disk) = random_disk(modelled, random) else { return };
    let size = (modelled.disks[&disk].size + random.next() % 2).min(LARGEST_DISK_MIB);
    let format = random.pick(["raw", "qcow2"]).unwrap();
    call_until_done(modelled, random, "update_disk", &json!([disk, size, {"format": format}]))
        .expect("update_disk");
    let model = modelled.disks.get_mut(&disk).unwrap();
    (model.size, model.format) = (size, format);
    assert_disk(modelled, &disk);
}

pub fn set_disk_metadata(modelled: &mut ModelledHost, random: &mut Random) {
    let Some(disk) = random_disk(modelled, random) else { return };
    let tags = json!({"owner": random.next() % 100});
    call_until_done(modelled, random, "set_disk_metadata", &json!([disk, tags]))
        .expect("set_disk_metadata");
    modelled.disks.get_mut(&disk).unwrap().metadata = tags;
}

pub fn snapshot_disk(modelled: &mut ModelledHost, random: &mut Random) {
    let Some(disk) =
        random_disk(modelled, random).filter(|_| modelled.snapshots.len() < MOST_SNAPSHOTS)
    else {
        return;
    };
    let holder = modelled.holder(&disk).cloned();
    match modelled.attempt(random, "snapshot_disk", &json!([disk, {}])) {
        Some(made) => {
            let snapshot: SnapshotCid =
                made.expect("snapshot_disk").as_str().unwrap().parse().unwrap();
            modelled.snapshots.insert(snapshot.clone(), modelled.disks[&disk].clone());
            assert_snapshot(modelled, &snapshot);
        }
        None => {
            step_between_calls(modelled, random, holder);
            modelled.delete_unknown_objects();
        }
    }
    assert_disk(modelled, &disk);
}

pub fn delete_snapshot(modelled: &mut ModelledHost, random: &mut Random) {
    let Some(snapshot) = random.pick(modelled.snapshots.keys().cloned()) else { return };
    assert_snapshot(modelled, &snapshot);
    if modelled.attempt(random, "delete_snapshot", &json!([snapshot])).is_none() {
        modelled.call_ok("delete_snapshot", &json!([snapshot]));
    }
    modelled.snapshots.remove(&snapshot);
}

pub fn restore(modelled: &mut ModelledHost, random: &mut Random) {
    let Some(snapshot) = random
        .pick(modelled.snapshots.keys().cloned())
        .filter(|_| modelled.disks.len() < MOST_DISKS)
    else {
        return;
    };
    modelled.print(&format!("disk restore {snapshot}"));
    let output = modelled.host.cpi().args(["disk", "restore", snapshot.as_str()]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let disk: DiskCid = String::from_utf8(output.stdout).unwrap().trim().parse().unwrap();
    modelled.disks.insert(
        disk.clone(),
        Disk { metadata: json!({}), ..modelled.snapshots[&snapshot].clone() },
    );
    assert_disk(modelled, &disk);
}

/// Asserts that no copy is pending and that the disk has the expected size, format, metadata and
/// data.
pub fn assert_disk(modelled: &ModelledHost, disk: &DiskCid) {
    let (is, model) = (record(&modelled.host, disk), &modelled.disks[disk]);
    assert_eq!((&is.inactive_image, is.resize_target), (&None, None), "{disk}");
    assert_eq!((is.size.get(), json!(is.format)), (model.size, json!(model.format)), "{disk}");
    assert_eq!(metadata(&modelled.host, disk), model.metadata, "{disk}");
    match running_vm_of(modelled, disk) {
        Some(vm) => {
            expected(model).iter().for_each(|read| guest_writes(&modelled.host, &vm, disk, read));
        }
        None => assert_image(modelled, &image(&modelled.host, disk), &is, model),
    }
}

/// The qemu-io commands that check the whole content of a disk.
fn expected(disk: &Disk) -> [String; 2] {
    [format!("read -P {} 0 1M", disk.data), format!("read -P 0 1M {}M", disk.size - 1)]
}

fn assert_image(modelled: &ModelledHost, path: &Path, of: &DiskRecord, model: &Disk) {
    let reads = expected(model);
    qemu_io(&modelled.host, path, of, &reads.each_ref().map(String::as_str));
    let size = bosh_qemu_cpi::image::virtual_size(path, of.format, of.encrypted).unwrap();
    assert_eq!(size.get() >> 20, model.size, "{}", path.display());
}

fn assert_snapshot(modelled: &ModelledHost, snapshot: &SnapshotCid) {
    let store = modelled.host.store();
    let of = store.read::<SnapshotRecord>(snapshot).unwrap().expect("a record");
    let made = of.disk.with_image(&of.image());
    assert_image(
        modelled,
        &store.snapshot_image(&of).unwrap(),
        &made,
        &modelled.snapshots[snapshot],
    );
}
