//! A real Linux guest: its udev finds disks by serial, its filesystem keeps data, its network is what was asked for.
//!
//! The guest is the test stemcell of `scripts/make-stemcell`, which `./test` makes. Emulated, it takes some ten seconds
//! to boot.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bosh_qemu_cpi::cid::{Cid, DiskCid, VmCid};
use serde_json::{Value, json};

use crate::support::host::{Host, eventually, text, vm_cid};
use crate::support::netns::Namespace;
use crate::support::skip;

/// Emulated on two cores that other tests use, too.
const BOOT: Duration = Duration::from_secs(300);

/// The made stemcell, or the reason why there is none.
fn stemcell_dir() -> Option<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/stemcell");
    if dir.join("image").exists() {
        return Some(dir);
    }
    skip("no Linux stemcell in target/stemcell: ./test makes it");
    None
}

fn import(host: &Host, dir: &Path) -> String {
    let properties: Value = serde_json::from_slice(&std::fs::read(dir.join("stemcell.json")).unwrap()).unwrap();
    text(&host.ok("create_stemcell", &json!([dir.join("image"), properties])))
}

fn create(host: &Host, stemcell: &str, networks: &Value) -> VmCid {
    let properties = json!({"ram": 256, "ephemeral_disk": 256, "root_disk": 512});
    let env = json!({"bosh": {"password": "*"}});
    vm_cid(&host.ok("create_vm", &json!(["agent-1", stemcell, properties, networks, [], env])))
}

/// A message bus, without which no agent starts.
fn agent() -> Value {
    json!({"mbus": "https://mbus:password@0.0.0.0:6868"})
}

fn network(third: u8) -> Value {
    json!({
        "type": "manual", "ip": format!("10.99.{third}.5"), "netmask": "255.255.255.0",
        "gateway": format!("10.99.{third}.1"), "dns": [format!("10.99.{third}.1")],
    })
}

/// What the guest answers to a GET, if it answers.
fn ask(host: &Host, path: &str) -> std::io::Result<Value> {
    ask_from(host.namespace(), "10.99.0.5:8080", path)
}

/// The same from elsewhere.
fn ask_from(namespace: &Namespace, address: &str, path: &str) -> std::io::Result<Value> {
    namespace.run(|| {
        let address: SocketAddr = address.parse().unwrap();
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or(("", &answer));
        if !head.contains(" 200 ") {
            return Err(std::io::Error::other(answer));
        }
        serde_json::from_str(body).map_err(std::io::Error::other)
    })
}

/// The answer of a guest that is up.
fn get(host: &Host, path: &str) -> Value {
    ask(host, path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Waits until the guest answers over its network. Each try ends by itself: a refused connection at once, a guest that
/// is not there after two seconds.
fn booted(host: &Host, vm: &VmCid) {
    host.sees_within(vm, "GUEST-READY", 1, BOOT);
    let deadline = Instant::now() + BOOT;
    while let Err(error) = ask(host, "/ping") {
        assert!(Instant::now() < deadline, "the guest does not answer: {error}");
    }
}

fn disk(host: &Host, disk: &DiskCid, action: &str) -> Value {
    get(host, &format!("/disk/{disk}/{action}"))["value"].clone()
}

#[test]
fn data_survives_detaching_rebooting_and_another_vm() {
    let Some(dir) = stemcell_dir() else { return };
    let Some(host) = Host::with(json!({"agent": agent()})) else { return };
    let stemcell = import(&host, &dir);
    let mut lan = network(0);
    lan["default"] = json!(["dns", "gateway"]);
    let networks = json!({"lan": lan});
    let vm = create(&host, &stemcell, &networks);
    booted(&host, &vm);
    assert_eq!(get(&host, "/ping")["agent_id"], "agent-1");

    let first: DiskCid = text(&host.ok("create_disk", &json!([64, {}, vm]))).parse().unwrap();
    let second: DiskCid = text(&host.ok("create_disk", &json!([32, {"format": "raw"}, vm]))).parse().unwrap();
    // The second before the first: letters follow the order of plugging, serials do not.
    for cid in [&second, &first] {
        let hint = host.ok("attach_disk", &json!([vm, cid]));
        assert_eq!(hint["path"], format!("/dev/disk/by-id/virtio-{cid}"));
        disk(&host, cid, "format");
        disk(&host, cid, &format!("write?text={cid}"));
        disk(&host, cid, "unmount");
    }
    let by_id = |name: &str| {
        let disks = get(&host, "/disks");
        let found = disks.as_array().unwrap().iter().find(|disk| disk["serial"] == name).cloned();
        found.unwrap_or_else(|| panic!("no disk with serial {name}: {disks}"))
    };
    assert_eq!(by_id(first.as_str())["bytes"], 64 << 20);
    assert_eq!(by_id(second.as_str())["bytes"], 32 << 20);
    assert_eq!(by_id("root")["bytes"], 512 << 20);

    host.ok("detach_disk", &json!([vm, second]));
    host.ok("reboot_vm", &json!([vm]));
    booted(&host, &vm);
    assert_eq!(disk(&host, &first, "read"), first.as_str(), "after a reboot");
    disk(&host, &first, "unmount");
    host.ok("delete_vm", &json!([vm]));

    let other = create(&host, &stemcell, &networks);
    for cid in [&first, &second] {
        host.ok("attach_disk", &json!([other, cid]));
    }
    booted(&host, &other);
    for cid in [&first, &second] {
        assert_eq!(disk(&host, cid, "read"), cid.as_str(), "on another VM");
        disk(&host, cid, "unmount");
        host.ok("detach_disk", &json!([other, cid]));
    }
}

#[test]
fn a_mounted_disk_grows_moves_and_is_restored_from_a_snapshot() {
    let Some(dir) = stemcell_dir() else { return };
    let Some(host) = Host::with(json!({"agent": agent()})) else { return };
    let mut lan = network(0);
    lan["default"] = json!(["dns", "gateway"]);
    let vm = create(&host, &import(&host, &dir), &json!({"lan": lan}));
    booted(&host, &vm);
    let cid: DiskCid = text(&host.ok("create_disk", &json!([64, {}, vm]))).parse().unwrap();
    host.ok("attach_disk", &json!([vm, cid]));
    disk(&host, &cid, "format");
    disk(&host, &cid, "write?text=before");
    // From here on mounted all the time.
    let bytes = |cid: &DiskCid| {
        let disks = get(&host, "/disks");
        let mut all = disks.as_array().unwrap().iter();
        all.find(|disk| disk["serial"] == cid.as_str()).map(|disk| disk["bytes"].as_u64().unwrap() >> 20)
    };
    host.ok("resize_disk", &json!([cid, 96]));
    eventually("the guest sees the new size", || (bytes(&cid) == Some(96)).then_some(()));
    let snapshot = text(&host.ok("snapshot_disk", &json!([cid, {}])));
    disk(&host, &cid, "write?text=after");
    host.ok("update_disk", &json!([cid, 128, {"format": "raw"}]));
    eventually("the guest sees the size after the copy", || (bytes(&cid) == Some(128)).then_some(()));
    assert_eq!(disk(&host, &cid, "read"), "after");
    disk(&host, &cid, "write?text=on-the-copy");

    let output = host.cpi().args(["disk", "restore", &snapshot]).output().unwrap();
    let restored: DiskCid = String::from_utf8(output.stdout).unwrap().trim().parse().unwrap();
    host.ok("attach_disk", &json!([vm, restored]));
    assert_eq!(disk(&host, &restored, "read"), "before");
    assert_eq!(bytes(&restored), Some(96));
    assert_eq!(disk(&host, &cid, "read"), "on-the-copy");
    for cid in [&cid, &restored] {
        disk(&host, cid, "unmount");
        host.ok("detach_disk", &json!([vm, cid]));
        host.ok("attach_disk", &json!([vm, cid]));
    }
    assert_eq!(disk(&host, &cid, "read"), "on-the-copy");
    disk(&host, &cid, "unmount");
}

#[test]
fn nics_are_in_manifest_order_and_the_default_one_leads_to_the_world_and_back() {
    let Some(dir) = stemcell_dir() else { return };
    let networks = json!({"default": {"profile": "nat"}, "back": {"profile": "nat", "bridge": "bosh-nat1"}});
    let Some(host) = Host::with(json!({"networks": networks, "agent": agent()})) else { return };
    let outside = Namespace::new().expect("as the host's");
    host.namespace().cable("uplink", &outside, "world");
    host.namespace().ip("address add 192.0.2.1/24 dev uplink");
    outside.ip("address add 192.0.2.2/24 dev world");
    let stemcell = import(&host, &dir);
    let (mut zeta, mut alpha) = (network(0), network(1));
    zeta["default"] = json!(["dns", "gateway"]);
    alpha["cloud_properties"] = json!({"name": "back"});
    // Written out, because the order of keys counts: zeta first.
    let vip = r#"{"type":"vip","ip":"198.51.100.7"}"#;
    let text = format!(r#"{{"zeta":{zeta},"pub":{vip},"alpha":{alpha}}}"#);
    // With two CPUs, each card has two queues.
    let ports = json!([{"host": 80, "guest": 8080, "address": "192.0.2.1"}]);
    let properties = json!({"cpu": 2, "ram": 256, "ephemeral_disk": 256, "root_disk": 512, "ports": ports});
    let arguments = format!(r#"["agent-1","{stemcell}",{properties},{text},[],{{}}]"#);
    let context = r#"{"director_uuid":"deadbeef"}"#;
    let request = format!(r#"{{"method":"create_vm","arguments":{arguments},"context":{context},"api_version":2}}"#);
    let vm = vm_cid(host.ask(&request).result());
    booted(&host, &vm);

    let seen = get(&host, "/net");
    let nics = seen["interfaces"].as_array().unwrap();
    let nic = |name: &str| nics.iter().find(|nic| nic["name"] == name).unwrap_or_else(|| panic!("no {name}: {seen}"));
    let record = host.record(&vm);
    for (index, address) in [(0, "10.99.0.5/24"), (1, "10.99.1.5/24")] {
        let nic = nic(&format!("eth{index}"));
        assert_eq!(nic["mac"], record.nics[index].mac.to_string());
        assert!(nic["addresses"].as_array().unwrap().contains(&json!(address)), "{seen}");
    }
    assert_eq!(seen["default_routes"], json!([{"gateway": "10.99.0.1", "interface": "eth0"}]));

    // The world knows no way to the VM, but the host's address.
    assert_eq!(ask_from(&outside, "192.0.2.1:80", "/ping").expect("by a forward")["agent_id"], "agent-1");
    let listener = outside.run(|| TcpListener::bind("192.0.2.2:0").unwrap());
    let port = listener.local_addr().unwrap().port();
    listener.set_nonblocking(true).unwrap();
    let (told, seen) = std::thread::scope(|threads| {
        let asks = threads.spawn(|| get(&host, &format!("/reach/192.0.2.2/{port}")));
        let (mut stream, peer) = eventually("the guest reaches the world", || listener.accept().ok());
        stream.write_all(b"the world").unwrap();
        drop(stream);
        (asks.join().unwrap(), peer.ip())
    });
    assert_eq!((told["value"].as_str(), seen.to_string().as_str()), (Some("the world"), "192.0.2.1"));
}

#[test]
fn a_disk_is_the_same_whatever_becomes_of_the_guest_and_in_whatever_order_it_comes_back() {
    let Some(dir) = stemcell_dir() else { return };
    let Some(host) = Host::with(json!({"agent": agent()})) else { return };
    let mut lan = network(0);
    lan["default"] = json!(["dns", "gateway"]);
    let vm = create(&host, &import(&host, &dir), &json!({"lan": lan}));
    booted(&host, &vm);
    let disks: Vec<DiskCid> =
        [64, 32].map(|size| text(&host.ok("create_disk", &json!([size, {}, vm]))).parse().unwrap()).into();
    let attach = |cid: &DiskCid| {
        let hint = host.ok("attach_disk", &json!([vm, cid]));
        assert_eq!(hint["path"], format!("/dev/disk/by-id/virtio-{cid}"));
    };
    for cid in &disks {
        attach(cid);
        disk(&host, cid, "format");
        disk(&host, cid, &format!("write?text={cid}"));
        disk(&host, cid, "unmount");
    }
    // The guest looks each up in /dev/disk/by-id; the config drive is a disk beside them.
    let same = |when: &str| {
        for cid in &disks {
            // Waits for the disk, as the agent does: its hot-plug takes the guest a moment.
            assert_eq!(disk(&host, cid, "read"), cid.as_str(), "{when}");
            disk(&host, cid, "unmount");
        }
        let seen = get(&host, "/disks");
        let bytes = |serial: &str| {
            let disk = seen.as_array().unwrap().iter().find(|disk| disk["serial"] == serial);
            disk.unwrap_or_else(|| panic!("{when}: no {serial} in {seen}"))["bytes"].as_u64().unwrap()
        };
        assert_eq!(
            [bytes(disks[0].as_str()), bytes(disks[1].as_str()), bytes("root")],
            [64, 32, 512].map(|mib| mib << 20)
        );
        assert!(bytes("config") > 0, "{when}");
    };
    same("at first");
    for cid in &disks {
        host.ok("detach_disk", &json!([vm, cid]));
    }
    disks.iter().rev().for_each(attach);
    same("attached in another order");

    host.qmp(&vm, "system_reset", &json!({})).unwrap();
    host.sees_within(&vm, "GUEST-READY", 2, BOOT);
    booted(&host, &vm);
    same("after a reboot of the guest");

    host.crash(&vm);
    host.sees_within(&vm, "GUEST-READY", 3, BOOT);
    booted(&host, &vm);
    same("after a crash of QEMU");
}
