//! The host of the benchmark: its directories, a stemcell, and the CPI calls.

use std::cell::{Cell, RefCell};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bosh_qemu_cpi::cid::{Cid, VmCid};
use bosh_qemu_cpi::host::tail;
use bosh_qemu_cpi::qmp::monitor::Monitor;
use bosh_qemu_cpi::store::{Store, VmPaths, VmRecord};
use bosh_qemu_cpi::supervisor::{self, StopMode};
use bosh_qemu_cpi::sys::pidlock;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{cid, timed};

/// The guest's boot sector.
pub const GUEST: &[u8; 512] = include_bytes!("../../guests/acpi-bootsector.bin");
/// Longest time to wait for QEMU or its guest.
const GUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// The benchmark's host. Drop removes its VMs and directories.
pub struct Lab {
    program: PathBuf,
    config: PathBuf,
    pub store: Store,
    stemcell: String,
    /// Memory of supervisors: RSS, PSS and anonymous memory, kB.
    memory: RefCell<Vec<[u64; 3]>>,
    /// Number of VMs created, from which each gets its IP address.
    vms: Cell<u32>,
    pub state: TempDir,
    _run: TempDir,
}

/// A VM created by the CPI.
pub struct Vm {
    pub cid: VmCid,
    pub paths: VmPaths,
}

impl Lab {
    pub fn new() -> Self {
        let state =
            tempfile::Builder::new().prefix("floors-").tempdir().expect("a temporary directory");
        // In memory, as /run is. Socket paths have at most 107 bytes.
        let run = tempfile::Builder::new()
            .prefix("floors-")
            .tempdir_in("/dev/shm")
            .expect("a directory in /dev/shm");
        let (state_dir, config) = (state.path().join("state"), state.path().join("cpi.json"));
        let settings =
            json!({"state_dir": state_dir, "run_dir": run.path(), "qemu": {"accel": "tcg"}});
        std::fs::write(&config, settings.to_string()).expect("write the configuration");
        let program = std::env::var_os("FLOORS_CPI")
            .map_or(env!("CARGO_BIN_EXE_bosh-qemu-cpi").into(), PathBuf::from);
        let store = Store::new(&state_dir, run.path());
        let memory = RefCell::default();
        let (stemcell, vms) = (String::new(), Cell::default());
        let mut lab = Self { program, config, store, stemcell, memory, vms, state, _run: run };
        let image = lab.scratch("guest.img");
        let mut disk = vec![0; 1 << 20];
        disk[..GUEST.len()].copy_from_slice(GUEST);
        std::fs::write(&image, disk).expect("write the guest");
        lab.stemcell = text(&lab.call("create_stemcell", &json!([image, {}])).1);
        lab
    }

    /// A path for a temporary file.
    pub fn scratch(&self, name: &str) -> String {
        self.state.path().join(name).to_str().expect("UTF-8").to_owned()
    }

    /// Runs one CPI call. Returns the time from before its process is started until it has exited,
    /// and the result.
    pub fn call(&self, method: &str, arguments: &Value) -> (Duration, Value) {
        let request =
            json!({"method": method, "arguments": arguments, "context": {}, "api_version": 2})
                .to_string();
        let (time, output) = timed(|| {
            let mut command = Command::new(&self.program);
            command.arg("--config").arg(&self.config).stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut child = command.stderr(Stdio::piped()).spawn().expect("start the CPI");
            child
                .stdin
                .take()
                .expect("piped")
                .write_all(request.as_bytes())
                .expect("send the request");
            child.wait_with_output().expect("read the answer")
        });
        let answer: Value = serde_json::from_slice(&output.stdout).expect("an answer");
        let log = String::from_utf8_lossy(&output.stderr);
        assert_eq!(answer["error"], Value::Null, "{method}: {log}");
        (time, answer["result"].clone())
    }

    /// Creates a VM with a NIC on a managed bridge and an ephemeral disk.
    pub fn create_vm(&self) -> (Duration, Vm) {
        let number = self.vms.replace(self.vms.get() + 1);
        let address = format!("10.255.{}.{}", 1 + number / 250, 1 + number % 250);
        let networks = json!({"net": {
            "type": "manual", "ip": address, "netmask": "255.255.0.0", "gateway": "10.255.0.1",
            "default": ["dns", "gateway"], "dns": ["10.255.0.1"],
        }});
        let properties = json!({"cpu": 1, "ram": 256, "ephemeral_disk": 1024});
        let env = json!({"bosh": {"mbus": "nats://x"}});
        let arguments = json!(["agent", self.stemcell, properties, networks, [], env]);
        let (time, answer) = self.call("create_vm", &arguments);
        let cid = cid(&answer[0]);
        (time, Vm { paths: self.store.vm(&cid), cid })
    }

    /// Writes `count` copies of the record of `vm` under other cids, as if so many VMs existed.
    pub fn add_vm_records(&self, vm: &Vm, count: u32) {
        let record = self.store.read::<VmRecord>(&vm.cid).expect("readable").expect("there");
        for _ in 0..count {
            let cid = VmCid::random();
            self.store.write(&VmRecord { cid, ..record.clone() }).expect("write a record");
        }
    }

    /// Samples the memory of the supervisor of `vm`.
    pub fn sample_supervisor_memory(&self, vm: &Vm) {
        let process =
            pidlock::holder(&vm.paths.supervisor_pid()).expect("readable").expect("a supervisor");
        let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", process.pid()))
            .expect("/proc");
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            line.trim().trim_end_matches(" kB").parse().unwrap_or(0)
        };
        self.memory.borrow_mut().push(["Rss:", "Pss:", "Anonymous:"].map(field));
    }

    /// The greatest memory of all sampled supervisors.
    pub fn supervisor_memory(&self) -> String {
        let memory = self.memory.borrow();
        let most = |at: usize| memory.iter().map(|sample| sample[at]).max().unwrap_or(0);
        let (rss, pss, own) = (most(0), most(1), most(2));
        format!(
            "a supervisor of two: RSS {rss} kB (target 5120), PSS {pss} kB (target 1024), \
             anonymous {own} kB"
        )
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // VMs remain only if the benchmark failed.
        for cid in self.store.list::<VmRecord>().unwrap_or_default() {
            let _ = supervisor::stop(
                &self.store.vm(&cid),
                StopMode::Kill,
                Instant::now() + GUEST_TIMEOUT,
            );
        }
    }
}

impl Vm {
    fn monitor(&self) -> Monitor {
        Monitor::connect(&self.paths.qmp(), Instant::now() + GUEST_TIMEOUT)
            .expect("the VM's monitor")
    }

    /// Stops the guest's vCPUs.
    pub fn pause(&self) {
        self.monitor().raw("stop", &serde_json::json!({})).expect("stop");
    }

    /// Continues the guest's vCPUs.
    pub fn resume(&self) {
        self.monitor().raw("cont", &serde_json::json!({})).expect("cont");
    }

    /// Waits until the guest has printed `word` so many times.
    pub fn wait_for(&self, word: &str, times: usize) {
        tail::wait_for(&self.paths.console_log(), word, times, Instant::now() + GUEST_TIMEOUT)
            .expect("the guest's word");
    }
}

/// Runs a program, which must succeed.
pub fn run(program: impl AsRef<Path>, arguments: &[&str]) {
    let status = Command::new(program.as_ref()).args(arguments).status().expect("start a program");
    assert!(status.success(), "{} {arguments:?}: {status}", program.as_ref().display());
}

fn text(value: &Value) -> String {
    value.as_str().expect("a string").to_owned()
}
