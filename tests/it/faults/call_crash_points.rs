//! SIGKILL at every step of every mutating call. The same call succeeds again, remnants are
//! removed, and calls about other objects work.

use std::fs;

use bosh_qemu_cpi::cid::{Cid, DiskCid, VmCid};
use bosh_qemu_cpi::store::record::{NetworkRecord, StemcellRecord};
use bosh_qemu_cpi::store::{DiskRecord, Phase, Record, VmRecord};
use serde_json::{Value, json};

use crate::support::crash_points::{Crash, for_each_crash_point};
use crate::support::disks::metadata;
use crate::support::disks::{disk_in_qemu, is_plugged};
use crate::support::host::{GUEST, Host, eventually, text, vm_cid};
use crate::support::skip;

/// A host, if the program under test has crash points.
fn host() -> Option<Host> {
    if !cfg!(debug_assertions) {
        skip("crash points are for builds with debug assertions");
        return None;
    }
    Host::new()
}

#[test]
fn build_for_release_has_no_crash_points() {
    if cfg!(debug_assertions) {
        return skip("a release build is looked at: cargo test --release");
    }
    let binary = fs::read(env!("CARGO_BIN_EXE_bosh-qemu-cpi")).unwrap();
    for word in ["BOSH_QEMU_CPI_CRASH", "pending noted", "new one written"] {
        assert!(!binary.windows(word.len()).any(|window| window == word.as_bytes()), "{word}");
    }
}

/// A host with a VM and a disk that the killed calls must not disturb.
struct Fixture {
    host: Host,
    stemcell: String,
    bystander: VmCid,
    disk: DiskCid,
    /// The leaks of a host that has only the bystander and its disk.
    baseline: Vec<String>,
}

impl Fixture {
    fn new() -> Option<Self> {
        let host = host()?;
        let stemcell = host.stemcell();
        let (bystander, disk) = (host.vm(&stemcell), host.disk());
        host.wait_for_console(&bystander, "BOOTSECTOR-OK", 1);
        let baseline = host.leaks();
        Some(Self { host, stemcell, bystander, disk, baseline })
    }

    fn booted_vm(&self) -> VmCid {
        let vm = self.host.vm(&self.stemcell);
        self.host.wait_for_console(&vm, "BOOTSECTOR-OK", 1);
        vm
    }

    /// Kills `method` at each of its points. Each time, another call is made at once and the same
    /// call is repeated. Then `check` checks the result, and `gc` must repair every finding.
    fn kill_at_each_step(
        &self,
        method: &str,
        prepare: impl Fn() -> Value,
        check: impl Fn(&Crash<'_>, Value) -> String,
    ) {
        for_each_crash_point(&self.host, method, prepare, |crash| {
            // This call takes locks and asks QEMU even if the disk is already attached.
            self.host.ok("attach_disk", &json!([self.bystander, self.disk]));
            if let Some(answer) = &crash.answer {
                let failed_itself = crash.point.starts_with("supervisor: ");
                assert!(answer.outcome.is_ok() || failed_itself, "{}: {answer:?}", crash.point);
            }
            // An acknowledged object keeps its addresses: a create may replace only an
            // unacknowledged one.
            let delete = [("create_vm", "delete_vm"), ("create_network", "delete_network")];
            let delete = delete.into_iter().find(|(create, _)| *create == method);
            if let (Some((_, delete)), Some(Ok(made))) =
                (delete, crash.answer.as_ref().map(|answer| &answer.outcome))
            {
                self.host.ok(delete, &json!([made[0]]));
            }
            let again = match self.host.call(method, crash.arguments).outcome {
                Err(gone) if method == "delete_network" && gone.kind == "NetworkNotFound" => {
                    Value::Null
                }
                outcome => {
                    outcome.unwrap_or_else(|failure| panic!("after '{}': {failure:?}", crash.point))
                }
            };
            let outcome = check(crash, again);
            self.gc(crash.point);
            outcome
        });
    }

    /// Runs `gc`, which must repair every finding.
    fn gc(&self, point: &str) {
        let (clean, found) = self.host.command(&["gc", "--json"]);
        assert!(clean, "after '{point}': {found}");
    }

    /// Waits until no create is unfinished. A supervisor whose call was killed keeps the VM's lock
    /// until it has reverted the launch. Any create after that removes the rest.
    fn wait_for_recovery(&self) {
        let pending = self.host.store().pending_dir();
        eventually("no create is unfinished", || {
            let disk = self.host.disk();
            self.host.ok("delete_disk", &json!([disk]));
            let whole = pending.read_dir().unwrap().next().is_none();
            whole.then_some(())
        });
    }

    /// Deletes the object that the repeated create made, and the one that the killed create made if
    /// that is whole: it is kept because its caller may have read the answer. Nothing else may be
    /// left.
    fn delete_whole_objects<R: Record>(
        &self,
        new: &R::Cid,
        delete: &str,
        known: &[R::Cid],
    ) -> String {
        let store = self.host.store();
        self.host.ok(delete, &json!([new.as_str()]));
        self.wait_for_recovery();
        let mut left = store.list::<R>().unwrap();
        left.retain(|cid| !known.contains(cid));
        for cid in &left {
            assert_eq!(store.read::<R>(cid).unwrap().unwrap().phase(), Phase::Ready);
            self.host.ok(delete, &json!([cid.as_str()]));
        }
        self.assert_baseline();
        if left.is_empty() { "nothing is left".into() } else { "whole".into() }
    }

    fn assert_baseline(&self) {
        assert_eq!(self.host.leaks(), self.baseline);
    }
}

#[test]
fn create_stemcell_killed_at_any_step_is_cleaned_up() {
    let Some(fixture) = Fixture::new() else { return };
    // The image must differ from the bystander's, which would be shared.
    let image = fixture.host.path("another-image");
    fs::write(&image, [GUEST, &[7; 4096]].concat()).unwrap();
    let known = [fixture.stemcell.parse().unwrap()];
    fixture.kill_at_each_step(
        "create_stemcell",
        || json!([image, {}]),
        |_, made| {
            fixture.delete_whole_objects::<StemcellRecord>(
                &text(&made).parse().unwrap(),
                "delete_stemcell",
                &known,
            )
        },
    );
}

#[test]
fn create_stemcell_of_known_file_killed_at_any_step_is_cleaned_up() {
    let Some(fixture) = Fixture::new() else { return };
    let known = [fixture.stemcell.parse().unwrap()];
    fixture.kill_at_each_step(
        "create_stemcell",
        || json!([fixture.host.path("image"), {}]),
        |_, made| {
            fixture.delete_whole_objects::<StemcellRecord>(
                &text(&made).parse().unwrap(),
                "delete_stemcell",
                &known,
            )
        },
    );
    assert!(fixture.host.store().stemcell_dir(&known[0]).join("image.raw").exists());
}

#[test]
fn delete_stemcell_killed_at_any_step_can_be_repeated() {
    let Some(fixture) = Fixture::new() else { return };
    fixture.kill_at_each_step(
        "delete_stemcell",
        || json!([fixture.host.stemcell()]),
        |_, _| {
            fixture.assert_baseline();
            "deleted".into()
        },
    );
}

#[test]
fn create_vm_killed_at_any_step_is_cleaned_up() {
    let Some(fixture) = Fixture::new() else { return };
    let known = [fixture.bystander.clone()];
    fixture.kill_at_each_step(
        "create_vm",
        || fixture.host.vm_arguments(&fixture.stemcell),
        |_, made| {
            let vm = vm_cid(&made);
            assert!(fixture.host.qemu(&vm).is_some());
            fixture.delete_whole_objects::<VmRecord>(&vm, "delete_vm", &known)
        },
    );
}

#[test]
fn delete_vm_killed_at_any_step_can_be_repeated() {
    let Some(fixture) = Fixture::new() else { return };
    let disk = fixture.host.disk();
    let with_a_disk = || {
        let vm = fixture.host.vm(&fixture.stemcell);
        fixture.host.ok("attach_disk", &json!([vm, disk]));
        json!([vm])
    };
    fixture.kill_at_each_step("delete_vm", with_a_disk, |crash, _| {
        assert_eq!(fixture.host.ok("has_vm", crash.arguments), false);
        // The disk can be attached to another VM.
        fixture.host.ok("attach_disk", &json!([fixture.bystander, disk]));
        fixture.host.ok("detach_disk", &json!([fixture.bystander, disk]));
        let mut left = fixture.host.leaks();
        left.retain(|what| !what.contains(disk.as_str()));
        assert_eq!(left, fixture.baseline);
        "deleted, its disk is free".into()
    });
}

#[test]
fn reboot_vm_killed_at_any_step_can_be_repeated() {
    let Some(fixture) = Fixture::new() else { return };
    let disk = fixture.host.disk();
    let with_a_disk = || {
        let vm = fixture.booted_vm();
        fixture.host.ok("attach_disk", &json!([vm, disk]));
        json!([vm])
    };
    fixture.kill_at_each_step("reboot_vm", with_a_disk, |crash, _| {
        let vm: VmCid = text(&crash.arguments[0]).parse().unwrap();
        assert!(is_plugged(&fixture.host, &vm, &disk) && fixture.host.supervisor(&vm).is_some());
        fixture.host.ok("delete_vm", crash.arguments);
        "runs with its disk".into()
    });
}

#[test]
fn create_network_killed_at_any_step_is_cleaned_up() {
    let Some(fixture) = Fixture::new() else { return };
    let networks = || fixture.host.store().list::<NetworkRecord>().unwrap();
    fixture.kill_at_each_step(
        "create_network",
        || json!([{"type": "manual", "range": "10.8.0.0/24", "cloud_properties": {}}]),
        |crash, made| {
            assert_eq!(json!(networks()), json!([made[0]]), "after '{}'", crash.point);
            assert!(
                fixture.host.namespace().ip("-4 -brief address show").contains("10.8.0.1/24"),
                "after '{}'",
                crash.point
            );
            fixture.host.ok("delete_network", &json!([made[0]]));
            // `gc` also removes the locks of unfinished networks.
            fixture.gc(crash.point);
            fixture.assert_baseline();
            "one network".into()
        },
    );
}

#[test]
fn delete_network_after_killed_create_leaves_no_pending_note() {
    let Some(fixture) = Fixture::new() else { return };
    let host = &fixture.host;
    let deleted = std::cell::Cell::new(0);
    for_each_crash_point(
        host,
        "create_network",
        || json!([{"type": "manual", "range": "10.8.0.0/24", "cloud_properties": {}}]),
        |crash| {
            for network in host.store().list::<NetworkRecord>().unwrap() {
                let answer = host.call("delete_network", &json!([network]));
                let gone = |kind| kind == "NetworkNotFound";
                assert!(answer.outcome.map_err(|e| gone(e.kind)) != Err(false), "{}", crash.point);
                let note = host.store().pending_dir().join(network.as_str());
                assert!(!note.exists() && !note.is_symlink(), "after '{}'", crash.point);
                deleted.set(deleted.get() + usize::from(crash.answer.is_none()));
            }
            fixture.gc(crash.point);
            "deleted".into()
        },
    );
    assert!(deleted.get() > 2, "{deleted:?} networks of killed creates");
}

#[test]
fn delete_network_killed_at_any_step_can_be_repeated() {
    let Some(fixture) = Fixture::new() else { return };
    let made = || {
        fixture.host.ok("create_network", &json!([{"netmask_bits": 24, "cloud_properties": {}}]))
    };
    fixture.kill_at_each_step(
        "delete_network",
        || json!([made()[0]]),
        |crash, _| {
            fixture.gc(crash.point);
            fixture.assert_baseline();
            "deleted".into()
        },
    );
}

#[test]
fn create_disk_killed_at_any_step_is_cleaned_up() {
    let Some(fixture) = Fixture::new() else { return };
    let known = [fixture.disk.clone()];
    fixture.kill_at_each_step(
        "create_disk",
        || json!([8, {}, null]),
        |_, made| {
            fixture.delete_whole_objects::<DiskRecord>(
                &text(&made).parse().unwrap(),
                "delete_disk",
                &known,
            )
        },
    );
}

#[test]
fn delete_disk_killed_at_any_step_can_be_repeated() {
    let Some(fixture) = Fixture::new() else { return };
    fixture.kill_at_each_step(
        "delete_disk",
        || json!([fixture.host.disk()]),
        |_, _| {
            fixture.assert_baseline();
            "deleted".into()
        },
    );
}

#[test]
fn attach_disk_killed_at_any_step_can_be_repeated() {
    let Some(fixture) = Fixture::new() else { return };
    let (vm, disk) = (fixture.booted_vm(), fixture.host.disk());
    let both = json!([vm, disk]);
    let detached = || {
        fixture.host.ok("detach_disk", &both);
        both.clone()
    };
    fixture.kill_at_each_step("attach_disk", detached, |_, hint| {
        assert_eq!(hint, json!({"path": format!("/dev/disk/by-id/virtio-{disk}")}));
        assert_eq!(disk_in_qemu(&fixture.host, &vm, &disk), (true, 2, 1));
        assert_eq!(fixture.host.ok("get_disks", &json!([vm])), json!([disk]));
        "attached".into()
    });
}

#[test]
fn attach_disk_after_killed_attach_to_another_vm_leaves_one_owner() {
    let Some(fixture) = Fixture::new() else { return };
    let (host, disk) = (&fixture.host, fixture.host.disk());
    let (one, other) = (fixture.booted_vm(), &fixture.bystander);
    for_each_crash_point(
        host,
        "attach_disk",
        || {
            host.ok("detach_disk", &json!([one, disk]));
            json!([one, disk])
        },
        |_| {
            let answer = host.call("attach_disk", &json!([other, disk]));
            match &answer.outcome {
                Ok(_) => {
                    assert_eq!(
                        (disk_in_qemu(host, &one, &disk).0, disk_in_qemu(host, other, &disk).0),
                        (false, true)
                    );
                    host.ok("detach_disk", &json!([other, disk]));
                    "attached to the other VM".into()
                }
                Err(refused) => {
                    assert!(
                        refused.message.contains(&format!("is attached to VM '{one}'")),
                        "{refused:?}"
                    );
                    assert_eq!(
                        (disk_in_qemu(host, &one, &disk).0, disk_in_qemu(host, other, &disk)),
                        (true, (false, 0, 0))
                    );
                    "still attached to the first VM".into()
                }
            }
        },
    );
}

#[test]
fn detach_disk_killed_at_any_step_can_be_repeated() {
    let Some(fixture) = Fixture::new() else { return };
    let (vm, disk) = (fixture.booted_vm(), fixture.host.disk());
    let both = json!([vm, disk]);
    let attached = || {
        fixture.host.ok("attach_disk", &both);
        both.clone()
    };
    fixture.kill_at_each_step("detach_disk", attached, |_, _| {
        assert_eq!(disk_in_qemu(&fixture.host, &vm, &disk), (false, 0, 0));
        assert_eq!(fixture.host.ok("get_disks", &json!([vm])), json!([]));
        assert_eq!(fixture.host.store().read::<DiskRecord>(&disk).unwrap().unwrap().vm, None);
        "detached".into()
    });
}

#[test]
fn set_vm_metadata_killed_at_any_step_can_be_repeated() {
    let Some(fixture) = Fixture::new() else { return };
    let vm = &fixture.bystander;
    fixture.kill_at_each_step(
        "set_vm_metadata",
        || json!([vm, {"name": "bosh/0"}]),
        |_, _| {
            assert_eq!(fixture.host.record(vm).metadata["name"], "bosh/0");
            "written".into()
        },
    );
}

#[test]
fn set_disk_metadata_killed_at_any_step_can_be_repeated() {
    let Some(fixture) = Fixture::new() else { return };
    fixture.kill_at_each_step(
        "set_disk_metadata",
        || json!([fixture.disk, {"owner": "bosh"}]),
        |_, _| {
            assert_eq!(metadata(&fixture.host, &fixture.disk), json!({"owner": "bosh"}));
            "written".into()
        },
    );
}
