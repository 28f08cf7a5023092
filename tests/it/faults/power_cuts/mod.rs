//! Power cuts at each step of a call and after its answer. A cut loses what was not made durable.
//! No acknowledged change is lost, no half-made object counts as whole, and the rest is cleaned up.

mod fixture;

use std::fs;
use std::path::Path;

use bosh_qemu_cpi::cid::{Cid, DiskCid};
use bosh_qemu_cpi::host::uids;
use bosh_qemu_cpi::image::virtual_size;
use bosh_qemu_cpi::store::record::{AttachmentPhase, NetworkRecord, StemcellRecord};
use bosh_qemu_cpi::store::{DiskRecord, Phase, SnapshotRecord, VmRecord};
use serde_json::json;

use self::fixture::Fixture;
use crate::support::answer::Answer;
use crate::support::disks::metadata;
use crate::support::host::{GUEST, Host, request, text, vm_cid};
use crate::support::images::{assert_pattern_in, image, write_pattern};
use crate::support::power_cut::filesystem_model::{FilesystemModel, cuts, restore};
use crate::support::power_cut::recorder::record;

#[test]
fn first_call_on_host_with_power_cut_at_any_step_loses_nothing() {
    let Some(host) = Host::new() else { return };
    let (root, before) = (host.path(""), FilesystemModel::of(&host.path("")));
    let command =
        || record(host.cpi(), request("create_disk", &json!([8, {}, null])).as_bytes(), &root);
    let (output, steps) = host.namespace().run(command);
    let disk: DiskCid = text(Answer::of(&output).result()).parse().unwrap();
    for cut in cuts(&before, &steps, &root) {
        restore(&cut.tree, &root);
        host.lose_power();
        if cut.answered {
            assert_eq!(host.ok("has_disk", &json!([disk])), true, "{:?} lost", cut.loss);
        }
        host.disk();
    }
    host.delete_everything();
    host.command(&["gc", "--json"]);
}

#[test]
fn create_disk_with_power_cut_at_any_step_loses_nothing() {
    let Some(fixture) = Fixture::new() else { return };
    fixture.cut_at_each_step("create_disk", &json!([8, {}, null]), |made| {
        assert_eq!(fixture.record::<DiskRecord>(&text(made).parse().unwrap()).phase, Phase::Ready);
    });
}

#[test]
fn delete_disk_with_power_cut_at_any_step_loses_nothing() {
    let Some(fixture) = Fixture::new() else { return };
    fixture.cut_at_each_step("delete_disk", &json!([fixture.free]), |_| {
        assert_eq!(fixture.host.ok("has_disk", &json!([fixture.free])), false);
    });
}

#[test]
fn attach_disk_with_power_cut_at_any_step_loses_nothing() {
    let Some(fixture) = Fixture::new() else { return };
    fixture.cut_at_each_step("attach_disk", &json!([fixture.vm, fixture.free]), |_| {
        let vm = fixture.record::<VmRecord>(&fixture.vm);
        assert_eq!(vm.attachment(&fixture.free).map(|a| a.phase), Some(AttachmentPhase::Attached));
        assert_eq!(fixture.record::<DiskRecord>(&fixture.free).vm.as_ref(), Some(&fixture.vm));
    });
}

#[test]
fn detach_disk_with_power_cut_at_any_step_loses_nothing() {
    let Some(fixture) = Fixture::new() else { return };
    fixture.cut_at_each_step("detach_disk", &json!([fixture.vm, fixture.attached]), |_| {
        assert_eq!(fixture.record::<VmRecord>(&fixture.vm).disks, []);
        assert_eq!(fixture.record::<DiskRecord>(&fixture.attached).vm, None);
    });
}

#[test]
fn resize_disk_with_power_cut_at_any_step_loses_nothing() {
    let Some(fixture) = Fixture::new() else { return };
    write_pattern(&fixture.host, &fixture.free);
    fixture.cut_at_each_step("resize_disk", &json!([fixture.free, 700]), |_| {
        let disk = fixture.record::<DiskRecord>(&fixture.free);
        assert_eq!(disk.size.get(), 700);
        let image = image(&fixture.host, &fixture.free);
        assert_eq!(virtual_size(&image, disk.format, false).unwrap(), disk.size.bytes());
    });
}

#[test]
fn update_disk_with_power_cut_at_any_step_loses_nothing() {
    let Some(fixture) = Fixture::new() else { return };
    write_pattern(&fixture.host, &fixture.free);
    fixture.cut_at_each_step("update_disk", &json!([fixture.free, 9, {"format": "raw"}]), |_| {
        let disk = fixture.record::<DiskRecord>(&fixture.free);
        assert_eq!(
            (disk.size.get(), disk.image().as_str(), disk.inactive_image),
            (9, "disk-1.raw", None)
        );
    });
}

#[test]
fn snapshot_disk_with_power_cut_at_any_step_loses_nothing() {
    let Some(fixture) = Fixture::new() else { return };
    write_pattern(&fixture.host, &fixture.free);
    fixture.cut_at_each_step("snapshot_disk", &json!([fixture.free, {"job": "db"}]), |made| {
        let snapshot = fixture.record::<SnapshotRecord>(&text(made).parse().unwrap());
        assert_eq!((snapshot.phase, &snapshot.metadata["job"]), (Phase::Ready, &json!("db")));
        let image = fixture.host.store().snapshot_image(&snapshot).unwrap();
        assert_pattern_in(&fixture.host, &image, &snapshot.disk);
    });
}

#[test]
fn delete_snapshot_with_power_cut_at_any_step_loses_nothing() {
    let Some(fixture) = Fixture::new() else { return };
    let snapshot = fixture.host.ok("snapshot_disk", &json!([fixture.free, {}]));
    fixture.cut_at_each_step("delete_snapshot", &json!([snapshot]), |_| {
        assert!(fixture.host.store().list::<SnapshotRecord>().unwrap().is_empty());
    });
}

#[test]
fn set_vm_metadata_with_power_cut_at_any_step_loses_nothing() {
    let Some(fixture) = Fixture::new() else { return };
    fixture.cut_at_each_step("set_vm_metadata", &json!([fixture.vm, {"name": "bosh/0"}]), |_| {
        assert_eq!(fixture.record::<VmRecord>(&fixture.vm).metadata["name"], "bosh/0");
    });
}

#[test]
fn set_disk_metadata_with_power_cut_at_any_step_loses_nothing() {
    let Some(fixture) = Fixture::new() else { return };
    fixture.host.ok("set_disk_metadata", &json!([fixture.free, {"owner": "before"}]));
    fixture.cut_at_each_step("set_disk_metadata", &json!([fixture.free, {"job": "db"}]), |_| {
        assert_eq!(metadata(&fixture.host, &fixture.free), json!({"job": "db"}));
    });
}

#[test]
fn create_stemcell_with_power_cut_at_any_step_loses_nothing() {
    let Some(fixture) = Fixture::new() else { return };
    let image = fixture.host.path("another-image");
    fs::write(&image, [GUEST, &[7; 4096]].concat()).unwrap();
    fixture.cut_at_each_step("create_stemcell", &json!([image, {}]), |made| {
        assert_eq!(
            fixture.record::<StemcellRecord>(&text(made).parse().unwrap()).phase,
            Phase::Ready
        );
    });
}

#[test]
fn create_stemcell_of_known_file_with_power_cut_at_any_step_loses_nothing() {
    let Some(fixture) = Fixture::new() else { return };
    fixture.cut_at_each_step("create_stemcell", &json!([fixture.host.path("image"), {}]), |made| {
        assert_eq!(
            fixture.record::<StemcellRecord>(&text(made).parse().unwrap()).phase,
            Phase::Ready
        );
    });
}

#[test]
fn create_network_with_power_cut_at_any_step_loses_nothing() {
    let Some(fixture) = Fixture::new() else { return };
    let subnet = json!([{"type": "manual", "range": "10.8.0.0/24", "cloud_properties": {}}]);
    fixture.cut_at_each_step("create_network", &subnet, |made| {
        assert_eq!(
            fixture.record::<NetworkRecord>(&text(&made[0]).parse().unwrap()).phase,
            Phase::Ready
        );
        let (well, networks) =
            fixture.host.command(&["network", "apply", &text(&made[0]), "--json"]);
        assert!(
            well && fixture.host.namespace().ip("-4 -brief address show").contains("10.8.0.1/24"),
            "{networks}"
        );
    });
}

#[test]
fn delete_network_with_power_cut_at_any_step_loses_nothing() {
    let Some(fixture) = Fixture::new() else { return };
    let made =
        fixture.host.ok("create_network", &json!([{"netmask_bits": 24, "cloud_properties": {}}]));
    fixture.cut_at_each_step("delete_network", &json!([made[0]]), |_| {
        assert!(fixture.host.store().list::<NetworkRecord>().unwrap().is_empty());
    });
    fixture.host.ok("delete_network", &json!([made[0]]));
}

#[test]
fn create_vm_with_power_cut_at_any_step_loses_nothing() {
    let Some(fixture) = Fixture::new() else { return };
    let mut arguments = fixture.host.vm_arguments(&fixture.stemcell);
    arguments[2]["ephemeral_disk"] = json!(16);
    fixture.cut_at_each_step("create_vm", &arguments, |made| {
        let vm = fixture.record::<VmRecord>(&vm_cid(made));
        assert_eq!(vm.phase, Phase::Ready);
        // Without the link, another VM would get the same uid.
        assert_eq!(uids::find(fixture.host.store().state_dir(), &vm.cid), Some(vm.uid));
        let claims = fixture.host.path("state/claims").read_dir().unwrap().flatten();
        let claims = claims
            .filter(|claim| fs::read_link(claim.path()).unwrap() == Path::new(vm.cid.as_str()));
        assert_eq!(claims.count(), 1, "one reservation for its address");
    });
}

#[test]
fn calls_in_pool_with_power_cut_at_any_step_lose_nothing() {
    let Some(fixture) = Fixture::in_a_pool() else { return };
    let is_whole = |cid: &str, names: &[&str]| {
        for name in names {
            assert!(fixture.host.path("pool").join(cid).join(name).exists(), "{name}");
        }
    };
    fixture.cut_at_each_step("create_disk", &json!([8, {}, null]), |made| {
        is_whole(&text(made), &["disk.qcow2"]);
    });
    let arguments = fixture.host.vm_arguments(&fixture.stemcell);
    fixture.cut_at_each_step("create_vm", &arguments, |made| {
        is_whole(vm_cid(made).as_str(), &["root.qcow2", "base.raw"]);
    });
    fixture.cut_at_each_step("delete_disk", &json!([fixture.free]), |_| {
        assert!(!fixture.host.path("pool").join(&fixture.free).exists());
    });
}

#[test]
fn delete_vm_with_power_cut_at_any_step_loses_nothing() {
    let Some(fixture) = Fixture::new() else { return };
    fixture.cut_at_each_step("delete_vm", &json!([fixture.vm]), |_| {
        assert_eq!(fixture.host.ok("has_vm", &json!([fixture.vm])), false);
    });
}
