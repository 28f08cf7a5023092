//! A serial always names the same image, in any order of attaching and after every kind of restart.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use bosh_qemu_cpi::cid::{DiskCid, VmCid};
use serde_json::{Value, json};

use crate::support::host::{Host, vm_cid};

/// The image behind each serial, by the kernel's name of the file that QEMU has open.
fn images(host: &Host, vm: &VmCid) -> BTreeMap<String, PathBuf> {
    let ask = |command: &str, arguments: Value| host.qmp(vm, command, &arguments).unwrap();
    let qemu = host.qemu(vm).unwrap().pid();
    let sets = ask("query-fdsets", json!({}));
    // `file` is a file name or JSON that contains one.
    let image = |file: &str| {
        let (_, number) =
            file.split_once("/dev/fdset/").unwrap_or_else(|| panic!("no descriptor: {file}"));
        let id: u64 = number.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap();
        let set = sets
            .as_array()
            .unwrap()
            .iter()
            .find(|set| set["fdset-id"] == id)
            .expect("a set of descriptors");
        fs::read_link(format!("/proc/{qemu}/fd/{}", set["fds"][0]["fd"])).unwrap()
    };
    let nodes = ask("query-named-block-nodes", json!({"flat": true}));
    let file = |node: &str| {
        let below = json!(format!("{node}-file"));
        let node = nodes
            .as_array()
            .unwrap()
            .iter()
            .find(|its| its["node-name"] == below)
            .expect("a protocol node");
        node["image"]["filename"].as_str().unwrap()
    };
    let devices = ask("query-block", json!({}));
    let devices = devices.as_array().unwrap().iter().map(|device| {
        let id = device["qdev"]
            .as_str()
            .unwrap()
            .trim_start_matches("/machine/peripheral/")
            .split('/')
            .next()
            .unwrap();
        let serial = ask(
            "qom-get",
            json!({"path": format!("/machine/peripheral/{id}"), "property": "serial"}),
        );
        (
            serial.as_str().unwrap().to_owned(),
            image(file(device["inserted"]["node-name"].as_str().unwrap())),
        )
    });
    devices.collect()
}

#[test]
fn reboot_crash_or_reattach_keeps_serials() {
    let Some(host) = Host::with(json!({"qemu": {"hotplug_slots": 4}})) else { return };
    let mut arguments = host.vm_arguments(&host.stemcell());
    arguments[2]["ephemeral_disk"] = json!(16);
    let vm = vm_cid(&host.ok("create_vm", &arguments));
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 1);
    let disks: Vec<DiskCid> = (0..3).map(|_| host.disk()).collect();
    let attach = |disk: &DiskCid| {
        let hint = host.ok("attach_disk", &json!([vm, disk]));
        assert_eq!(hint, json!({"path": format!("/dev/disk/by-id/virtio-{disk}")}));
    };
    let detach = |disk: &DiskCid| host.ok("detach_disk", &json!([vm, disk]));
    disks.iter().for_each(attach);

    let first = images(&host, &vm);
    assert_eq!(first.len(), 6, "root, ephemeral, config drive and three disks: {first:?}");
    let own = |name: &str| format!("{vm}/{name}");
    let mut wanted =
        vec![("root".to_owned(), own("root.qcow2")), ("config".to_owned(), own("config.img"))];
    wanted.push((host.record(&vm).ephemeral.unwrap().serial, own("ephemeral.qcow2")));
    wanted.extend(disks.iter().map(|disk| (disk.to_string(), format!("{disk}/disk.qcow2"))));
    for (serial, image) in &wanted {
        assert!(first[serial].ends_with(image), "{serial} is {}", first[serial].display());
        assert!(serial.len() <= 20, "virtio-blk cuts it off: {serial}");
    }

    host.qmp(&vm, "system_reset", &json!({})).unwrap();
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 2);
    assert_eq!(images(&host, &vm), first, "after a reboot of the guest");

    host.kill_qemu(&vm);
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 3);
    assert_eq!(images(&host, &vm), first, "after a crash and the supervisor's restart");

    for order in [[2, 0, 1], [1, 2, 0]] {
        disks.iter().for_each(|disk| drop(detach(disk)));
        assert_eq!(images(&host, &vm).len(), 3);
        order.into_iter().for_each(|index| attach(&disks[index]));
        assert_eq!(images(&host, &vm), first, "attached in the order {order:?}");
    }

    host.ok("reboot_vm", &json!([vm]));
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 4);
    assert_eq!(images(&host, &vm), first, "after reboot_vm");
    disks.iter().for_each(attach);
}
