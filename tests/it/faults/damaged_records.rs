//! Damaged, unreadable or read-only state directory. Nothing is guessed, no valid file is deleted,
//! and calls about intact objects work.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use bosh_qemu_cpi::cid::{Cid, VmCid};
use bosh_qemu_cpi::store::{DiskRecord, Phase};
use serde_json::{Value, json};

use crate::support::disks::is_plugged;
use crate::support::host::{GUEST, Host, text};
use crate::support::images::{assert_pattern, write_pattern};
use crate::support::vm_list::list_when_all_answer;

/// Kinds of damage to a record.
const DAMAGES: [&str; 8] = [
    "corrupt",
    "truncated",
    "empty",
    "of a newer schema",
    "a directory",
    "missing",
    "a link to nothing",
    "a link to itself",
];

/// Damages the record at `path` in the way `how`.
fn damage(path: &Path, how: &str) {
    let whole = fs::read(path).unwrap();
    fs::remove_file(path).unwrap();
    match how {
        "corrupt" => fs::write(path, [b"#".as_slice(), &whole[1..]].concat()).unwrap(),
        "truncated" => fs::write(path, &whole[..whole.len() / 2]).unwrap(),
        "empty" => fs::write(path, "").unwrap(),
        "of a newer schema" => {
            let mut record: Value = serde_json::from_slice(&whole).unwrap();
            record["schema"] = json!(2);
            fs::write(path, record.to_string()).unwrap();
        }
        "a directory" => fs::create_dir(path).unwrap(),
        "missing" => {}
        "a link to nothing" => symlink("/nowhere/at/all", path).unwrap(),
        "a link to itself" => symlink(path.file_name().unwrap(), path).unwrap(),
        _ => unreachable!(),
    }
}

fn repair(path: &Path, whole: &[u8]) {
    match path.symlink_metadata() {
        Ok(meta) if meta.is_dir() => fs::remove_dir(path).unwrap(),
        Ok(_) => fs::remove_file(path).unwrap(),
        Err(_) => {}
    }
    fs::write(path, whole).unwrap();
}

/// Every entry of `dir` with its content or the error of reading it.
fn content(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let paths = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    paths
        .map(|path| {
            (path.clone(), fs::read(&path).unwrap_or_else(|error| error.to_string().into_bytes()))
        })
        .collect()
}

/// A host with a stemcell and a running VM that damage to other objects must not disturb.
pub struct Fixture {
    pub host: Host,
    pub stemcell: String,
    pub vm: VmCid,
}

impl Fixture {
    pub fn new() -> Option<Self> {
        Self::with(json!({}))
    }

    /// The same with more configuration.
    pub fn with(config: Value) -> Option<Self> {
        let host = Host::with(config)?;
        let stemcell = host.stemcell();
        let vm = host.vm(&stemcell);
        host.wait_for_console(&vm, "BOOTSECTOR-OK", 1);
        Some(Self { host, stemcell, vm })
    }

    /// Damages the record in `dir` in every way. Each time, all of `calls` must be refused and name
    /// the directory, neither they nor `gc` may change `dir`, and everything else must work.
    fn damage_in_every_way(&self, dir: &Path, record: &str, calls: &[(&str, Value)]) {
        let (path, host) = (dir.join(record), &self.host);
        let whole = fs::read(&path).unwrap();
        // A managed network consists of its record alone: without it, the network does not exist.
        let ways = DAMAGES.into_iter().filter(|how| *how != "missing" || record != "network.json");
        for how in ways {
            damage(&path, how);
            let before = content(dir);
            for (method, arguments) in calls {
                let answer = host.call(method, arguments);
                let failure =
                    answer.outcome.expect_err(&format!("{method} with a record that is {how}"));
                let named = failure.message.contains(dir.to_str().unwrap());
                assert!(named && !failure.ok_to_retry, "{method}, {how}: {failure:?}");
                assert!(!failure.kind.ends_with("NotFound"), "{method}, {how}: {failure:?}");
            }
            let cid = dir.file_name().unwrap().to_str().unwrap();
            if !dir.parent().unwrap().ends_with("networks") {
                let (_, found) = host.command(&["gc", "--json"]);
                assert!(found["findings"].to_string().contains(cid), "{how}: {found}");
            }
            self.assert_others_work();
            assert_eq!(content(dir), before, "{how}");
            repair(&path, &whole);
        }
    }

    /// Asserts that calls, VMs and commands about undamaged objects work.
    pub fn assert_others_work(&self) {
        let host = &self.host;
        let vm = host.vm(&self.stemcell);
        let disk = host.disk();
        host.ok("attach_disk", &json!([self.vm, disk]));
        host.ok("detach_disk", &json!([self.vm, disk]));
        host.ok("delete_disk", &json!([disk]));
        host.ok("delete_vm", &json!([vm]));
        let (well, networks) = host.command(&["network", "plan", "--json"]);
        assert!(well, "{networks}");
        let (_, started) = host.command(&["host", "start", "--json"]);
        assert!(started.to_string().contains(self.vm.as_str()), "{started}");
        let list = list_when_all_answer(host);
        let states = list.as_array().unwrap().iter();
        let ours = states.clone().find(|line| line["cid"] == json!(self.vm)).expect("a line");
        assert_eq!(ours["state"], "running");
    }
}

#[test]
fn call_on_damaged_stemcell_record_names_it() {
    let Some(fixture) = Fixture::new() else { return };
    let image = fixture.host.path("another-image");
    fs::write(&image, [GUEST, &[7; 4096]].concat()).unwrap();
    let stemcell = text(&fixture.host.ok("create_stemcell", &json!([image, {}])));
    let dir = fixture.host.path("state/stemcells").join(&stemcell);
    let calls = [
        ("create_vm", fixture.host.vm_arguments(&stemcell)),
        ("delete_stemcell", json!([stemcell])),
    ];
    fixture.damage_in_every_way(&dir, "stemcell.json", &calls);
}

#[test]
fn call_on_damaged_disk_record_names_it() {
    let Some(fixture) = Fixture::new() else { return };
    let disk = fixture.host.disk();
    write_pattern(&fixture.host, &disk);
    let dir = fixture.host.store().disk_dir(&disk);
    let calls = [
        ("has_disk", json!([disk])),
        ("attach_disk", json!([fixture.vm, disk])),
        ("resize_disk", json!([disk, 9])),
        ("update_disk", json!([disk, 9, {}])),
        ("snapshot_disk", json!([disk, {}])),
        ("set_disk_metadata", json!([disk, {}])),
        ("delete_disk", json!([disk])),
    ];
    fixture.damage_in_every_way(&dir, "disk.json", &calls);
    assert_pattern(&fixture.host, &disk);
}

#[test]
fn call_on_damaged_snapshot_record_names_it() {
    let Some(fixture) = Fixture::new() else { return };
    let disk = fixture.host.disk();
    let snapshot = text(&fixture.host.ok("snapshot_disk", &json!([disk, {}])));
    let dir = fixture.host.path("state/snaps").join(&snapshot);
    fixture.damage_in_every_way(&dir, "snap.json", &[("delete_snapshot", json!([snapshot]))]);
}

#[test]
fn call_on_damaged_record_of_running_vm_names_it() {
    let Some(fixture) = Fixture::new() else { return };
    let vm = fixture.host.vm(&fixture.stemcell);
    let disk = fixture.host.disk();
    fixture.host.ok("attach_disk", &json!([vm, disk]));
    let qemu = fixture.host.qemu(&vm).unwrap().pid();
    let dir = fixture.host.paths(&vm).dir;
    let calls = [
        ("has_vm", json!([vm])),
        ("get_disks", json!([vm])),
        ("set_vm_metadata", json!([vm, {}])),
        ("reboot_vm", json!([vm])),
        ("detach_disk", json!([vm, disk])),
        // The disk may still belong to the damaged VM.
        ("attach_disk", json!([fixture.vm, disk])),
        ("delete_disk", json!([disk])),
        ("delete_vm", json!([vm])),
    ];
    // The supervisor logs while the guest runs. `U1`, the guest's notice of the disk, is the last
    // line before the directory is compared.
    fixture.host.wait_for_console(&vm, "BOOTSECTOR-OK", 1);
    fixture.host.wait_for_console(&vm, "U1", 1);
    fixture.damage_in_every_way(&dir, "vm.json", &calls);
    assert_eq!(fixture.host.qemu(&vm).unwrap().pid(), qemu);
    assert!(is_plugged(&fixture.host, &vm, &disk));
}

#[test]
fn call_on_damaged_network_record_names_it() {
    let Some(fixture) = Fixture::new() else { return };
    let subnet = |net: u8| {
        let range = format!("10.8.{net}.0/24");
        json!([{"type": "manual", "range": range, "cloud_properties": {}}])
    };
    let made = fixture.host.ok("create_network", &subnet(0));
    let network = text(&made[0]);
    let mut arguments = fixture.host.vm_arguments(&fixture.stemcell);
    arguments[3] = json!({"a": {
        "type": "manual", "ip": "10.8.0.5", "netmask": "255.255.255.0",
        "gateway": "10.8.0.1", "cloud_properties": made[2],
    }});
    let dir = fixture.host.path("state/networks").join(&network);
    fixture.damage_in_every_way(
        &dir,
        "network.json",
        &[("create_vm", arguments), ("delete_network", json!([network]))],
    );
    // Other networks can be created, but not in its subnet.
    let whole = fs::read(dir.join("network.json")).unwrap();
    damage(&dir.join("network.json"), "empty");
    let other = fixture.host.ok("create_network", &subnet(1));
    let refused = fixture.host.call("create_network", &subnet(0));
    assert!(refused.failure().message.contains("overlaps"), "{refused:?}");
    fixture.host.ok("delete_network", &json!([other[0]]));
    repair(&dir.join("network.json"), &whole);
    // Without its record the network does not exist for BOSH. An operator can still remove its
    // bridge.
    fs::remove_file(dir.join("network.json")).unwrap();
    assert_eq!(
        fixture.host.call("delete_network", &json!([network])).failure().kind,
        "NetworkNotFound"
    );
    let (well, removed) = fixture.host.command(&["network", "remove", &network, "--json"]);
    assert!(well && removed["networks"][0]["state"] == "removed", "{removed}");
    assert!(!dir.exists(), "the directory is removed");
}

#[test]
fn host_start_with_damaged_vms_starts_the_others() {
    let Some(fixture) = Fixture::new() else { return };
    let host = &fixture.host;
    let vms = [host.vm(&fixture.stemcell), host.vm(&fixture.stemcell)];
    vms.iter().for_each(|vm| host.wait_for_console(vm, "BOOTSECTOR-OK", 1));
    let (record, exit) = (host.paths(&vms[0]).dir.join("vm.json"), host.paths(&vms[1]).exit());
    let whole = fs::read(&record).unwrap();
    host.lose_power();
    damage(&record, "truncated");
    fs::write(&exit, "half an ex").unwrap();
    let (well, started) = host.command(&["host", "start", "--json"]);
    assert!(!well);
    let state = |vm: &VmCid| {
        let vms = started["vms"].as_array().unwrap().iter();
        vms.clone().find(|line| line["vm"] == json!(vm)).expect("a line")["state"].clone()
    };
    assert_eq!(state(&fixture.vm), "started");
    for (vm, path) in [(&vms[0], &record), (&vms[1], &exit)] {
        assert!(
            state(vm)["failed"].as_str().unwrap().contains(path.to_str().unwrap()),
            "{started}"
        );
        assert!(host.qemu(vm).is_none());
    }
    // The host's rules were rebuilt without the damaged VM.
    fixture.assert_others_work();
    repair(&record, &whole);
    fs::remove_file(&exit).unwrap();
    assert!(host.command(&["host", "start", "--json"]).0);
    vms.iter().for_each(|vm| host.wait_for_console(vm, "BOOTSECTOR-OK", 2));
}

#[test]
fn call_on_pool_disk_without_record_names_it() {
    let Some(host) = Host::new() else { return };
    fs::create_dir(host.path("pool")).unwrap();
    let pools = json!({"fast": {"path": host.path("pool")}});
    host.reconfigure(|config| config["pools"] = pools);
    let disk = text(&host.ok("create_disk", &json!([8, {"pool": "fast"}, null])));
    let record = host.path("state/disks").join(&disk).join("disk.json");
    let whole = fs::read(&record).unwrap();
    fs::remove_file(&record).unwrap();
    for method in ["has_disk", "delete_disk"] {
        let answer = host.call(method, &json!([disk]));
        assert!(answer.failure().message.contains("has no record"), "{answer:?}");
    }
    host.command(&["gc", "--json"]);
    assert!(host.path("pool").join(&disk).join("disk.qcow2").exists());
    fs::create_dir_all(record.parent().unwrap()).unwrap();
    fs::write(&record, whole).unwrap();
    assert_eq!(host.ok("has_disk", &json!([disk])), true);
}

/// The directory of an object is replaced by a dangling link.
#[test]
fn call_on_object_behind_dangling_link_names_it() {
    let Some(fixture) = Fixture::new() else { return };
    let (host, disk) = (&fixture.host, fixture.host.disk());
    let image = host.path("another-image");
    fs::write(&image, [GUEST, &[7; 4096]].concat()).unwrap();
    let stemcell = text(&host.ok("create_stemcell", &json!([image, {}])));
    let off = host.vm(&fixture.stemcell);
    host.wait_for_console(&off, "BOOTSECTOR-OK", 1);
    host.power_off(&off);
    for (dir, calls) in [
        (
            host.store().disk_dir(&disk),
            vec![("has_disk", json!([disk])), ("delete_disk", json!([disk]))],
        ),
        (
            host.path("state/stemcells").join(&stemcell),
            vec![("delete_stemcell", json!([stemcell]))],
        ),
        (host.paths(&off).dir, vec![("has_vm", json!([off])), ("delete_vm", json!([off]))]),
    ] {
        // As if an operator had moved it to a filesystem that is not mounted.
        let aside = host.path("aside");
        fs::rename(&dir, &aside).unwrap();
        symlink("/nowhere/at/all", &dir).unwrap();
        for (method, arguments) in calls {
            let answer = host.call(method, &arguments);
            let failure = answer.failure();
            assert!(failure.message.contains("has no record"), "{method}: {failure:?}");
        }
        fixture.assert_others_work();
        assert!(dir.is_symlink());
        fs::remove_file(&dir).unwrap();
        fs::rename(&aside, &dir).unwrap();
    }
}

#[test]
fn call_on_read_only_filesystem_only_reads() {
    let Some(host) = Host::on_tmpfs(24) else { return };
    let vm = host.booted_vm();
    let (attached, free) = (host.disk(), host.disk());
    host.ok("attach_disk", &json!([vm, attached]));
    host.power_off(&vm);
    let stemcell = host.record(&vm).stemcell.to_string();
    let snapshot = host.ok("snapshot_disk", &json!([free, {}]));
    // A killed delete and a running one, each with a lock, and a pending note without a lock.
    let (cut_short, busy) = (host.disk(), host.disk());
    let store = host.store();
    for disk in [&cut_short, &busy] {
        let record = store.read::<DiskRecord>(disk).unwrap().unwrap();
        store.write(&DiskRecord { phase: Phase::Deleting, ..record }).unwrap();
    }
    let without_a_lock = "disk-aaaaaaaaaaaaaaa";
    symlink("999999999", store.pending_dir().join(without_a_lock)).unwrap();
    let lock = fs::File::open(host.path(&format!("state/locks/disk.{busy}"))).unwrap();
    lock.lock().unwrap();
    let found = host.command(&["audit", "--json"]);
    assert!(!found.0 && found.1["findings"].as_array().unwrap().len() == 2, "{found:?}");
    assert!(
        [cut_short.as_str(), without_a_lock].iter().all(|cid| found.1.to_string().contains(cid)),
        "{found:?}"
    );

    host.tmpfs().read_only(true);
    for words in [["audit", "--json"].as_slice(), &["gc", "--dry-run", "--json"]] {
        assert_eq!(host.command(words), found, "{words:?}");
    }
    let (well, pools) = host.command(&["pool", "list", "--json"]);
    assert!(well && pools[0]["free"].is_u64(), "{pools}");
    let gc = host.namespace().run(|| host.cpi().arg("gc").output().unwrap());
    assert!(
        !gc.status.success()
            && String::from_utf8_lossy(&gc.stderr).contains("Read-only file system"),
        "{gc:?}"
    );
    for (method, arguments, result) in [
        ("has_vm", json!([vm]), json!(true)),
        ("has_disk", json!([free]), json!(true)),
        ("get_disks", json!([vm]), json!([attached])),
    ] {
        assert_eq!(host.ok(method, &arguments), result, "{method}");
    }
    let (_, list) = host.command(&["vm", "list", "--json"]);
    assert_eq!(list[0]["state"], "stopped", "{list}");
    for (method, arguments) in [
        ("create_stemcell", json!([host.path("image"), {}])),
        ("create_vm", host.vm_arguments(&stemcell)),
        ("create_disk", json!([8, {}, null])),
        ("attach_disk", json!([vm, free])),
        ("detach_disk", json!([vm, attached])),
        ("resize_disk", json!([free, 9])),
        ("snapshot_disk", json!([free, {}])),
        ("set_vm_metadata", json!([vm, {}])),
        ("reboot_vm", json!([vm])),
        ("delete_snapshot", json!([snapshot])),
        ("delete_disk", json!([free])),
        ("delete_vm", json!([vm])),
        ("delete_stemcell", json!([stemcell])),
    ] {
        let answer = host.call(method, &arguments);
        let failure = answer.failure();
        assert!(failure.message.contains("Read-only file system"), "{method}: {failure:?}");
        assert!(!failure.ok_to_retry, "{method}: {failure:?}");
    }
    drop(lock);
    host.tmpfs().read_only(false);
    assert!(host.command(&["gc", "--json"]).0);
    host.ok("reboot_vm", &json!([vm]));
    assert!(is_plugged(&host, &vm, &attached));
}
