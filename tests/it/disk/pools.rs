//! Pools: images on other filesystems, admission by free space, and images that stemcells share.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use bosh_qemu_cpi::cid::{DiskCid, VmCid};
use bosh_qemu_cpi::config::Config;
use bosh_qemu_cpi::cpi::capacity::usage;
use bosh_qemu_cpi::cpi::context::Context;
use bosh_qemu_cpi::store::{DiskRecord, Phase, Record, StemcellRecord, VmRecord};
use serde_json::{Value, json};

use crate::support::answer::{Answer, run};
use crate::support::crash_points::{call_with_crash, for_each_crash_point};
use crate::support::filesystem::Filesystem;
use crate::support::host::{GUEST, Host, eventually, text, vm_cid};
use crate::support::skip;

/// Content of a pool that was used and is empty.
const MARK: [&str; 1] = [".bosh-qemu-cpi"];

/// A host with the pools `fast` and `stemcells`, each on a filesystem of `mib` MiB.
fn host(mib: u64, more: Value) -> Option<(Filesystem, Filesystem, Host)> {
    let (fast, stemcells) = (Filesystem::new(mib)?, Filesystem::new(mib)?);
    let mut config = more;
    config["pools"] =
        json!({"fast": {"path": fast.path()}, "stemcells": {"path": stemcells.path()}});
    config["stemcell_pool"] = json!("stemcells");
    let host = Host::with(config)?;
    Some((fast, stemcells, host))
}

fn disk(host: &Host, mib: u64, properties: &Value) -> Answer {
    host.call("create_disk", &json!([mib, properties, null]))
}

fn disk_cid(answer: &Answer) -> DiskCid {
    text(answer.result()).parse().unwrap()
}

fn vm_in_pool(host: &Host, stemcell: &str) -> VmCid {
    let mut arguments = host.vm_arguments(stemcell);
    arguments[2] = json!({"ram": 64, "pool": "fast", "ephemeral_disk": 64});
    vm_cid(&host.ok("create_vm", &arguments))
}

#[test]
fn delete_removes_images_from_their_pools() {
    let Some((fast, stemcells, host)) = host(256, json!({})) else { return };
    let stemcell = host.stemcell();
    let vm = vm_in_pool(&host, &stemcell);
    let disk = disk_cid(&disk(&host, 8, &json!({"pool": "fast"})));
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 1);
    host.ok("attach_disk", &json!([vm, disk]));
    host.wait_for_console(&vm, "\nU", 1);

    let names = |dir: PathBuf| {
        let mut names: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(fast.path().join(vm.to_string())), ["ephemeral.qcow2", "root.qcow2"]);
    assert_eq!(names(fast.path().join(disk.to_string())), ["disk.qcow2"]);
    assert_eq!(names(stemcells.path().join(vm.to_string())), ["base.raw"]);
    assert_eq!(names(stemcells.path().join(&stemcell)), ["image.raw"]);
    assert_eq!(names(host.store().disk_dir(&disk)), ["disk.json"]);
    let left = names(host.paths(&vm).dir);
    assert!(!left.iter().any(|name| name.ends_with("qcow2") || name.ends_with("raw")), "{left:?}");

    // The stemcell's image stays for the VM, which can reboot with it.
    let deleted = host.call("delete_stemcell", &json!([stemcell]));
    deleted.result();
    assert!(
        deleted.stderr.contains("VMs keep the stemcell's image")
            && deleted.stderr.contains(&vm.to_string()),
        "{deleted:?}"
    );
    host.ok("reboot_vm", &json!([vm]));
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 2);
    host.ok("detach_disk", &json!([vm, disk]));
    host.ok("delete_vm", &json!([vm]));
    assert_eq!(stemcells.names(), MARK);
    host.ok("delete_disk", &json!([disk]));
    assert_eq!(fast.names(), MARK);
}

#[test]
fn report_and_pool_list_of_a_fresh_host_have_the_room_of_its_filesystem() {
    let Some(host) = Host::new() else { return };
    let (passed, pools) = host.command(&["pool", "list", "--json"]);
    assert!(passed, "{pools}");
    assert_eq!(pools[0]["path"], json!(host.path("state")));
    assert_eq!((&pools[0]["allocated"], &pools[0]["growth"]), (&json!(0), &json!(0)));
    assert!(pools[0]["free"].as_u64().is_some_and(|free| free > 0), "{pools}");
    for overcommit in [true, false] {
        host.reconfigure(|config| config["overcommit"] = json!(overcommit));
        let mut serve = host.cpi();
        serve.args(["host", "serve"]);
        let output = host.namespace().run(|| run(serve, b"{\"offer\": {}}\n"));
        let printed = String::from_utf8(output.stdout).unwrap();
        let last: Value = serde_json::from_str(printed.lines().last().unwrap()).unwrap();
        let room = last["offer"]["space"][""].as_u64();
        assert!(room.is_some_and(|room| room > 0), "{printed}");
    }
    assert!(!host.path("state").exists(), "nothing is made");
}

#[test]
fn call_on_unmounted_pool_is_refused_and_writes_nothing() {
    let Some((fast, _stemcells, host)) = host(256, json!({})) else { return };
    let stemcell = host.stemcell();
    let (vm, kept) =
        (vm_in_pool(&host, &stemcell), disk_cid(&disk(&host, 8, &json!({"pool": "fast"}))));
    let plain = host.vm(&stemcell);
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 1);
    host.power_off(&vm);
    host.wait_for_console(&plain, "BOOTSECTOR-OK", 1);
    fast.hide();
    let mut in_pool = host.vm_arguments(&stemcell);
    in_pool[2] = json!({"ram": 64, "pool": "fast"});
    let refused = [
        host.call("create_vm", &in_pool),
        disk(&host, 8, &json!({"pool": "fast"})),
        host.call("attach_disk", &json!([plain, kept])),
        host.call("delete_disk", &json!([kept])),
        host.call("reboot_vm", &json!([vm])),
        host.call("delete_vm", &json!([vm])),
    ];
    for refused in refused {
        let message = &refused.failure().message;
        let says = format!(
            "pool 'fast': '{}' is not the directory that was used before",
            fast.path().display()
        );
        assert!(message.contains(&says) && message.contains("Hint: mount it"), "{message}");
    }
    assert!(fast.names().is_empty(), "{:?}", fast.names());
    assert_eq!(host.ok("get_disks", &json!([plain])), json!([]));
    // Calls outside the pool work.
    let beside = disk_cid(&disk(&host, 8, &json!({})));
    host.ok("attach_disk", &json!([plain, beside]));
    fast.show();
    assert_eq!(host.ok("has_disk", &json!([kept])), true);
    host.ok("delete_disk", &json!([kept]));
    host.ok("delete_vm", &json!([vm]));
    assert_eq!(fast.names(), MARK);

    host.reconfigure(|config| config["pools"]["fast"]["path"] = json!(host.path("nothing")));
    let refused = disk(&host, 8, &json!({"pool": "fast"}));
    assert!(
        refused.failure().message.contains("nothing' cannot be used: No such file"),
        "{refused:?}"
    );
    assert!(!host.path("nothing").exists());
    host.reconfigure(|config| {
        config["pools"]["fast"] = json!({"path": host.path("state"), "shared": true});
    });
    let refused = disk(&host, 8, &json!({"pool": "fast"}));
    assert!(refused.failure().message.contains("is shared, but on the filesystem"), "{refused:?}");
}

#[test]
fn create_beyond_pool_space_is_refused_before_any_change() {
    let Some((fast, stemcells, host)) = host(64, json!({})) else { return };
    // Thin images may exceed the space of the pool, preallocated ones may not.
    let thin = disk_cid(&disk(&host, 1024, &json!({"pool": "fast"})));
    let refused = disk(&host, 64, &json!({"pool": "fast", "preallocation": "falloc"}));
    assert_eq!(refused.failure().kind, "NoDiskSpace");
    let says = format!("pool 'fast' at '{}' has ", fast.path().display());
    assert!(refused.failure().message.contains(&says), "{refused:?}");
    assert!(refused.failure().message.contains("MiB left, the image needs 65 MiB"), "{refused:?}");
    let full = disk_cid(&disk(&host, 50, &json!({"pool": "fast", "preallocation": "falloc"})));
    let stemcell = host.stemcell();
    let mut arguments = host.vm_arguments(&stemcell);
    arguments[2] = json!({"ram": 64, "pool": "fast", "ephemeral_disk": 64});
    fs::write(fast.path().join("ballast"), vec![1; 13 << 20]).unwrap();
    for refused in [host.call("create_vm", &arguments), disk(&host, 8, &json!({"pool": "fast"}))] {
        assert_eq!(refused.failure().kind, "NoDiskSpace", "{refused:?}");
    }
    fs::write(stemcells.path().join("ballast"), vec![1; 62 << 20]).unwrap();
    let refused = host.call("create_stemcell", &json!([host.path("image"), {"x": 1}]));
    assert_eq!(refused.failure().kind, "NoDiskSpace", "{refused:?}");
    assert!(refused.failure().message.contains("pool 'stemcells' at"), "{refused:?}");

    // Without overcommit, the full size of thin images is reserved. The thin disk alone exceeds the
    // pool.
    fs::remove_file(fast.path().join("ballast")).unwrap();
    host.ok("delete_disk", &json!([full]));
    host.reconfigure(|config| config["overcommit"] = json!(false));
    let refused = disk(&host, 8, &json!({"pool": "fast"}));
    assert!(
        refused.failure().message.contains("has 0 MiB left, the image needs 9 MiB"),
        "{refused:?}"
    );
    host.ok("delete_disk", &json!([thin]));
    let small = disk_cid(&disk(&host, 33, &json!({"pool": "fast"})));
    assert_eq!(disk(&host, 33, &json!({"pool": "fast"})).failure().kind, "NoDiskSpace");
    host.ok("delete_disk", &json!([small]));
    assert_eq!(fast.names(), MARK);
}

#[test]
fn copy_disk_beyond_pool_space_is_refused_before_any_change() {
    let Some((fast, _stemcells, host)) = host(64, json!({})) else { return };
    host.reconfigure(|config| config["pools"]["gone"] = json!({"path": host.path("gone")}));
    let vm = host.booted_vm();
    let small = disk_cid(&disk(&host, 40, &json!({})));
    let noise =
        disk_cid(&disk(&host, 96, &json!({"pool": "fast", "format": "raw", "encrypted": true})));
    let record = |disk: &DiskCid| fs::read(host.store().disk_dir(disk).join("disk.json")).unwrap();
    let refused = |disk: &DiskCid, properties: Value| {
        let before = record(disk);
        let refused = host.call("update_disk", &json!([disk, 96, properties]));
        assert_eq!(record(disk), before, "{refused:?}");
        refused.failure().clone()
    };
    assert!(refused(&small, json!({"pool": "gone"})).message.contains("'gone'"));
    for properties in
        [json!({"format": "raw", "encrypted": true}), json!({"preallocation": "full"})]
    {
        let mut properties = properties;
        properties["pool"] = json!("fast");
        let full = refused(&small, properties);
        assert_eq!(full.kind, "NoDiskSpace", "{full:?}");
    }
    assert_eq!(
        refused(&noise, json!({"pool": "fast"})).kind,
        "NoDiskSpace",
        "holes of a LUKS image are read as noise"
    );
    let raw = json!({"pool": "fast", "format": "raw", "discard": "ignore"});
    for disk in [&small, &noise] {
        host.ok("attach_disk", &json!([vm, disk]));
    }
    assert_eq!(refused(&small, raw.clone()).kind, "NoDiskSpace", "a mirror writes zeros");
    let full = host.call("snapshot_disk", &json!([noise, {}]));
    assert!(full.failure().message.contains("MiB left, the image needs 100 MiB"), "{full:?}");
    for disk in [&small, &noise] {
        host.ok("detach_disk", &json!([vm, disk]));
    }
    // Holes of a file stay holes.
    host.ok("snapshot_disk", &json!([noise, {}]));
    host.ok("update_disk", &json!([small, 96, raw]));
    assert!(fast.names().contains(&small.to_string()));
}

#[test]
fn resize_disk_in_progress_reserves_its_growth() {
    if !cfg!(debug_assertions) {
        return skip("crash points are for builds with debug assertions");
    }
    let Some((_fast, _stemcells, host)) = host(64, json!({"overcommit": false})) else { return };
    let [one, other] = [(), ()].map(|()| disk_cid(&disk(&host, 10, &json!({"pool": "fast"}))));
    // An unfinished resize_disk has reserved most of the free space.
    assert!(
        call_with_crash(&host, "resize_disk", &json!([one, 35]), [("AT", "growth noted#1")])
            .is_none()
    );
    let refused = host.call("resize_disk", &json!([other, 35]));
    assert_eq!(refused.failure().kind, "NoDiskSpace", "{refused:?}");
    host.ok("resize_disk", &json!([one, 35]));
    let record = host.store().read::<DiskRecord>(&one).unwrap().unwrap();
    assert_eq!((record.size.get(), record.resize_target), (35, None));
}

#[test]
fn report_usage_matches_records_and_filesystems() {
    let Some((fast, _stemcells, host)) = host(256, json!({})) else { return };
    let stemcell = host.stemcell();
    disk_cid(&disk(
        &host,
        16,
        &json!({"pool": "fast", "preallocation": "falloc", "format": "raw"}),
    ));
    disk_cid(&disk(&host, 100, &json!({"pool": "fast"})));
    let _vm = host.vm(&stemcell);
    let config = Config::load(Some(&host.path("cpi.json"))).unwrap();
    let cx = Context::new(config, None);
    let usage = usage::all(&cx);
    let of = |name| usage.iter().find(|(pool, _)| *pool == name).unwrap().1.as_ref().unwrap();
    let mib = |bytes: bosh_qemu_cpi::units::Bytes| bytes.get() >> 20;
    let used = of(Some("fast"));
    assert_eq!((mib(used.capacity), mib(used.virtual_size), mib(used.allocated)), (256, 116, 16));
    assert_eq!((used.path.as_path(), mib(used.growth)), (fast.path(), 99));
    assert!(mib(used.free) <= 240 && mib(used.free) > 230, "{used:?}");
    // The VM's hard link is the stemcell's image and counts once.
    let used = of(Some("stemcells"));
    assert_eq!((mib(used.virtual_size), mib(used.growth)), (1, 0));
    assert!(used.allocated.get() <= 1 << 20, "{used:?}");
    assert_eq!(mib(of(None).virtual_size), 1, "the VM's root disk");
    fast.hide();
    let usage = usage::all(&cx);
    assert!(usage.iter().any(|(pool, usage)| *pool == Some("fast") && usage.is_err()));
    fast.show();
}

/// Deletes every whole object, after a create has removed the unfinished ones.
fn delete_ready<R: Record>(host: &Host, method: &str) {
    let store = host.store();
    host.ok("delete_disk", &json!([host.disk()]));
    for cid in store.list::<R>().unwrap() {
        if store.read::<R>(&cid).unwrap().is_some_and(|record| record.phase() == Phase::Ready) {
            host.ok(method, &json!([cid.to_string()]));
        }
    }
}

#[test]
fn call_killed_at_any_step_leaves_nothing_in_its_pool() {
    if !cfg!(debug_assertions) {
        return skip("crash points are for builds with debug assertions");
    }
    let Some((fast, stemcells, host)) = host(256, json!({})) else { return };
    let disk_arguments =
        || json!([8, {"pool": "fast", "preallocation": "falloc", "format": "raw"}, null]);
    let disk_made = || json!([host.ok("create_disk", &disk_arguments())]);
    let image = host.path("one");
    fs::write(&image, [GUEST, &[7; 4096]].concat()).unwrap();
    let stemcell_made = || json!([host.ok("create_stemcell", &json!([image, {}]))]);
    let calls: [(&str, &dyn Fn() -> Value); 4] = [
        ("create_disk", &disk_arguments),
        ("delete_disk", &disk_made),
        ("create_stemcell", &|| json!([image, {}])),
        ("delete_stemcell", &stemcell_made),
    ];
    for (method, arguments) in calls {
        for_each_crash_point(&host, method, arguments, |crash| {
            host.ok(method, crash.arguments);
            delete_ready::<DiskRecord>(&host, "delete_disk");
            delete_ready::<StemcellRecord>(&host, "delete_stemcell");
            for pool in [&fast, &stemcells] {
                assert!(
                    pool.names().iter().all(|name| name == MARK[0]),
                    "{method} at {}: {:?}",
                    crash.point,
                    pool.names()
                );
            }
            String::new()
        });
    }
    host.assert_no_leaks();
}

#[test]
fn create_vm_killed_at_any_step_leaves_nothing_in_its_pool() {
    if !cfg!(debug_assertions) {
        return skip("crash points are for builds with debug assertions");
    }
    let Some((fast, stemcells, host)) = host(256, json!({})) else { return };
    let stemcell = host.stemcell();
    let arguments = || {
        let mut arguments = host.vm_arguments(&stemcell);
        arguments[2] = json!({"ram": 64, "pool": "fast", "ephemeral_disk": 64});
        arguments
    };
    for_each_crash_point(&host, "create_vm", arguments, |crash| {
        // A supervisor whose call was killed keeps the VM's lock until it has reverted the launch.
        eventually("the VM is ready or removed", || {
            delete_ready::<VmRecord>(&host, "delete_vm");
            host.store().pending_dir().read_dir().unwrap().next().is_none().then_some(())
        });
        let mut left = [fast.names(), stemcells.names()].concat();
        left.retain(|name| name != MARK[0]);
        assert_eq!(left, [stemcell.as_str()], "at {}", crash.point);
        String::new()
    });
}

#[test]
fn create_stemcell_of_known_file_shares_its_image() {
    let Some((_fast, stemcells, host)) = host(256, json!({})) else { return };
    let image = |stemcell: &str| {
        stemcells.path().join(stemcell).join("image.raw").metadata().unwrap().ino()
    };
    let first = host.stemcell();
    let second = host.call("create_stemcell", &json!([host.path("image"), {"x": 1}]));
    assert!(second.stderr.contains("sharing the image"), "{second:?}");
    let second = text(second.result());
    assert_ne!(first, second);
    assert_eq!(image(&first), image(&second));
    let mut other = GUEST.to_vec();
    other[0] ^= 1;
    assert_ne!(image(&host.import(&other)), image(&first), "another file of the same length");

    host.ok("delete_stemcell", &json!([first]));
    let vm = host.vm(&second);
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 1);
    let third = host.stemcell();
    assert_eq!(image(&third), image(&second), "shared with one that was shared");
    host.ok("delete_stemcell", &json!([second]));
    host.ok("delete_stemcell", &json!([third]));
    host.ok("reboot_vm", &json!([vm]));
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 2);
    // A record of an older program lacks the source file, so its image is not shared.
    let old = host.stemcell();
    let store = host.store();
    let mut record = store.read::<StemcellRecord>(&old.parse().unwrap()).unwrap().unwrap();
    record.source = None;
    store.write(&record).unwrap();
    assert_ne!(image(&host.stemcell()), image(&old));
}

#[test]
fn list_pools_counts_every_image() {
    let Some((fast, stemcells, host)) = host(256, json!({})) else { return };
    let list = || {
        let (passed, list) = host.command(&["pool", "list", "--json"]);
        (passed, list.as_array().unwrap().clone())
    };
    let stemcell = host.stemcell();
    vm_in_pool(&host, &stemcell);
    let kept = disk_cid(&disk(&host, 8, &json!({"pool": "fast", "preallocation": "full"})));
    let before = list().1;
    let named = |pool: &Value| pool["pool"].as_str().map(str::to_owned);
    assert_eq!(
        before.iter().map(named).collect::<Vec<_>>(),
        [None, Some("fast".into()), Some("stemcells".into())]
    );
    let of = |list: &[Value], key: &str| list[1][key].as_u64().unwrap();
    assert_eq!(of(&before, "capacity"), 256 << 20);
    assert_eq!(before[1]["path"], json!(fast.path()));
    // A preallocated disk of 8 MiB, an empty ephemeral disk of 64 MiB and a root disk of 1 MiB.
    assert_eq!(of(&before, "virtual_size"), 73 << 20);
    let grown = of(&before, "growth");
    assert!((60 << 20..65 << 20).contains(&grown), "{grown}");
    assert!(
        before.iter().all(|pool| pool["watermark"] == "ok" || pool["pool"].is_null()),
        "{before:?}"
    );

    host.ok("snapshot_disk", &json!([kept, {}]));
    let with_snapshot = list().1;
    assert_eq!(of(&with_snapshot, "virtual_size"), 81 << 20);
    assert_eq!(of(&with_snapshot, "growth"), grown, "a snapshot does not grow");
    assert!(of(&with_snapshot, "allocated") >= of(&before, "allocated") + (8 << 20));

    // An unfinished copy.
    let mut record = host.store().read::<DiskRecord>(&kept).unwrap().unwrap();
    let copy = bosh_qemu_cpi::store::record::DiskImage { generation: 1, ..record.current() };
    fs::write(fast.path().join(kept.to_string()).join(copy.file_name()), vec![1; 1 << 20]).unwrap();
    record.inactive_image = Some(copy);
    host.store().write(&record).unwrap();
    let with_copy = list().1;
    assert_eq!(of(&with_copy, "virtual_size"), 89 << 20);
    assert_eq!(of(&with_copy, "growth"), grown + (7 << 20));

    fs::write(fast.path().join("filler"), vec![1; 210 << 20]).unwrap();
    assert_eq!(list().1[1]["watermark"], "low");
    fs::write(fast.path().join("more"), vec![1; 20 << 20]).unwrap();
    assert_eq!(list().1[1]["watermark"], "full");
    let output = host.namespace().run(|| host.cpi().args(["pool", "list"]).output().unwrap());
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(
        table.starts_with("POOL ") && table.contains("(state_dir)") && table.contains("full\n"),
        "{table}"
    );

    stemcells.hide();
    let (passed, hidden) = list();
    assert!(
        !passed && hidden[2]["error"].as_str().unwrap().contains("pool 'stemcells'"),
        "{hidden:?}"
    );
    stemcells.show();
}
