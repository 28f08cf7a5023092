//! Host of one test: directories, configuration and a network namespace, in which the built program
//! runs VMs.
//!
//! Dropping a [`Host`] deletes its VMs, disks, snapshots and stemcells through the CPI. Then it
//! fails the test if it finds leaks: processes, links, tables, control groups, uids, locks,
//! sockets, files.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
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

use super::answer::{Answer, run, spawn};
use super::netns::Namespace;
use super::tmpfs::Tmpfs;
use super::{nftables, skip};

/// Longest time that a test waits for one thing: emulated guests share two cores with other tests.
/// `BOSH_QEMU_CPI_TEST_TIMEOUT`, in seconds, replaces the default on a host that is itself
/// emulated.
pub fn timeout() -> Duration {
    let seconds = std::env::var("BOSH_QEMU_CPI_TEST_TIMEOUT")
        .map(|text| text.parse().expect("a number of seconds"));
    Duration::from_secs(seconds.unwrap_or(60))
}

/// Guest that handles hot-plug and powers off when its power button is pressed.
pub const GUEST: &[u8] = include_bytes!("../../../guests/acpi-bootsector.bin");
pub const WRITING_GUEST: &[u8] = include_bytes!("../../../guests/writer-bootsector.bin");
/// Guest that boots and then ignores hot-plug and its power button.
pub const MUTE_GUEST: &[u8] = include_bytes!("../../../guests/acpi-bootsector-mute.bin");

/// Guest that panics as soon as it boots.
pub const PANICKING_GUEST: &[u8] = include_bytes!("../../../guests/panic-bootsector.bin");

/// The host of one test.
pub struct Host {
    pub(super) namespace: Namespace,
    /// Declared before `dir`, so that it is unmounted before that directory is removed.
    tmpfs: Option<Tmpfs>,
    pub(super) dir: TempDir,
    pub(super) run: TempDir,
    /// Every VM that an answer has named. Control groups are named after them.
    pub(super) vms: Mutex<BTreeSet<String>>,
    last_address: AtomicU8,
}

impl Host {
    /// A host whose VMs are emulated. Prints why and returns `None` if this machine cannot run it.
    pub fn new() -> Option<Self> {
        Self::with(json!({}))
    }

    /// The same with more configuration. VMs have two hot-plug slots by default, because the
    /// firmware numbers each slot at boot.
    pub fn with(mut config: Value) -> Option<Self> {
        if !Path::new("/usr/bin/qemu-system-x86_64").exists() {
            skip("no /usr/bin/qemu-system-x86_64");
            return None;
        }
        let named = |prefix| tempfile::Builder::new().prefix(prefix).rand_bytes(6).to_owned();
        let host = Self {
            namespace: Namespace::new()?,
            tmpfs: None,
            dir: named("bosh-qemu-cpi-test-").tempdir().unwrap(),
            run: named("bqt-").tempdir_in("/run").unwrap(),
            vms: Mutex::default(),
            last_address: AtomicU8::new(1),
        };
        // QEMU runs as an unprivileged user and must reach a replacement of its binary in this
        // directory. Secret files have modes of their own.
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

    /// A host whose state directory is a tmpfs of `mib` MiB.
    pub fn on_tmpfs(mib: u32) -> Option<Self> {
        let mut host = Self::new()?;
        let state = host.path("state");
        fs::create_dir(&state).unwrap();
        host.tmpfs = Some(Tmpfs::mount(state, mib));
        Some(host)
    }

    /// The state directory's filesystem on a host from [`Self::on_tmpfs`].
    pub fn tmpfs(&self) -> &Tmpfs {
        self.tmpfs.as_ref().expect("a small filesystem")
    }

    /// Changes the configuration file, for later calls.
    pub fn reconfigure(&self, change: impl FnOnce(&mut Value)) {
        let mut config: Value =
            serde_json::from_slice(&fs::read(self.path("cpi.json")).unwrap()).unwrap();
        change(&mut config);
        fs::write(self.path("cpi.json"), config.to_string()).unwrap();
    }

    /// Makes later launches run the shell script `script` instead of QEMU.
    pub fn replace_qemu(&self, script: &str) {
        // Landlock lets the binary read its own prefix: `<prefix>` of `<prefix>/bin/qemu`.
        let binary = self.path("opt/bin/qemu");
        fs::create_dir_all(binary.parent().unwrap()).unwrap();
        fs::write(&binary, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&binary, fs::Permissions::from_mode(0o755)).unwrap();
        self.reconfigure(|config| config["qemu"]["binary"] = json!(binary));
    }

    /// The path `name` in the directory of the test.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The network namespace of the host.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Makes a bridge as an operator would.
    pub fn bridge(&self, name: &str) {
        self.namespace.ip(&format!("link add {name} type bridge"));
        self.namespace.ip(&format!("link set {name} up"));
    }

    /// The program with this host's configuration. As under the Director, its environment is `PATH`
    /// alone.
    pub fn cpi(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bosh-qemu-cpi"));
        command.arg("--config").arg(self.path("cpi.json"));
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command
    }

    /// The command line that serves remote callers.
    pub fn serve_command(&self) -> String {
        format!(
            "{} --config {} host serve",
            env!("CARGO_BIN_EXE_bosh-qemu-cpi"),
            self.path("cpi.json").display()
        )
    }

    /// Answer of the CPI to a call of `method`, requested as the Director does.
    pub fn call(&self, method: &str, arguments: &Value) -> Answer {
        self.ask(&request(method, arguments))
    }

    /// Answer of the CPI to a whole request.
    pub fn ask(&self, request: &str) -> Answer {
        let output = self.namespace.run(|| run(self.cpi(), request.as_bytes()));
        self.track_vms(&String::from_utf8_lossy(&output.stdout));
        Answer::of(&output)
    }

    /// The same for a CPI that `words`, a program with its arguments, starts.
    pub fn call_by(&self, words: &[&str], method: &str, arguments: &Value) -> Answer {
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).arg(env!("CARGO_BIN_EXE_bosh-qemu-cpi"));
        command.arg("--config").arg(self.path("cpi.json"));
        let request = request(method, arguments);
        let output = self.namespace.run(|| run(command, request.as_bytes()));
        self.track_vms(&String::from_utf8_lossy(&output.stdout));
        Answer::of(&output)
    }

    /// Runs an operator's command. Returns whether it succeeded and the JSON that it printed.
    pub fn command(&self, words: &[&str]) -> (bool, Value) {
        let output = self.namespace.run(|| self.cpi().args(words).output().unwrap());
        let printed = serde_json::from_slice(&output.stdout);
        (
            output.status.success(),
            printed.unwrap_or_else(|error| panic!("{words:?}: {error}: {output:?}")),
        )
    }

    /// Cuts the power and restores it: processes, links, tables and the run directory are lost.
    pub fn lose_power(&self) {
        for vm in self.store().list::<VmRecord>().unwrap() {
            // The supervisor dies first, so that it cannot react to the end of its QEMU.
            for process in [self.supervisor(&vm), self.qemu(&vm)].into_iter().flatten() {
                process.signal(Signal::SIGKILL).unwrap();
                wait_for_exit(&process);
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

    /// Empties the run directory, as a reboot of the host does.
    pub fn clear_run_dir(&self) {
        for entry in fs::read_dir(self.run.path()).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                fs::remove_dir_all(path).unwrap();
            } else {
                fs::remove_file(path).unwrap();
            }
        }
    }

    /// Result of a call that must succeed.
    pub fn ok(&self, method: &str, arguments: &Value) -> Value {
        let answer = self.call(method, arguments);
        answer.outcome.unwrap_or_else(|failure| {
            panic!("{method} {arguments}: {failure:?}; log: {}", answer.stderr)
        })
    }

    /// Starts a call, writes its request and returns while it runs.
    pub fn start(&self, method: &str, arguments: &Value) -> Child {
        let request = request(method, arguments);
        self.namespace.run(|| {
            let mut child = spawn(self.cpi());
            child.stdin.take().unwrap().write_all(request.as_bytes()).unwrap();
            child
        })
    }

    /// Imports a stemcell whose disk boots `guest`. Returns its cid.
    pub fn import(&self, guest: &[u8]) -> String {
        let mut disk = vec![0; 1 << 20];
        disk[..guest.len()].copy_from_slice(guest);
        let image = self.path("image");
        fs::write(&image, disk).unwrap();
        text(&self.ok("create_stemcell", &json!([image, {}])))
    }

    /// Imports a stemcell that boots [`GUEST`].
    pub fn stemcell(&self) -> String {
        self.import(GUEST)
    }

    /// Arguments of create_vm for a VM with 64 MiB and an address of its own.
    pub fn vm_arguments(&self, stemcell: &str) -> Value {
        let address = format!("10.9.0.{}", self.last_address.fetch_add(1, Ordering::Relaxed) + 1);
        json!(["agent-1", stemcell, {"ram": 64}, {"net": {
            "type": "manual", "ip": address, "netmask": "255.255.255.0", "gateway": "10.9.0.1",
            "cloud_properties": {},
        }}, [], {}])
    }

    /// Creates a VM. Its guest may still be booting.
    pub fn vm(&self, stemcell: &str) -> VmCid {
        vm_cid(&self.ok("create_vm", &self.vm_arguments(stemcell)))
    }

    /// Creates a VM and waits until its guest has booted.
    pub fn booted_vm(&self) -> VmCid {
        let vm = self.vm(&self.stemcell());
        self.wait_for_console(&vm, "BOOTSECTOR-OK", 1);
        vm
    }

    /// Creates a persistent disk of 8 MiB.
    pub fn disk(&self) -> DiskCid {
        text(&self.ok("create_disk", &json!([8, {}, null]))).parse().unwrap()
    }

    /// The store of this host's state directory.
    pub fn store(&self) -> Store {
        Store::from_config(&Config::load(Some(&self.path("cpi.json"))).unwrap())
    }

    /// The paths of a VM's files.
    pub fn paths(&self, vm: &VmCid) -> VmPaths {
        self.store().vm(vm)
    }

    /// The record of a VM.
    pub fn record(&self, vm: &VmCid) -> VmRecord {
        self.store().read::<VmRecord>(vm).unwrap().expect("a record")
    }

    /// The QEMU process of a VM; `None` if the VM is off.
    pub fn qemu(&self, vm: &VmCid) -> Option<Process> {
        match power_state(&self.paths(vm)).unwrap() {
            PowerState::On(process) => Some(process),
            PowerState::Off => None,
        }
    }

    /// The supervisor process of a VM; `None` if there is none.
    pub fn supervisor(&self, vm: &VmCid) -> Option<Process> {
        pidlock::holder(&self.paths(vm).supervisor_pid()).unwrap()
    }

    /// Runs a QMP command and returns its result or error. It uses a client of its own, which
    /// checks the CPI's client independently.
    pub fn qmp(&self, vm: &VmCid, command: &str, arguments: &Value) -> Result<Value, Value> {
        let mut socket =
            UnixStream::connect(self.paths(vm).qmp()).map_err(|error| json!(error.to_string()))?;
        socket.set_read_timeout(Some(timeout())).unwrap();
        let ask = json!({"execute": command, "arguments": arguments, "id": "asked"});
        write!(socket, r#"{{"execute":"qmp_capabilities"}}{ask}"#)
            .map_err(|error| json!(error.to_string()))?;
        let lines = BufReader::new(socket).lines();
        let mut messages =
            lines.map_while(Result::ok).map(|line| serde_json::from_str::<Value>(&line).unwrap());
        let answer = messages.find(|message| message["id"] == "asked");
        let mut answer = answer.ok_or_else(|| json!("QEMU has closed the monitor"))?;
        if answer["error"].is_null() {
            Ok(answer["return"].take())
        } else {
            Err(answer["error"].take())
        }
    }

    /// Waits until the console log contains `word` at least `times` times.
    pub fn wait_for_console(&self, vm: &VmCid, word: &str, times: usize) {
        tail::wait_for(&self.paths(vm).console_log(), word, times, Instant::now() + timeout())
            .unwrap();
    }

    /// The same with another timeout.
    pub fn wait_for_console_within(&self, vm: &VmCid, word: &str, times: usize, timeout: Duration) {
        tail::wait_for(&self.paths(vm).console_log(), word, times, Instant::now() + timeout)
            .unwrap();
    }

    /// Waits until `events.jsonl` contains `event` at least `times` times.
    pub fn wait_for_event(&self, vm: &VmCid, event: &str, times: usize) {
        let word = format!("\"event\":\"{event}\"");
        tail::wait_for(&self.paths(vm).events(), &word, times, Instant::now() + timeout()).unwrap();
    }

    /// Presses the guest's power button and waits until QEMU and the supervisor have exited.
    pub fn power_off(&self, vm: &VmCid) {
        let supervisor = self.supervisor(vm).expect("a supervisor");
        self.qmp(vm, "system_powerdown", &json!({})).unwrap();
        wait_for_exit(&supervisor);
        assert!(self.qemu(vm).is_none());
    }

    /// Kills the QEMU of a VM with SIGKILL.
    pub fn kill_qemu(&self, vm: &VmCid) {
        let qemu = self.qemu(vm).expect("QEMU");
        qemu.signal(Signal::SIGKILL).unwrap();
        wait_for_exit(&qemu);
    }

    /// Deletes every VM, disk, snapshot and stemcell through the CPI.
    pub fn delete_everything(&self) {
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

    /// Fails the test if the host has leaks.
    pub fn assert_no_leaks(&self) {
        let left = self.leaks_after_exits();
        assert!(left.is_empty(), "left behind: {left:#?}");
    }

    /// Adds the VMs that `answer` names to those whose control groups are checked for leaks.
    pub fn track_vms(&self, answer: &str) {
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
        self.delete_everything();
        let left = self.leaks_after_exits();
        if !left.is_empty() {
            self.tear_down();
            panic!("left behind: {left:#?}");
        }
    }
}

/// A request in the form that the Director sends.
pub fn request(method: &str, arguments: &Value) -> String {
    let context = json!({"director_uuid": "deadbeef", "request_id": "cpi-123456"});
    json!({"method": method, "arguments": arguments, "context": context, "api_version": 2})
        .to_string()
}

/// The string in `value`.
pub fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is no string")).to_owned()
}

/// The cid in the result of create_vm.
pub fn vm_cid(result: &Value) -> VmCid {
    text(&result[0]).parse().unwrap()
}

/// Waits until a process has exited.
pub fn wait_for_exit(process: &Process) {
    assert!(
        process.wait_exit(Instant::now() + timeout()).unwrap(),
        "process {} has not exited",
        process.pid()
    );
}

/// Polls `look` until it returns something. `what` names the awaited state in the failure.
pub fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + timeout();
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(Instant::now() < deadline, "{what}: not within {:?}", timeout());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The arguments of a process's command line.
pub fn command_line(process: &Process) -> Vec<String> {
    let words = fs::read(format!("/proc/{}/cmdline", process.pid())).unwrap();
    let words = words.strip_suffix(b"\0").unwrap_or(&words);
    words.split(|byte| *byte == 0).map(|word| String::from_utf8(word.to_vec()).unwrap()).collect()
}

/// The JSON values of a QEMU option, in the order of the command line.
pub fn json_options(words: &[String], option: &str) -> Vec<Value> {
    let values = words.windows(2).filter(|pair| pair[0] == option).map(|pair| &pair[1]);
    values.filter_map(|value| serde_json::from_str(value).ok()).collect()
}
