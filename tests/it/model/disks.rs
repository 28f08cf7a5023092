//! What can happen to a disk's size, image and data, and to its snapshots.

use std::path::Path;

use bosh_qemu_cpi::cid::{Cid, DiskCid, SnapshotCid, VmCid};
use bosh_qemu_cpi::store::{DiskRecord, SnapshotRecord};
use serde_json::{Value, json};

use super::lab::{Disk, Lab, Power};
use super::random::Random;
use super::steps::{MOST_DISKS, meanwhile, must_refuse};
use crate::disk_metadata::metadata;
use crate::support::answer::Failure;
use crate::support::images::{guest_writes, image, qemu_io, record};

/// The most snapshots there are at a time.
const MOST_SNAPSHOTS: usize = 3;
/// How large a disk becomes, MiB.
const LARGEST: u64 = 40;

fn a_disk(lab: &Lab, random: &mut Random) -> Option<DiskCid> {
    random.pick(lab.disks.keys().cloned())
}

/// The VM that has the disk open.
fn runs_with(lab: &Lab, disk: &DiskCid) -> Option<VmCid> {
    lab.holder(disk).filter(|vm| lab.vms[*vm].power == Power::On).cloned()
}

/// Calls on a disk that a repeated call brings to the same end; if it is killed, something else may happen first.
fn settled(
    lab: &mut Lab,
    random: &mut Random,
    method: &str,
    arguments: &Value,
) -> Result<Value, Failure> {
    let disk: DiskCid = arguments[0].as_str().unwrap().parse().unwrap();
    let holder = lab.holder(&disk).cloned();
    lab.attempt(random, method, arguments).unwrap_or_else(|| {
        meanwhile(lab, random, holder);
        lab.say(&format!("{method} again"));
        lab.host.call(method, arguments).outcome
    })
}

pub fn data_is_written(lab: &mut Lab, random: &mut Random) {
    let Some(disk) = a_disk(lab, random) else { return };
    let data = (random.next() % 256) as u8;
    lab.say(&format!("{data} is written to {disk}"));
    let write = format!("write -P {data} 0 1M");
    match runs_with(lab, &disk) {
        Some(vm) => {
            guest_writes(&lab.host, &vm, &disk, &write);
            guest_writes(&lab.host, &vm, &disk, "flush");
        }
        None => qemu_io(
            &lab.host,
            &image(&lab.host, &disk),
            &record(&lab.host, &disk),
            &[&write, "flush"],
        ),
    }
    lab.disks.get_mut(&disk).unwrap().data = data;
}

pub fn resize_disk(lab: &mut Lab, random: &mut Random) {
    let Some(disk) = a_disk(lab, random) else { return };
    let is = lab.disks[&disk].size;
    let size = if random.one_in(5) { is - 1 } else { (is + random.next() % 3).min(LARGEST) };
    let outcome = settled(lab, random, "resize_disk", &json!([disk, size]));
    if size < is {
        must_refuse(outcome, "disks only grow");
    } else {
        outcome.expect("resize_disk");
        lab.disks.get_mut(&disk).unwrap().size = size;
    }
    check_data(lab, &disk);
}

pub fn update_disk(lab: &mut Lab, random: &mut Random) {
    let Some(disk) = a_disk(lab, random) else { return };
    let size = (lab.disks[&disk].size + random.next() % 2).min(LARGEST);
    let format = random.pick(["raw", "qcow2"]).unwrap();
    settled(lab, random, "update_disk", &json!([disk, size, {"format": format}]))
        .expect("update_disk");
    let model = lab.disks.get_mut(&disk).unwrap();
    (model.size, model.format) = (size, format);
    check_data(lab, &disk);
}

pub fn set_disk_metadata(lab: &mut Lab, random: &mut Random) {
    let Some(disk) = a_disk(lab, random) else { return };
    let tags = json!({"owner": random.next() % 100});
    settled(lab, random, "set_disk_metadata", &json!([disk, tags])).expect("set_disk_metadata");
    lab.disks.get_mut(&disk).unwrap().metadata = tags;
}

pub fn snapshot_disk(lab: &mut Lab, random: &mut Random) {
    let Some(disk) = a_disk(lab, random).filter(|_| lab.snapshots.len() < MOST_SNAPSHOTS) else {
        return;
    };
    let holder = lab.holder(&disk).cloned();
    match lab.attempt(random, "snapshot_disk", &json!([disk, {}])) {
        Some(made) => {
            let snapshot: SnapshotCid =
                made.expect("snapshot_disk").as_str().unwrap().parse().unwrap();
            lab.snapshots.insert(snapshot.clone(), lab.disks[&disk].clone());
            check_snapshot(lab, &snapshot);
        }
        None => {
            meanwhile(lab, random, holder);
            lab.remove_strays();
        }
    }
    check_data(lab, &disk);
}

pub fn delete_snapshot(lab: &mut Lab, random: &mut Random) {
    let Some(snapshot) = random.pick(lab.snapshots.keys().cloned()) else { return };
    check_snapshot(lab, &snapshot);
    if lab.attempt(random, "delete_snapshot", &json!([snapshot])).is_none() {
        lab.must("delete_snapshot", &json!([snapshot]));
    }
    lab.snapshots.remove(&snapshot);
}

pub fn restore(lab: &mut Lab, random: &mut Random) {
    let Some(snapshot) =
        random.pick(lab.snapshots.keys().cloned()).filter(|_| lab.disks.len() < MOST_DISKS)
    else {
        return;
    };
    lab.say(&format!("disk restore {snapshot}"));
    let output = lab.host.cpi().args(["disk", "restore", snapshot.as_str()]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let disk: DiskCid = String::from_utf8(output.stdout).unwrap().trim().parse().unwrap();
    lab.disks
        .insert(disk.clone(), Disk { metadata: json!({}), ..lab.snapshots[&snapshot].clone() });
    check_data(lab, &disk);
}

/// Nothing is begun, and the data is there, of the size and in the format that was asked for.
pub fn check_data(lab: &Lab, disk: &DiskCid) {
    let (is, model) = (record(&lab.host, disk), &lab.disks[disk]);
    assert_eq!((&is.inactive_image, is.resize_target), (&None, None), "{disk}");
    assert_eq!((is.size.get(), json!(is.format)), (model.size, json!(model.format)), "{disk}");
    assert_eq!(metadata(&lab.host, disk), model.metadata, "{disk}");
    match runs_with(lab, disk) {
        Some(vm) => {
            expected(model).iter().for_each(|read| guest_writes(&lab.host, &vm, disk, read))
        }
        None => check_image(lab, &image(&lab.host, disk), &is, model),
    }
}

/// What is read of the whole of a disk. Behind its end there is nothing.
fn expected(disk: &Disk) -> [String; 2] {
    [format!("read -P {} 0 1M", disk.data), format!("read -P 0 1M {}M", disk.size - 1)]
}

fn check_image(lab: &Lab, path: &Path, of: &DiskRecord, model: &Disk) {
    let reads = expected(model);
    qemu_io(&lab.host, path, of, &reads.each_ref().map(String::as_str));
    let size = bosh_qemu_cpi::image::virtual_size(path, of.format, of.encrypted).unwrap();
    assert_eq!(size.get() >> 20, model.size, "{}", path.display());
}

fn check_snapshot(lab: &Lab, snapshot: &SnapshotCid) {
    let store = lab.host.store();
    let of = store.read::<SnapshotRecord>(snapshot).unwrap().expect("a record");
    let made = of.disk.with_image(&of.image());
    check_image(lab, &store.snapshot_image(&of).unwrap(), &made, &lab.snapshots[snapshot]);
}
