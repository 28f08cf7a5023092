//! A host of a test's own: directories, configuration and a network namespace in which the built binary runs VMs.
//!
//! Dropping it removes through the CPI whatever VMs, disks and stemcells are there, and then looks for what is left:
//! processes, links, tables, control groups, uids, locks, sockets, files. Anything left fails the test.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use bosh_qemu_cpi::cid::{DiskCid, VmCid};
use bosh_qemu_cpi::config::Config;
use bosh_qemu_cpi::host::tail;
use bosh_qemu_cpi::store::record::StemcellRecord;
use bosh_qemu_cpi::store::{DiskRecord, SnapshotRecord, Store, VmPaths, VmRecord};
use bosh_qemu_cpi::supervisor::{PowerState, power_state};
use bosh_qemu_cpi::sys::{pidfd::Process, pidlock};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::answer::{Answer, run};
use super::netns::Namespace;
use super::small::Small;
use super::{nftables, skip};

/// How long anything may take before a test calls it stuck. Emulated guests share two cores with other tests. A host that is
/// emulated itself says in the environment how many seconds it wants.
pub fn patience() -> Duration {
    let seconds = std::env::var("BOSH_QEMU_CPI_TEST_PATIENCE")
        .map(|text| text.parse().expect("a number of seconds"));
    Duration::from_secs(seconds.unwrap_or(60))
}

/// Takes part in hot-plug and follows its power button.
pub const GUEST: &[u8] = include_bytes!("../../../guests/acpi-bootsector.bin");
/// Fills its root disk.
pub const WRITING_GUEST: &[u8] = include_bytes!("../../../guests/writer-bootsector.bin");
/// Boots, and then never answers anything.
pub const MUTE_GUEST: &[u8] = include_bytes!("../../../guests/acpi-bootsector-mute.bin");

/// Its kernel panics as soon as it boots.
pub const PANICKING_GUEST: &[u8] = include_bytes!("../../../guests/panic-bootsector.bin");

/// A host of a test's own.
pub struct Host {
    pub(super) namespace: Namespace,
    /// Unmounted before the directory it is in is removed.
    small: Option<Small>,
    pub(super) dir: TempDir,
    pub(super) run: TempDir,
    /// Every VM that was ever heard of: control groups are named after them.
    pub(super) vms: Mutex<BTreeSet<String>>,
    last_address: AtomicU8,
}

impl Host {
    /// One whose VMs are emulated; `None`, with the reason told, where that can not be had.
    pub fn new() -> Option<Self> {
        Self::with(json!({}))
    }

    /// The same with more configuration. Few hot-plug ports by default: the firmware numbers each at boot.
    pub fn with(mut config: Value) -> Option<Self> {
        if !Path::new("/usr/bin/qemu-system-x86_64").exists() {
            skip("no /usr/bin/qemu-system-x86_64");
            return None;
        }
        let named = |prefix| tempfile::Builder::new().prefix(prefix).rand_bytes(6).to_owned();
        let host = Self {
            namespace: Namespace::new()?,
            small: None,
            dir: named("bosh-qemu-cpi-test-").tempdir().unwrap(),
            run: named("bqt-").tempdir_in("/run").unwrap(),
            vms: Mutex::default(),
            last_address: AtomicU8::new(1),
        };
        // QEMU, being nobody, must find a stand-in for its binary in here. What is secret has its own modes.
        fs::set_permissions(host.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        config["state_dir"] = json!(host.path("state"));
        config["run_dir"] = json!(host.run.path());
        let qemu = config.as_object_mut().unwrap().entry("qemu").or_insert(json!({}));
        for (key, value) in [("accel", json!("tcg")), ("hotplug_slots", json!(2))] {
            qemu.as_object_mut().unwrap().entry(key).or_insert(value);
        }
        fs::write(host.path("cpi.json"), config.to_string()).unwrap();
        Some(host)
    }

    /// One whose state directory is a filesystem of so many MiB.
    pub fn on_small_filesystem(mib: u32) -> Option<Self> {
        let mut host = Self::new()?;
        let state = host.path("state");
        fs::create_dir(&state).unwrap();
        host.small = Some(Small::mount(state, mib));
        Some(host)
    }

    /// The filesystem of [`Self::on_small_filesystem`].
    pub fn small(&self) -> &Small {
        self.small.as_ref().expect("a small filesystem")
    }

    /// Changes the configuration for later calls.
    pub fn reconfigure(&self, change: impl FnOnce(&mut Value)) {
        let mut config: Value =
            serde_json::from_slice(&fs::read(self.path("cpi.json")).unwrap()).unwrap();
        change(&mut config);
        fs::write(self.path("cpi.json"), config.to_string()).unwrap();
    }

    /// Has `script`, for /bin/sh, run in place of QEMU.
    pub fn replace_qemu(&self, script: &str) {
        // Landlock lets QEMU read what is beside it: `<prefix>/bin/qemu` means `<prefix>`.
        let binary = self.path("opt/bin/qemu");
        fs::create_dir_all(binary.parent().unwrap()).unwrap();
        fs::write(&binary, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&binary, fs::Permissions::from_mode(0o755)).unwrap();
        self.reconfigure(|config| config["qemu"]["binary"] = json!(binary));
    }

    /// Something in the test's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Its network.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// An operator's bridge.
    pub fn bridge(&self, name: &str) {
        self.namespace.ip(&format!("link add {name} type bridge"));
        self.namespace.ip(&format!("link set {name} up"));
    }

    /// The program, started as the Director does: a path and nothing else in its environment.
    pub fn cpi(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bosh-qemu-cpi"));
        command.arg("--config").arg(self.path("cpi.json"));
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command
    }

    /// The command that answers callers elsewhere.
    pub fn door(&self) -> String {
        format!(
            "{} --config {} host serve",
            env!("CARGO_BIN_EXE_bosh-qemu-cpi"),
            self.path("cpi.json").display()
        )
    }

    /// What the CPI answers to `method`, asked as the Director does.
    pub fn call(&self, method: &str, arguments: &Value) -> Answer {
        self.ask(&request(method, arguments))
    }

    /// What the CPI answers to a whole request.
    pub fn ask(&self, request: &str) -> Answer {
        let output = self.namespace.run(|| run(self.cpi(), request.as_bytes()));
        self.note(&String::from_utf8_lossy(&output.stdout));
        Answer::of(&output)
    }

    /// What an operator's command with `--json` prints, and whether it ended well.
    pub fn command(&self, words: &[&str]) -> (bool, Value) {
        let output = self.namespace.run(|| self.cpi().args(words).output().unwrap());
        let printed = serde_json::from_slice(&output.stdout);
        (
            output.status.success(),
            printed.unwrap_or_else(|error| panic!("{words:?}: {error}: {output:?}")),
        )
    }

    /// Power is cut and comes back: what lived in memory is gone.
    pub fn lose_power(&self) {
        for vm in self.store().list::<VmRecord>().unwrap() {
            // The supervisor first, so that it can do nothing about the loss of its QEMU.
            for process in [self.supervisor(&vm), self.qemu(&vm)].into_iter().flatten() {
                process.signal(Signal::SIGKILL).unwrap();
                gone(&process);
            }
        }
        self.tear_down();
        self.clear_run_dir();
        let links = self.namespace.ip_json("link show");
        for link in links.as_array().unwrap().iter().filter(|link| link["ifname"] != "lo") {
            self.namespace.ip(&format!("link delete {}", link["ifname"].as_str().unwrap()));
        }
        self.namespace.run(nftables::flush);
    }

    /// Empties the run directory, as a reboot does.
    pub fn clear_run_dir(&self) {
        for entry in fs::read_dir(self.run.path()).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                fs::remove_dir_all(path).unwrap()
            } else {
                fs::remove_file(path).unwrap()
            }
        }
    }

    /// The result of a call that must succeed.
    pub fn ok(&self, method: &str, arguments: &Value) -> Value {
        let answer = self.call(method, arguments);
        answer.outcome.unwrap_or_else(|failure| {
            panic!("{method} {arguments}: {failure:?}; log: {}", answer.stderr)
        })
    }

    /// Starts a call and leaves it running, its request read.
    pub fn start(&self, method: &str, arguments: &Value) -> Child {
        let request = request(method, arguments);
        self.namespace.run(|| {
            let mut command = self.cpi();
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let mut child = command.spawn().unwrap();
            child.stdin.take().unwrap().write_all(request.as_bytes()).unwrap();
            child
        })
    }

    /// Imports `guest`.
    pub fn import(&self, guest: &[u8]) -> String {
        let mut disk = vec![0; 1 << 20];
        disk[..guest.len()].copy_from_slice(guest);
        let image = self.path("image");
        fs::write(&image, disk).unwrap();
        text(&self.ok("create_stemcell", &json!([image, {}])))
    }

    /// Imports the usual guest.
    pub fn stemcell(&self) -> String {
        self.import(GUEST)
    }

    /// Arguments for a small VM.
    pub fn vm_arguments(&self, stemcell: &str) -> Value {
        let address = format!("10.9.0.{}", self.last_address.fetch_add(1, Ordering::Relaxed) + 1);
        json!(["agent-1", stemcell, {"ram": 64}, {"net": {
            "type": "manual", "ip": address, "netmask": "255.255.255.0", "gateway": "10.9.0.1",
            "cloud_properties": {},
        }}, [], {}])
    }

    /// A VM whose guest runs, though it may still boot.
    pub fn vm(&self, stemcell: &str) -> VmCid {
        vm_cid(&self.ok("create_vm", &self.vm_arguments(stemcell)))
    }

    /// A VM whose guest is up.
    pub fn booted_vm(&self) -> VmCid {
        let vm = self.vm(&self.stemcell());
        self.sees(&vm, "BOOTSECTOR-OK", 1);
        vm
    }

    /// A persistent disk of 8 MiB.
    pub fn disk(&self) -> DiskCid {
        text(&self.ok("create_disk", &json!([8, {}, null]))).parse().unwrap()
    }

    /// Its records and paths.
    pub fn store(&self) -> Store {
        Store::from_config(&Config::load(Some(&self.path("cpi.json"))).unwrap())
    }

    /// A VM's files.
    pub fn paths(&self, vm: &VmCid) -> VmPaths {
        self.store().vm(vm)
    }

    /// A VM's record.
    pub fn record(&self, vm: &VmCid) -> VmRecord {
        self.store().read::<VmRecord>(vm).unwrap().expect("a record")
    }

    /// A VM's QEMU, if it runs.
    pub fn qemu(&self, vm: &VmCid) -> Option<Process> {
        match power_state(&self.paths(vm)).unwrap() {
            PowerState::On(process) => Some(process),
            PowerState::Off => None,
        }
    }

    /// A VM's supervisor, if it runs.
    pub fn supervisor(&self, vm: &VmCid) -> Option<Process> {
        pidlock::holder(&self.paths(vm).supervisor_pid()).unwrap()
    }

    /// What a VM's QEMU returns for a command, or its error. A client of our own, so that the CPI's has a witness.
    pub fn qmp(&self, vm: &VmCid, command: &str, arguments: &Value) -> Result<Value, Value> {
        let mut socket =
            UnixStream::connect(self.paths(vm).qmp()).map_err(|error| json!(error.to_string()))?;
        socket.set_read_timeout(Some(patience())).unwrap();
        let ask = json!({"execute": command, "arguments": arguments, "id": "asked"});
        write!(socket, r#"{{"execute":"qmp_capabilities"}}{ask}"#)
            .map_err(|error| json!(error.to_string()))?;
        let lines = BufReader::new(socket).lines();
        let mut messages =
            lines.map_while(Result::ok).map(|line| serde_json::from_str::<Value>(&line).unwrap());
        let answer = messages.find(|message| message["id"] == "asked");
        let mut answer = answer.ok_or_else(|| json!("QEMU is gone"))?;
        if answer["error"].is_null() {
            Ok(answer["return"].take())
        } else {
            Err(answer["error"].take())
        }
    }

    /// Waits until the guest has printed `word` so many times.
    pub fn sees(&self, vm: &VmCid, word: &str, times: usize) {
        tail::wait_for(&self.paths(vm).console_log(), word, times, Instant::now() + patience())
            .unwrap();
    }

    /// The same for a guest that takes longer.
    pub fn sees_within(&self, vm: &VmCid, word: &str, times: usize, patience: Duration) {
        tail::wait_for(&self.paths(vm).console_log(), word, times, Instant::now() + patience)
            .unwrap();
    }

    /// Waits until the supervisor has written down `event` so many times.
    pub fn event(&self, vm: &VmCid, event: &str, times: usize) {
        let word = format!("\"event\":\"{event}\"");
        tail::wait_for(&self.paths(vm).events(), &word, times, Instant::now() + patience())
            .unwrap();
    }

    /// Has the guest power itself off; waits until its supervisor has ended, too.
    pub fn power_off(&self, vm: &VmCid) {
        let supervisor = self.supervisor(vm).expect("a supervisor");
        self.qmp(vm, "system_powerdown", &json!({})).unwrap();
        gone(&supervisor);
        assert!(self.qemu(vm).is_none());
    }

    /// Kills the VM's QEMU.
    pub fn crash(&self, vm: &VmCid) {
        let qemu = self.qemu(vm).expect("QEMU");
        qemu.signal(Signal::SIGKILL).unwrap();
        gone(&qemu);
    }

    /// Removes, through the CPI, every VM, disk and stemcell there is.
    pub fn clear(&self) {
        let store = self.store();
        for vm in store.list::<VmRecord>().unwrap() {
            self.vms.lock().unwrap().insert(vm.to_string());
            self.ok("delete_vm", &json!([vm]));
        }
        for disk in store.list::<DiskRecord>().unwrap() {
            self.ok("delete_disk", &json!([disk]));
        }
        for snapshot in store.list::<SnapshotRecord>().unwrap() {
            self.ok("delete_snapshot", &json!([snapshot]));
        }
        for stemcell in store.list::<StemcellRecord>().unwrap() {
            self.ok("delete_stemcell", &json!([stemcell]));
        }
    }

    /// Fails the test if anything is left.
    pub fn assert_nothing_left(&self) {
        let left = self.left_at_last();
        assert!(left.is_empty(), "left behind: {left:#?}");
    }

    /// Learns the VMs an answer names.
    pub fn note(&self, answer: &str) {
        let mut vms = self.vms.lock().unwrap();
        for (at, _) in answer.match_indices("vm-") {
            let cid: String = answer[at..].chars().take("vm-".len() + 15).collect();
            vms.extend(
                cid.chars().all(|c| matches!(c, 'a'..='z' | '2'..='7' | '-')).then_some(cid),
            );
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for vm in self.store().list::<VmRecord>().unwrap_or_default() {
                self.vms.lock().unwrap().insert(vm.to_string());
            }
            return self.tear_down();
        }
        self.clear();
        let left = self.left_at_last();
        if !left.is_empty() {
            self.tear_down();
            panic!("left behind: {left:#?}");
        }
    }
}

/// A request as the Director writes it.
pub fn request(method: &str, arguments: &Value) -> String {
    let context = json!({"director_uuid": "deadbeef", "request_id": "cpi-123456"});
    json!({"method": method, "arguments": arguments, "context": context, "api_version": 2})
        .to_string()
}

/// A string.
pub fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is no string")).to_owned()
}

/// The cid in create_vm's result.
pub fn vm_cid(result: &Value) -> VmCid {
    text(&result[0]).parse().unwrap()
}

/// Waits for the end of a process.
pub fn gone(process: &Process) {
    assert!(
        process.wait_exit(Instant::now() + patience()).unwrap(),
        "process {} does not end",
        process.pid()
    );
}

/// Looks again and again until there is something to see.
pub fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + patience();
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(Instant::now() < deadline, "{what}: not in {:?}", patience());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The words of a process's command line.
pub fn command_line(process: &Process) -> Vec<String> {
    let words = fs::read(format!("/proc/{}/cmdline", process.pid())).unwrap();
    let words = words.strip_suffix(b"\0").unwrap_or(&words);
    words.split(|byte| *byte == 0).map(|word| String::from_utf8(word.to_vec()).unwrap()).collect()
}

/// The JSON values of an option of QEMU, in order.
pub fn json_options(words: &[String], option: &str) -> Vec<Value> {
    let values = words.windows(2).filter(|pair| pair[0] == option).map(|pair| &pair[1]);
    values.filter_map(|value| serde_json::from_str(value).ok()).collect()
}
