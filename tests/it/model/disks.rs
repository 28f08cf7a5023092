//! What can happen to a disk's size, image and data, and to its snapshots.

use std::path::Path;

use bosh_qemu_cpi::cid::{Cid, DiskCid, SnapshotCid, VmCid};
use bosh_qemu_cpi::store::{DiskRecord, SnapshotRecord};
use serde_json::{Value, json};

use super::modelled_host::{Disk, ModelledHost, Power};
use super::random::Random;
use super::steps::{MOST_DISKS, meanwhile, must_refuse};
use crate::disk::metadata::metadata;
use crate::support::answer::Failure;
use crate::support::images::{guest_writes, image, qemu_io, record};

/// The most snapshots there are at a time.
const MOST_SNAPSHOTS: usize = 3;
/// How large a disk becomes, MiB.
const LARGEST: u64 = 40;

fn a_disk(modelled: &ModelledHost, random: &mut Random) -> Option<DiskCid> {
    random.pick(modelled.disks.keys().cloned())
}

/// The VM that has the disk open.
fn runs_with(modelled: &ModelledHost, disk: &DiskCid) -> Option<VmCid> {
    modelled.holder(disk).filter(|vm| modelled.vms[*vm].power == Power::On).cloned()
}

/// Calls on a disk that a repeated call brings to the same end; if it is killed, something else may happen first.
fn settled(
    modelled: &mut ModelledHost,
    random: &mut Random,
    method: &str,
    arguments: &Value,
) -> Result<Value, Failure> {
    let disk: DiskCid = arguments[0].as_str().unwrap().parse().unwrap();
    let holder = modelled.holder(&disk).cloned();
    modelled.attempt(random, method, arguments).unwrap_or_else(|| {
        meanwhile(modelled, random, holder);
        modelled.say(&format!("{method} again"));
        modelled.host.call(method, arguments).outcome
    })
}

pub fn data_is_written(modelled: &mut ModelledHost, random: &mut Random) {
    let Some(disk) = a_disk(modelled, random) else { return };
    let data = (random.next() % 256) as u8;
    modelled.say(&format!("{data} is written to {disk}"));
    let write = format!("write -P {data} 0 1M");
    match runs_with(modelled, &disk) {
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
    let Some(disk) = a_disk(modelled, random) else { return };
    let is = modelled.disks[&disk].size;
    let size = if random.one_in(5) { is - 1 } else { (is + random.next() % 3).min(LARGEST) };
    let outcome = settled(modelled, random, "resize_disk", &json!([disk, size]));
    if size < is {
        must_refuse(outcome, "disks only grow");
    } else {
        outcome.expect("resize_disk");
        modelled.disks.get_mut(&disk).unwrap().size = size;
    }
    check_data(modelled, &disk);
}

pub fn update_disk(modelled: &mut ModelledHost, random: &mut Random) {
    let Some(disk) = a_disk(modelled, random) else { return };
    let size = (modelled.disks[&disk].size + random.next() % 2).min(LARGEST);
    let format = random.pick(["raw", "qcow2"]).unwrap();
    settled(modelled, random, "update_disk", &json!([disk, size, {"format": format}]))
        .expect("update_disk");
    let model = modelled.disks.get_mut(&disk).unwrap();
    (model.size, model.format) = (size, format);
    check_data(modelled, &disk);
}

pub fn set_disk_metadata(modelled: &mut ModelledHost, random: &mut Random) {
    let Some(disk) = a_disk(modelled, random) else { return };
    let tags = json!({"owner": random.next() % 100});
    settled(modelled, random, "set_disk_metadata", &json!([disk, tags]))
        .expect("set_disk_metadata");
    modelled.disks.get_mut(&disk).unwrap().metadata = tags;
}

pub fn snapshot_disk(modelled: &mut ModelledHost, random: &mut Random) {
    let Some(disk) = a_disk(modelled, random).filter(|_| modelled.snapshots.len() < MOST_SNAPSHOTS)
    else {
        return;
    };
    let holder = modelled.holder(&disk).cloned();
    match modelled.attempt(random, "snapshot_disk", &json!([disk, {}])) {
        Some(made) => {
            let snapshot: SnapshotCid =
                made.expect("snapshot_disk").as_str().unwrap().parse().unwrap();
            modelled.snapshots.insert(snapshot.clone(), modelled.disks[&disk].clone());
            check_snapshot(modelled, &snapshot);
        }
        None => {
            meanwhile(modelled, random, holder);
            modelled.remove_strays();
        }
    }
    check_data(modelled, &disk);
}

pub fn delete_snapshot(modelled: &mut ModelledHost, random: &mut Random) {
    let Some(snapshot) = random.pick(modelled.snapshots.keys().cloned()) else { return };
    check_snapshot(modelled, &snapshot);
    if modelled.attempt(random, "delete_snapshot", &json!([snapshot])).is_none() {
        modelled.must("delete_snapshot", &json!([snapshot]));
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
    modelled.say(&format!("disk restore {snapshot}"));
    let output = modelled.host.cpi().args(["disk", "restore", snapshot.as_str()]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let disk: DiskCid = String::from_utf8(output.stdout).unwrap().trim().parse().unwrap();
    modelled.disks.insert(
        disk.clone(),
        Disk { metadata: json!({}), ..modelled.snapshots[&snapshot].clone() },
    );
    check_data(modelled, &disk);
}

/// Nothing is begun, and the data is there, of the size and in the format that was asked for.
pub fn check_data(modelled: &ModelledHost, disk: &DiskCid) {
    let (is, model) = (record(&modelled.host, disk), &modelled.disks[disk]);
    assert_eq!((&is.leftover, is.grows_to), (&None, None), "{disk}");
    assert_eq!((is.size.get(), json!(is.format)), (model.size, json!(model.format)), "{disk}");
    assert_eq!(metadata(&modelled.host, disk), model.metadata, "{disk}");
    match runs_with(modelled, disk) {
        Some(vm) => {
            expected(model).iter().for_each(|read| guest_writes(&modelled.host, &vm, disk, read));
        }
        None => check_image(modelled, &image(&modelled.host, disk), &is, model),
    }
}

/// What is read of the whole of a disk. Behind its end there is nothing.
fn expected(disk: &Disk) -> [String; 2] {
    [format!("read -P {} 0 1M", disk.data), format!("read -P 0 1M {}M", disk.size - 1)]
}

fn check_image(modelled: &ModelledHost, path: &Path, of: &DiskRecord, model: &Disk) {
    let reads = expected(model);
    qemu_io(&modelled.host, path, of, &reads.each_ref().map(String::as_str));
    let size = bosh_qemu_cpi::image::virtual_size(path, of.format, of.encrypted).unwrap();
    assert_eq!(size.get() >> 20, model.size, "{}", path.display());
}

fn check_snapshot(modelled: &ModelledHost, snapshot: &SnapshotCid) {
    let store = modelled.host.store();
    let of = store.read::<SnapshotRecord>(snapshot).unwrap().expect("a record");
    let made = of.disk.with_image(&of.image());
    check_image(
        modelled,
        &store.snapshot_image(&of).unwrap(),
        &made,
        &modelled.snapshots[snapshot],
    );
}
