//! A disk with 1 GiB of data: resized, copied and converted, compared with the shell commands for
//! the same.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use bosh_qemu_cpi::cid::{DiskCid, SnapshotCid};
use bosh_qemu_cpi::store::{DiskRecord, SnapshotRecord};
use serde_json::{Value, json};

use crate::lab::{self, Lab};
use crate::table::{Table, Target};
use crate::timed;

/// Size of the disk, MiB.
const SIZE: u64 = 4096;
/// Size of its data, MiB.
const DATA: usize = 1024;

/// Measures every kind of copy. The program's copies are durable, so the floor ends with an fsync,
/// too.
pub fn copies(lab: &Lab, table: &mut Table, rounds: u32) {
    let (_, vm) = lab.create_vm();
    vm.wait_for("BOOTSECTOR-OK", 1);
    vm.pause();
    for _ in 0..rounds {
        let (_, disk) = lab.call("create_disk", &json!([SIZE, {"format": "raw"}, null]));
        write_data(&image(lab, &disk)).expect("write the data");
        let (copy, converted) = (lab.scratch("copy"), lab.scratch("converted"));
        let source = image(lab, &disk).to_str().expect("UTF-8").to_owned();

        let (cpi, snapshot) = lab.call("snapshot_disk", &json!([disk, {}]));
        let (floor, ()) =
            timed(|| durable(&copy, || lab::run("cp", &["--sparse=always", &source, &copy])));
        table.add("snapshot, detached, 1 GiB used", Target::Ratio(1.2), cpi, floor);
        delete_snapshot(lab, &snapshot);

        let (cpi, _) = lab.call("update_disk", &json!([disk, SIZE, {"format": "qcow2"}]));
        let convert = ["convert", "-f", "raw", "-O", "qcow2", &copy, &converted];
        let (convert_floor, ()) = timed(|| durable(&converted, || lab::run("qemu-img", &convert)));
        table.add("raw to qcow2, detached, 1 GiB used", Target::Ratio(1.2), cpi, convert_floor);

        let (resized, _) = lab.call("resize_disk", &json!([disk, SIZE + 1]));
        let (resize_floor, ()) =
            timed(|| lab::run("qemu-img", &["resize", "-q", "-f", "qcow2", &converted, "+1M"]));
        table.add("resize, detached", Target::Ratio(1.2), resized, resize_floor);

        lab.call("attach_disk", &json!([vm.cid, disk]));
        let (resized, _) = lab.call("resize_disk", &json!([disk, SIZE + 2]));
        table.add("resize, attached", Target::AtMost(60.0), resized, resize_floor);
        let (cpi, snapshot) = lab.call("snapshot_disk", &json!([disk, {}]));
        table.add("snapshot, attached, 1 GiB used", Target::Ratio(1.5), cpi, floor);
        delete_snapshot(lab, &snapshot);
        let (cpi, _) = lab.call("update_disk", &json!([disk, SIZE + 2, {"format": "raw"}]));
        table.add("qcow2 to raw, attached, 1 GiB used", Target::Ratio(1.5), cpi, convert_floor);

        vm.resume();
        lab.call("detach_disk", &json!([vm.cid, disk]));
        vm.pause();
        lab.call("delete_disk", &json!([disk]));
        for path in [copy, converted] {
            std::fs::remove_file(path).expect("remove a copy");
        }
    }
    lab.call("delete_vm", &json!([vm.cid]));
}

fn image(lab: &Lab, disk: &Value) -> PathBuf {
    let cid: DiskCid = serde_json::from_value(disk.clone()).expect("a disk's cid");
    let record = lab.store.read::<DiskRecord>(&cid).expect("readable").expect("there");
    lab.store.disk_image(&record).expect("an image")
}

fn delete_snapshot(lab: &Lab, snapshot: &Value) {
    let cid: SnapshotCid = serde_json::from_value(snapshot.clone()).expect("a snapshot's cid");
    assert!(lab.store.read::<SnapshotRecord>(&cid).expect("readable").is_some());
    lab.call("delete_snapshot", &json!([snapshot]));
}

/// Writes data without holes in four places.
fn write_data(path: &PathBuf) -> std::io::Result<()> {
    use std::io::{Seek, SeekFrom};
    let mut file = File::options().write(true).open(path)?;
    let chunk: Vec<u8> =
        (0..1 << 20).map(|at: u32| (at.wrapping_mul(2_654_435_761) >> 24) as u8 | 1).collect();
    for part in 0..4 {
        file.seek(SeekFrom::Start(part * (SIZE << 20) / 4))?;
        for _ in 0..DATA / 4 {
            file.write_all(&chunk)?;
        }
    }
    file.sync_all()
}

/// Runs `job`, which creates the file `path`, and syncs the file.
fn durable(path: &str, job: impl FnOnce()) {
    job();
    File::open(path).and_then(|file| file.sync_all()).expect("flush a copy");
}
