//! Tests with a Linux guest: udev finds disks by serial, filesystems keep their data, and networks
//! are configured as requested.
//!
//! The guest is the test stemcell of `scripts/make-stemcell`, which `./test` makes. Under emulation
//! it boots in about ten seconds.

mod flows;
mod guest;

use std::io::Write;
use std::net::TcpListener;

use bosh_qemu_cpi::cid::{Cid, DiskCid};
use serde_json::{Value, json};

use self::guest::{Guest, agent, ask_from, import, network, stemcell_dir};
use crate::support::filesystem::Filesystem;
use crate::support::host::{Host, eventually, text, vm_cid};
use crate::support::netns::Namespace;
use crate::support::vm_list::list_when_all_answer;

fn disk(host: &Host, mib: u64, properties: &Value) -> DiskCid {
    text(&host.ok("create_disk", &json!([mib, properties, null]))).parse().unwrap()
}

#[test]
fn replay_director_flows_keeps_the_data() {
    let Some(dir) = stemcell_dir() else { return };
    let Some(host) = Host::with(json!({"agent": agent()})) else { return };
    let stemcell = import(&host, &dir);
    let mut guest = Guest::boot(&host, &stemcell);
    assert_eq!(guest.get("/ping")["agent_id"], "agent-1");

    let first = disk(&host, 64, &json!({}));
    let second = disk(&host, 32, &json!({"format": "raw"}));
    // The second disk is attached first: device names follow the order of plugging, serials do not.
    for cid in [&second, &first] {
        let hint = host.ok("attach_disk", &json!([guest.vm, cid]));
        assert_eq!(hint["path"], format!("/dev/disk/by-id/virtio-{cid}"));
        guest.disk(cid, "format");
        guest.disk(cid, &format!("write?text={cid}"));
        guest.disk(cid, "unmount");
    }
    let seen = guest.disks();
    assert_eq!(
        [first.as_str(), second.as_str(), "root"].map(|serial| seen[serial] >> 20),
        [64, 32, 512]
    );

    host.ok("detach_disk", &json!([guest.vm, second]));
    host.ok("reboot_vm", &json!([guest.vm]));
    guest.booted();
    assert_eq!(guest.disk(&first, "read"), first.as_str(), "after a reboot");

    let (guest, larger) = flows::bigger_disk(&host, &stemcell, guest, &first);
    assert_eq!(guest.disk(&larger, "read"), first.as_str());
    let guest = flows::resize(&host, guest, &second);
    flows::hot_swap(&host, &stemcell, guest, &larger);
}

#[test]
fn write_in_full_pool_pauses_the_guest_until_there_is_space() {
    let Some(dir) = stemcell_dir() else { return };
    let Some(pool) = Filesystem::new(64) else { return };
    let config = json!({"agent": agent(), "pools": {"tight": {"path": pool.path()}}});
    let Some(host) = Host::with(config) else { return };
    let guest = Guest::boot(&host, &import(&host, &dir));
    let cid = disk(&host, 32, &json!({"pool": "tight"}));
    host.ok("attach_disk", &json!([guest.vm, cid]));
    guest.disk(&cid, "format");
    let ballast = pool.path().join("ballast");
    let mut file = std::fs::File::create(&ballast).unwrap();
    while file.write_all(&[1; 4096]).is_ok() {}
    drop(file);
    std::thread::scope(|threads| {
        let writes = threads.spawn(|| guest.disk(&cid, "write?text=in-the-end"));
        host.wait_for_event(&guest.vm, "BLOCK_IO_ERROR", 1);
        host.wait_for_event(&guest.vm, "STOP", 1);
        let listed = list_when_all_answer(&host);
        assert_eq!(
            (&listed[0]["state"], &listed[0]["reason"]),
            (&json!("paused"), &json!(format!("io-error on {cid} (no space)")))
        );
        std::fs::remove_file(&ballast).unwrap();
        host.wait_for_event(&guest.vm, "resumed", 1);
        writes.join().unwrap();
    });
    assert_eq!(guest.disk(&cid, "read"), "in-the-end");
    assert_eq!(list_when_all_answer(&host)[0]["state"], "running");
}

#[test]
fn resize_update_and_restore_mounted_disk_keep_its_data() {
    let Some(dir) = stemcell_dir() else { return };
    let Some(host) = Host::with(json!({"agent": agent()})) else { return };
    let guest = Guest::boot(&host, &import(&host, &dir));
    let cid = disk(&host, 64, &json!({}));
    host.ok("attach_disk", &json!([guest.vm, cid]));
    guest.disk(&cid, "format");
    guest.disk(&cid, "write?text=before");
    // The disk stays mounted from here on.
    let mib = |cid: &DiskCid| guest.disks().get(cid.as_str()).map(|bytes| bytes >> 20);
    host.ok("resize_disk", &json!([cid, 96]));
    eventually("the guest sees the new size", || (mib(&cid) == Some(96)).then_some(()));
    let snapshot = text(&host.ok("snapshot_disk", &json!([cid, {}])));
    guest.disk(&cid, "write?text=after");
    host.ok("update_disk", &json!([cid, 128, {"format": "raw"}]));
    eventually("the guest sees the size after the copy", || (mib(&cid) == Some(128)).then_some(()));
    assert_eq!(guest.disk(&cid, "read"), "after");
    guest.disk(&cid, "write?text=on-the-copy");

    let output = host.cpi().args(["disk", "restore", &snapshot]).output().unwrap();
    let restored: DiskCid = String::from_utf8(output.stdout).unwrap().trim().parse().unwrap();
    host.ok("attach_disk", &json!([guest.vm, restored]));
    assert_eq!(guest.disk(&restored, "read"), "before");
    assert_eq!(mib(&restored), Some(96));
    assert_eq!(guest.disk(&cid, "read"), "on-the-copy");
    for cid in [&cid, &restored] {
        guest.disk(cid, "unmount");
        host.ok("detach_disk", &json!([guest.vm, cid]));
        host.ok("attach_disk", &json!([guest.vm, cid]));
    }
    assert_eq!(guest.disk(&cid, "read"), "on-the-copy");
    guest.disk(&cid, "unmount");
}

#[test]
fn boot_with_two_networks_orders_nics_and_routes() {
    let Some(dir) = stemcell_dir() else { return };
    let networks =
        json!({"default": {"profile": "nat"}, "back": {"profile": "nat", "bridge": "bosh-nat1"}});
    let Some(host) = Host::with(json!({"networks": networks, "agent": agent()})) else { return };
    let outside = Namespace::new().expect("as the host's");
    host.namespace().cable("uplink", &outside, "world");
    host.namespace().ip("address add 192.0.2.1/24 dev uplink");
    outside.ip("address add 192.0.2.2/24 dev world");
    let stemcell = import(&host, &dir);
    let (mut zeta, mut alpha) = (network(0), network(1));
    zeta["default"] = json!(["dns", "gateway"]);
    alpha["cloud_properties"] = json!({"name": "back"});
    // The JSON is written by hand to keep the order of keys: zeta first.
    let vip = r#"{"type":"vip","ip":"198.51.100.7"}"#;
    let text = format!(r#"{{"zeta":{zeta},"pub":{vip},"alpha":{alpha}}}"#);
    // With two CPUs, each NIC has two queues.
    let ports = json!([{"host": 80, "guest": 8080, "address": "192.0.2.1"}]);
    let properties =
        json!({"cpu": 2, "ram": 256, "ephemeral_disk": 256, "root_disk": 512, "ports": ports});
    let arguments = format!(r#"["agent-1","{stemcell}",{properties},{text},[],{{}}]"#);
    let context = r#"{"director_uuid":"deadbeef"}"#;
    let request = format!(
        r#"{{"method":"create_vm","arguments":{arguments},"context":{context},"api_version":2}}"#
    );
    let vm = vm_cid(host.ask(&request).result());
    let mut guest = Guest::new(&host, vm, "10.99.0.5");
    guest.booted();

    let seen = guest.get("/net");
    let nics = seen["interfaces"].as_array().unwrap();
    let nic = |name: &str| {
        nics.iter().find(|nic| nic["name"] == name).unwrap_or_else(|| panic!("no {name}: {seen}"))
    };
    let record = host.record(&guest.vm);
    for (index, address) in [(0, "10.99.0.5/24"), (1, "10.99.1.5/24")] {
        let nic = nic(&format!("eth{index}"));
        assert_eq!(nic["mac"], record.nics[index].mac.to_string());
        assert!(nic["addresses"].as_array().unwrap().contains(&json!(address)), "{seen}");
    }
    assert_eq!(seen["default_routes"], json!([{"gateway": "10.99.0.1", "interface": "eth0"}]));

    // The outside has no route to the VM and reaches it only by the host's address.
    assert_eq!(
        ask_from(&outside, "192.0.2.1:80", "/ping").expect("by a forward")["agent_id"],
        "agent-1"
    );
    let listener = outside.run(|| TcpListener::bind("192.0.2.2:0").unwrap());
    let port = listener.local_addr().unwrap().port();
    listener.set_nonblocking(true).unwrap();
    let (response, seen) = std::thread::scope(|threads| {
        let asks = threads.spawn(|| guest.get(&format!("/reach/192.0.2.2/{port}")));
        let (mut stream, peer) =
            eventually("the guest reaches the world", || listener.accept().ok());
        stream.write_all(b"the world").unwrap();
        drop(stream);
        (asks.join().unwrap(), peer.ip())
    });
    assert_eq!(
        (response["value"].as_str(), seen.to_string().as_str()),
        (Some("the world"), "192.0.2.1")
    );
}

#[test]
fn reboot_crash_or_reattach_keeps_disks_by_serial() {
    let Some(dir) = stemcell_dir() else { return };
    let Some(host) = Host::with(json!({"agent": agent()})) else { return };
    let mut guest = Guest::boot(&host, &import(&host, &dir));
    let vm = guest.vm.clone();
    let disks = [64, 32].map(|mib| disk(&host, mib, &json!({})));
    let attach = |cid: &DiskCid| {
        let hint = host.ok("attach_disk", &json!([vm, cid]));
        assert_eq!(hint["path"], format!("/dev/disk/by-id/virtio-{cid}"));
    };
    for cid in &disks {
        attach(cid);
        guest.disk(cid, "format");
        guest.disk(cid, &format!("write?text={cid}"));
        guest.disk(cid, "unmount");
    }
    // The guest finds each disk in /dev/disk/by-id. The config drive is another disk.
    let same = |guest: &Guest<'_>, when: &str| {
        for cid in &disks {
            assert_eq!(guest.disk(cid, "read"), cid.as_str(), "{when}");
            guest.disk(cid, "unmount");
        }
        let seen = guest.disks();
        let serials = [disks[0].as_str(), disks[1].as_str(), "root"];
        assert_eq!(serials.map(|serial| seen[serial] >> 20), [64, 32, 512], "{when}");
        assert!(seen["config"] > 0, "{when}");
    };
    same(&guest, "at first");
    for cid in &disks {
        host.ok("detach_disk", &json!([vm, cid]));
    }
    disks.iter().rev().for_each(attach);
    same(&guest, "attached in another order");

    host.qmp(&vm, "system_reset", &json!({})).unwrap();
    guest.booted();
    same(&guest, "after a reboot of the guest");

    host.kill_qemu(&vm);
    guest.booted();
    same(&guest, "after a crash of QEMU");
}
