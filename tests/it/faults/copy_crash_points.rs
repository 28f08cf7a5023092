//! SIGKILL at every step of resize_disk, update_disk, snapshot_disk and delete_snapshot, with
//! attached and detached disks. The same call succeeds again, the data is intact, and nothing else
//! is left.

use std::fs;

use bosh_qemu_cpi::cid::{Cid, DiskCid, VmCid};
use bosh_qemu_cpi::store::{DiskRecord, Phase, SnapshotRecord};
use serde_json::{Value, json};

use crate::support::crash_points::{
    Crash, call_with_crash, for_each_crash_point, take_passed_points,
};
use crate::support::host::{Host, eventually, text};
use crate::support::images::{assert_pattern, guest_writes, qemu_objects, record, write_pattern};
use crate::support::skip;

/// A VM, which gets a new disk with data for each kill, and a VM with a disk that must not be
/// disturbed.
struct Fixture {
    host: Host,
    vm: VmCid,
    bystander: (VmCid, DiskCid),
}

impl Fixture {
    fn new() -> Option<Self> {
        if !cfg!(debug_assertions) {
            skip("crash points are for builds with debug assertions");
            return None;
        }
        let host = Host::new()?;
        let stemcell = host.stemcell();
        let (vm, other) = (host.vm(&stemcell), host.vm(&stemcell));
        for vm in [&vm, &other] {
            host.wait_for_console(vm, "BOOTSECTOR-OK", 1);
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

    /// Asserts that a call about other objects works and that `gc` repairs every finding.
    fn assert_others_work(&self, point: &str) {
        self.host.ok("attach_disk", &json!([self.bystander.0, self.bystander.1]));
        let (_, found) = self.host.command(&["gc", "--json"]);
        let found = found["findings"].as_array().unwrap();
        // The caller of a call that was killed after its last step may have read the answer.
        let open =
            |finding: &&Value| finding["cure"] != "repaired" && finding["kind"] != "unacknowledged";
        assert_eq!(found.iter().find(open), None, "after '{point}'");
    }

    /// Kills `method` at each of its points, repeats it and checks the disk.
    fn kill_at_each_step(
        &self,
        method: &str,
        is_attached: bool,
        arguments: impl Fn(&DiskCid) -> Value,
        check: impl Fn(&DiskCid, &Value),
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
                qemu_objects(&self.host, &self.vm, disk.as_str()),
                nodes,
                "after '{}'",
                crash.point
            );
            check(&disk, &again);
            self.host.ok("detach_disk", &json!([self.vm, disk]));
            assert_pattern(&self.host, &disk);
            self.host.ok("delete_disk", &json!([disk]));
            assert_eq!(
                qemu_objects(&self.host, &self.vm, disk.as_str()),
                [0; 3],
                "after '{}'",
                crash.point
            );
            self.assert_others_work(crash.point);
            "intact".into()
        });
    }
}

fn resize_disk(is_attached: bool) {
    let Some(fixture) = Fixture::new() else { return };
    fixture.kill_at_each_step(
        "resize_disk",
        is_attached,
        |disk| json!([disk, 700]),
        |disk, _| assert_eq!(record(&fixture.host, disk).size.get(), 700),
    );
}

fn update_disk(is_attached: bool) {
    let Some(fixture) = Fixture::new() else { return };
    fixture.kill_at_each_step(
        "update_disk",
        is_attached,
        |disk| json!([disk, 9, {"format": "raw", "iops": 1000}]),
        |disk, _| {
            let is = record(&fixture.host, disk);
            assert_eq!((is.size.get(), is.image().as_str()), (9, "disk-1.raw"));
            let names = fs::read_dir(fixture.host.store().disk_dir(disk))
                .unwrap()
                .map(|entry| entry.unwrap().file_name());
            let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
            // A temporary file of a half-written record. It is removed with the disk.
            names.retain(|name| !name.starts_with(".new-"));
            names.sort();
            assert_eq!(names, ["disk-1.raw", "disk.json"]);
        },
    );
}

fn snapshot_disk(is_attached: bool) {
    let Some(fixture) = Fixture::new() else { return };
    fixture.kill_at_each_step(
        "snapshot_disk",
        is_attached,
        |disk| json!([disk, {}]),
        |_, made| {
            assert_eq!(qemu_objects(&fixture.host, &fixture.vm, "snap-"), [0; 3]);
            fixture.host.ok("delete_snapshot", &json!([made]));
            eventually("no create is unfinished", || {
                fixture.host.ok("delete_disk", &json!([fixture.host.disk()]));
                fixture
                    .host
                    .store()
                    .pending_dir()
                    .read_dir()
                    .unwrap()
                    .next()
                    .is_none()
                    .then_some(())
            });
            // The killed call may have done everything except answer.
            let unanswered = fixture.host.store().list::<SnapshotRecord>().unwrap();
            assert!(unanswered.len() <= 1, "{unanswered:?}");
            for whole in unanswered {
                assert_eq!(
                    fixture.host.store().read::<SnapshotRecord>(&whole).unwrap().unwrap().phase,
                    Phase::Ready
                );
                fixture.host.ok("delete_snapshot", &json!([whole]));
            }
        },
    );
}

#[test]
fn resize_disk_while_detached_killed_at_any_step_can_be_repeated() {
    resize_disk(false);
}

#[test]
fn resize_disk_while_attached_killed_at_any_step_can_be_repeated() {
    resize_disk(true);
}

#[test]
fn update_disk_while_detached_killed_at_any_step_can_be_repeated() {
    update_disk(false);
}

#[test]
fn update_disk_while_attached_killed_at_any_step_can_be_repeated() {
    update_disk(true);
}

#[test]
fn snapshot_disk_while_detached_killed_at_any_step_is_cleaned_up() {
    snapshot_disk(false);
}

#[test]
fn snapshot_disk_while_attached_killed_at_any_step_is_cleaned_up() {
    snapshot_disk(true);
}

#[test]
fn delete_snapshot_killed_at_any_step_can_be_repeated() {
    let Some(fixture) = Fixture::new() else { return };
    let disk = fixture.disk(false);
    let prepare = || json!([fixture.host.ok("snapshot_disk", &json!([disk, {}]))]);
    for_each_crash_point(&fixture.host, "delete_snapshot", prepare, |crash| {
        fixture.host.ok("delete_snapshot", crash.arguments);
        assert!(
            fixture.host.store().list::<SnapshotRecord>().unwrap().is_empty(),
            "after '{}'",
            crash.point
        );
        fixture.assert_others_work(crash.point);
        "deleted".into()
    });
    assert_pattern(&fixture.host, &disk);
}

#[test]
fn restore_disk_killed_at_any_step_is_cleaned_up() {
    let Some(fixture) = Fixture::new() else { return };
    let (host, disk, log) = (&fixture.host, fixture.disk(false), fixture.host.path("crash-points"));
    let snapshot = text(&host.ok("snapshot_disk", &json!([disk, {}])));
    let restore = |point: &str| {
        let mut command = host.cpi();
        command.env("BOSH_QEMU_CPI_CRASH_LOG", &log).env("BOSH_QEMU_CPI_CRASH_AT", point);
        let done = command.args(["disk", "restore", &snapshot]).output().unwrap().status.success();
        (done, take_passed_points(&log))
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
        made.retain(|made| ![&disk, &fixture.bystander.1].contains(&made));
        // The killed restore may have done everything except print the cid.
        assert!(made.len() <= 1, "{point}: {made:?}");
        for made in made {
            assert_eq!(record(host, &made).phase, Phase::Ready, "{point}");
            assert_pattern(host, &made);
            host.ok("delete_disk", &json!([made]));
        }
        fixture.assert_others_work(&point);
    }
}

#[test]
fn create_disk_after_killed_live_copy_recovers_it() {
    let Some(fixture) = Fixture::new() else { return };
    let host = &fixture.host;
    for (point, image) in [
        ("qmp blockdev-mirror: answered#1", "disk.qcow2"),
        // At this point the guest's I/O waits.
        ("qmp job-complete: answered#1", "disk.qcow2"),
        ("qmp job-finalize: sent#1", "disk-1.raw"),
    ] {
        let disk = fixture.disk(true);
        let update = json!([disk, 8, {"format": "raw"}]);
        assert!(
            call_with_crash(host, "update_disk", &update, [("AT", point)]).is_none(),
            "killed at {point}"
        );
        assert!(record(host, &disk).inactive_image.is_some(), "{point}");
        host.ok("delete_disk", &json!([host.disk()]));
        let is = record(host, &disk);
        assert_eq!((is.image().as_str(), is.inactive_image), (image, None), "{point}");
        assert_eq!(qemu_objects(host, &fixture.vm, disk.as_str()), [0, 2, 1], "{point}");
        assert_eq!(host.store().pending_dir().read_dir().unwrap().count(), 0, "{point}");
        guest_writes(host, &fixture.vm, &disk, "write -P 7 7M 64k");
        host.ok("detach_disk", &json!([fixture.vm, disk]));
        assert_pattern(host, &disk);
    }
}

#[test]
fn delete_snapshot_of_running_backup_ends_its_job() {
    let Some(fixture) = Fixture::new() else { return };
    let (host, disk) = (&fixture.host, fixture.disk(true));
    let killed = call_with_crash(
        host,
        "snapshot_disk",
        &json!([disk, {}]),
        [("AT", "qmp blockdev-backup: answered#1")],
    );
    assert!(killed.is_none());
    for half in host.store().list::<SnapshotRecord>().unwrap() {
        host.ok("delete_snapshot", &json!([half]));
    }
    assert_eq!(qemu_objects(host, &fixture.vm, "snap-"), [0; 3]);
    assert_eq!(qemu_objects(host, &fixture.vm, disk.as_str()), [0, 2, 1]);
    assert_eq!(host.store().pending_dir().read_dir().unwrap().count(), 0);
}
