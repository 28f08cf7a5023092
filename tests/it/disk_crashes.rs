//! SIGKILL at every step of resize_disk, update_disk, snapshot_disk and delete_snapshot, attached and detached: the same
//! call again succeeds, the data is there, and nothing else is.

use std::fs;

use bosh_qemu_cpi::cid::{Cid, DiskCid, VmCid};
use bosh_qemu_cpi::store::{DiskRecord, Phase, SnapshotRecord};
use serde_json::{Value, json};

use crate::support::crash::{Crash, armed, for_each_crash_point, take_passed};
use crate::support::host::{Host, eventually, text};
use crate::support::images::{assert_pattern, guest_writes, in_qemu, record, write_pattern};
use crate::support::skip;

/// A VM and, for each kill, a fresh disk with data in it; and a VM with a disk that must not be disturbed.
struct Lab {
    host: Host,
    vm: VmCid,
    bystander: (VmCid, DiskCid),
}

impl Lab {
    fn new() -> Option<Self> {
        if !cfg!(debug_assertions) {
            skip("crash points are for builds with debug assertions");
            return None;
        }
        let host = Host::new()?;
        let stemcell = host.stemcell();
        let (vm, other) = (host.vm(&stemcell), host.vm(&stemcell));
        for vm in [&vm, &other] {
            host.sees(vm, "BOOTSECTOR-OK", 1);
        }
        let bystander = (other, host.disk());
        Some(Self { host, vm, bystander })
    }

    fn disk(&self, is_attached: bool) -> DiskCid {
        let disk = self.host.disk();
        write_pattern(&self.host, &disk);
        if is_attached {
            self.host.ok("attach_disk", &json!([self.vm, disk]));
        }
        disk
    }

    /// Another call, on other things, takes its locks and asks its QEMU; and `gc` leaves nothing that it finds.
    fn others_work(&self, point: &str) {
        self.host.ok("attach_disk", &json!([self.bystander.0, self.bystander.1]));
        let (_, found) = self.host.command(&["gc", "--json"]);
        let found = found["findings"].as_array().unwrap();
        // Who was killed after all was done may have been heard.
        let open = |finding: &&Value| finding["cure"] != "mended" && finding["kind"] != "untold";
        assert_eq!(found.iter().find(open), None, "after '{point}'");
    }

    /// Kills `method` at each of its points, repeats it, and looks at the disk.
    fn walk(
        &self,
        method: &str,
        is_attached: bool,
        arguments: impl Fn(&DiskCid) -> Value,
        settled: impl Fn(&DiskCid, &Value),
    ) {
        let prepare = || arguments(&self.disk(is_attached));
        for_each_crash_point(&self.host, method, prepare, |crash: &Crash<'_>| {
            let disk: DiskCid = text(&crash.arguments[0]).parse().unwrap();
            self.host.ok("attach_disk", &json!([self.bystander.0, self.bystander.1]));
            let answer = self.host.call(method, crash.arguments);
            let again = answer
                .outcome
                .unwrap_or_else(|failure| panic!("after '{}': {failure:?}", crash.point));
            assert_eq!(record(&self.host, &disk).inactive_image, None, "{}", crash.point);
            let nodes = if is_attached { [0, 2, 1] } else { [0; 3] };
            assert_eq!(
                in_qemu(&self.host, &self.vm, disk.as_str()),
                nodes,
                "after '{}'",
                crash.point
            );
            settled(&disk, &again);
            self.host.ok("detach_disk", &json!([self.vm, disk]));
            assert_pattern(&self.host, &disk);
            self.host.ok("delete_disk", &json!([disk]));
            assert_eq!(
                in_qemu(&self.host, &self.vm, disk.as_str()),
                [0; 3],
                "after '{}'",
                crash.point
            );
            self.others_work(crash.point);
            "whole".into()
        });
    }
}

fn resize_disk(is_attached: bool) {
    let Some(lab) = Lab::new() else { return };
    lab.walk(
        "resize_disk",
        is_attached,
        |disk| json!([disk, 700]),
        |disk, _| assert_eq!(record(&lab.host, disk).size.get(), 700),
    );
}

fn update_disk(is_attached: bool) {
    let Some(lab) = Lab::new() else { return };
    lab.walk(
        "update_disk",
        is_attached,
        |disk| json!([disk, 9, {"format": "raw", "iops": 1000}]),
        |disk, _| {
            let is = record(&lab.host, disk);
            assert_eq!((is.size.get(), is.image().as_str()), (9, "disk-1.raw"));
            let names = fs::read_dir(lab.host.store().disk_dir(disk))
                .unwrap()
                .map(|entry| entry.unwrap().file_name());
            let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
            // Of a record that was being written; gone with the disk.
            names.retain(|name| !name.starts_with(".new-"));
            names.sort();
            assert_eq!(names, ["disk-1.raw", "disk.json"]);
        },
    );
}

fn snapshot_disk(is_attached: bool) {
    let Some(lab) = Lab::new() else { return };
    lab.walk(
        "snapshot_disk",
        is_attached,
        |disk| json!([disk, {}]),
        |_, made| {
            assert_eq!(in_qemu(&lab.host, &lab.vm, "snap-"), [0; 3]);
            lab.host.ok("delete_snapshot", &json!([made]));
            eventually("leftovers are removed", || {
                lab.host.ok("delete_disk", &json!([lab.host.disk()]));
                lab.host.store().pending_dir().read_dir().unwrap().next().is_none().then_some(())
            });
            // A killed call may have been done but for its answer.
            let unanswered = lab.host.store().list::<SnapshotRecord>().unwrap();
            assert!(unanswered.len() <= 1, "{unanswered:?}");
            for whole in unanswered {
                assert_eq!(
                    lab.host.store().read::<SnapshotRecord>(&whole).unwrap().unwrap().phase,
                    Phase::Ready
                );
                lab.host.ok("delete_snapshot", &json!([whole]));
            }
        },
    );
}

#[test]
fn resize_of_a_detached_disk() {
    resize_disk(false);
}

#[test]
fn resize_of_an_attached_disk() {
    resize_disk(true);
}

#[test]
fn update_of_a_detached_disk() {
    update_disk(false);
}

#[test]
fn update_of_an_attached_disk() {
    update_disk(true);
}

#[test]
fn snapshot_of_a_detached_disk() {
    snapshot_disk(false);
}

#[test]
fn snapshot_of_an_attached_disk() {
    snapshot_disk(true);
}

#[test]
fn delete_snapshot() {
    let Some(lab) = Lab::new() else { return };
    let disk = lab.disk(false);
    let prepare = || json!([lab.host.ok("snapshot_disk", &json!([disk, {}]))]);
    for_each_crash_point(&lab.host, "delete_snapshot", prepare, |crash| {
        lab.host.ok("delete_snapshot", crash.arguments);
        assert!(
            lab.host.store().list::<SnapshotRecord>().unwrap().is_empty(),
            "after '{}'",
            crash.point
        );
        lab.others_work(crash.point);
        "gone".into()
    });
    assert_pattern(&lab.host, &disk);
}

#[test]
fn restore_of_a_snapshot() {
    let Some(lab) = Lab::new() else { return };
    let (host, disk, log) = (&lab.host, lab.disk(false), lab.host.path("crash-points"));
    let snapshot = text(&host.ok("snapshot_disk", &json!([disk, {}])));
    let restore = |point: &str| {
        let mut command = host.cpi();
        command.env("BOSH_QEMU_CPI_CRASH_LOG", &log).env("BOSH_QEMU_CPI_CRASH_AT", point);
        let done = command.args(["disk", "restore", &snapshot]).output().unwrap().status.success();
        (done, take_passed(&log))
    };
    let (done, points) = restore("nowhere");
    assert!(done && points.len() > 3, "{points:?}");
    for point in std::iter::once("nowhere".to_owned()).chain(points) {
        if point != "nowhere" {
            assert!(!restore(&point).0, "killed at {point}");
        }
        host.ok("delete_disk", &json!([host.disk()]));
        assert_eq!(host.store().pending_dir().read_dir().unwrap().count(), 0, "{point}");
        let mut made = host.store().list::<DiskRecord>().unwrap();
        made.retain(|made| ![&disk, &lab.bystander.1].contains(&made));
        // A killed restore may have been done but for its answer.
        assert!(made.len() <= 1, "{point}: {made:?}");
        for made in made {
            assert_eq!(record(host, &made).phase, Phase::Ready, "{point}");
            assert_pattern(host, &made);
            host.ok("delete_disk", &json!([made]));
        }
        lab.others_work(&point);
    }
}

#[test]
fn a_live_copy_that_was_cut_short_is_settled_by_whoever_creates_something() {
    let Some(lab) = Lab::new() else { return };
    let host = &lab.host;
    for (point, image) in [
        ("qmp blockdev-mirror: answered#1", "disk.qcow2"),
        // Here the guest's I/O waits.
        ("qmp job-complete: answered#1", "disk.qcow2"),
        ("qmp job-finalize: sent#1", "disk-1.raw"),
    ] {
        let disk = lab.disk(true);
        let update = json!([disk, 8, {"format": "raw"}]);
        assert!(
            armed(host, "update_disk", &update, [("AT", point)]).is_none(),
            "killed at {point}"
        );
        assert!(record(host, &disk).inactive_image.is_some(), "{point}");
        host.ok("delete_disk", &json!([host.disk()]));
        let is = record(host, &disk);
        assert_eq!((is.image().as_str(), is.inactive_image), (image, None), "{point}");
        assert_eq!(in_qemu(host, &lab.vm, disk.as_str()), [0, 2, 1], "{point}");
        assert_eq!(host.store().pending_dir().read_dir().unwrap().count(), 0, "{point}");
        guest_writes(host, &lab.vm, &disk, "write -P 7 7M 64k");
        host.ok("detach_disk", &json!([lab.vm, disk]));
        assert_pattern(host, &disk);
    }
}

#[test]
fn a_snapshot_that_was_cut_short_can_be_deleted_while_qemu_writes_it() {
    let Some(lab) = Lab::new() else { return };
    let (host, disk) = (&lab.host, lab.disk(true));
    let killed = armed(
        host,
        "snapshot_disk",
        &json!([disk, {}]),
        [("AT", "qmp blockdev-backup: answered#1")],
    );
    assert!(killed.is_none());
    for half in host.store().list::<SnapshotRecord>().unwrap() {
        host.ok("delete_snapshot", &json!([half]));
    }
    assert_eq!(in_qemu(host, &lab.vm, "snap-"), [0; 3]);
    assert_eq!(in_qemu(host, &lab.vm, disk.as_str()), [0, 2, 1]);
    assert_eq!(host.store().pending_dir().read_dir().unwrap().count(), 0);
}
