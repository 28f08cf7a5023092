//! The guest of the test stemcell and its replacement of the agent, which serves HTTP.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bosh_qemu_cpi::cid::{DiskCid, VmCid};
use serde_json::{Value, json};

use crate::support::host::{Host, text, vm_cid, wait_for_exit};
use crate::support::netns::Namespace;
use crate::support::skip;

/// Longest boot of a guest that is emulated on two cores together with other tests.
const BOOT_TIMEOUT: Duration = Duration::from_secs(300);

/// Directory of the test stemcell. Prints why and returns `None` if it was not made.
pub fn stemcell_dir() -> Option<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/stemcell");
    if dir.join("image").exists() {
        return Some(dir);
    }
    skip("no Linux stemcell in target/stemcell: ./test makes it");
    None
}

/// Imports the stemcell and returns its cid.
pub fn import(host: &Host, dir: &Path) -> String {
    let properties: Value =
        serde_json::from_slice(&std::fs::read(dir.join("stemcell.json")).unwrap()).unwrap();
    text(&host.ok("create_stemcell", &json!([dir.join("image"), properties])))
}

/// Agent settings. An agent does not start without a message bus.
pub fn agent() -> Value {
    json!({"mbus": "https://mbus:password@0.0.0.0:6868"})
}

/// A manual network 10.99.`third`.0/24 in which the guest has the address 5.
pub fn network(third: u8) -> Value {
    json!({
        "type": "manual", "ip": format!("10.99.{third}.5"), "netmask": "255.255.255.0",
        "gateway": format!("10.99.{third}.1"), "dns": [format!("10.99.{third}.1")],
    })
}

/// Sends a GET request and returns the JSON of a successful response.
pub fn ask_from(namespace: &Namespace, address: &str, path: &str) -> std::io::Result<Value> {
    namespace.run(|| {
        let address: SocketAddr = address.parse().unwrap();
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(180)))?;
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

/// The guest of a VM.
pub struct Guest<'a> {
    host: &'a Host,
    pub vm: VmCid,
    /// Address and port of its agent.
    address: String,
    /// Number of its boots so far.
    boots: usize,
}

impl<'a> Guest<'a> {
    /// The guest of a VM with the given address.
    pub fn new(host: &'a Host, vm: VmCid, address: &str) -> Self {
        Self { host, vm, address: format!("{address}:8080"), boots: 0 }
    }

    /// Creates a VM on a network of its own and waits until its guest has booted.
    pub fn boot(host: &'a Host, stemcell: &str) -> Self {
        let mut lan = network(0);
        lan["default"] = json!(["dns", "gateway"]);
        let properties = json!({"ram": 256, "ephemeral_disk": 256, "root_disk": 512});
        let arguments =
            json!(["agent-1", stemcell, properties, {"lan": lan}, [], {"bosh": {"password": "*"}}]);
        let mut guest = Self::new(host, vm_cid(&host.ok("create_vm", &arguments)), "10.99.0.5");
        guest.booted();
        guest
    }

    /// Waits until the guest has booted once more and its agent answers. Each attempt ends by
    /// itself: a refused connection at once, an unreachable guest after two seconds.
    pub fn booted(&mut self) {
        self.boots += 1;
        self.host.wait_for_console_within(&self.vm, "GUEST-READY", self.boots, BOOT_TIMEOUT);
        let deadline = Instant::now() + BOOT_TIMEOUT;
        while let Err(error) = self.ask("/ping") {
            assert!(Instant::now() < deadline, "the guest does not answer: {error}");
        }
    }

    fn ask(&self, path: &str) -> std::io::Result<Value> {
        ask_from(self.host.namespace(), &self.address, path)
    }

    /// The response of a guest that must be up.
    pub fn get(&self, path: &str) -> Value {
        self.ask(path).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    /// Runs an action of the agent on a disk. Like the real agent, it waits for the device to
    /// appear.
    pub fn disk(&self, disk: &DiskCid, action: &str) -> Value {
        self.get(&format!("/disk/{disk}/{action}"))["value"].clone()
    }

    /// Sizes in bytes of the guest's disks by serial. The request takes seconds.
    pub fn disks(&self) -> BTreeMap<String, u64> {
        let disks = self.get("/disks");
        let disk = |disk: &Value| (text(&disk["serial"]), disk["bytes"].as_u64().unwrap());
        disks.as_array().unwrap().iter().map(disk).collect()
    }

    /// Mounts a disk in the guest and grows its filesystem. Returns the size of the filesystem,
    /// MiB.
    pub fn grow(&self, disk: &DiskCid) -> u64 {
        text(&self.disk(disk, "grow")).parse().unwrap()
    }

    /// Makes the guest power itself off and waits until the VM is off.
    pub fn power_off(&self) {
        let supervisor = self.host.supervisor(&self.vm).expect("a supervisor");
        self.get("/poweroff");
        wait_for_exit(&supervisor);
        assert!(self.host.qemu(&self.vm).is_none());
    }
}
