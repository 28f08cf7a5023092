//! Cost of a host on another machine: calls through ssh, compared with ssh alone.
//!
//! Both use one shared connection to an sshd in a network namespace without a wire, so only the
//! programs' own time is measured. A stemcell's image is sent and imported; it is compared with
//! `scp`, which only sends, and with `scp` followed by create_stemcell on the host. Needs root and
//! `/usr/sbin/sshd`.
//!
//! `cargo bench --bench remote -- 30` runs 30 rounds instead of 10. `FLOORS_CPI=<binary>` measures
//! another build.
#![allow(clippy::print_stdout)]

#[path = "../floors/table.rs"]
mod table;

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};
use table::{Table, Target};
use tempfile::TempDir;

/// Calls at the same time.
const CALLERS: usize = 32;
/// Size of the image, in bytes; half of it is data.
const IMAGE: usize = 256 << 20;

fn main() {
    let rounds = std::env::args().find_map(|word| word.parse().ok()).unwrap_or(10);
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace of its own: run it as root");
    let lab = Lab::new();
    let mut table = Table::default();
    for _ in 0..rounds {
        lab.one_call(&mut table);
    }
    for _ in 0..rounds.min(5) {
        lab.many_calls(&mut table);
        lab.stemcell(&mut table);
    }
    println!("\nmedians of at most {rounds} rounds, milliseconds\n\n{table}");
}

struct Lab {
    dir: TempDir,
    sshd: Child,
}

impl Lab {
    fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("bqb-").tempdir_in("/run").expect("a directory");
        run("ip", &["link", "set", "lo", "up"]);
        fs::create_dir_all("/run/sshd").expect("/run/sshd");
        let path = |name: &str| dir.path().join(name).display().to_string();
        for key in ["host", "caller", "operator"] {
            run("ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-f", &path(key)]);
        }
        let read = |name: &str| fs::read_to_string(path(name)).expect("a file of the bench");
        let serve = format!("{} --config {} host serve", program().display(), path("host.json"));
        let keys =
            format!("restrict,command=\"{serve}\" {}{}", read("caller.pub"), read("operator.pub"));
        fs::write(path("authorized"), keys).expect("authorized keys");
        let config = format!(
            "ListenAddress 127.0.0.1\nHostKey {0}/host\nAuthorizedKeysFile {0}/authorized\n\
             StrictModes no\nUsePAM no\nPidFile none\nPermitRootLogin prohibit-password\n\
             MaxSessions 64\nMaxStartups 64\nSubsystem sftp internal-sftp\n",
            dir.path().display()
        );
        fs::write(path("sshd_config"), config).expect("sshd's configuration");
        let sshd = Command::new("/usr/sbin/sshd")
            .args(["-D", "-f", &path("sshd_config")])
            .spawn()
            .expect("sshd");
        let host =
            json!({"state_dir": path("state"), "run_dir": path("run"), "qemu": {"accel": "tcg"}});
        fs::write(path("host.json"), host.to_string()).expect("the host's configuration");
        let transport = json!({
            "kind": "ssh", "host": "127.0.0.1", "private_key": read("caller"),
            "host_key": read("host.pub"), "sessions": 64,
        });
        fs::write(path("office.json"), json!({"transport": transport}).to_string())
            .expect("the office's configuration");
        fs::write(path("known"), format!("127.0.0.1 {}", read("host.pub"))).expect("known hosts");
        let lab = Self { dir, sshd };
        let began = Instant::now();
        while !lab.ssh(&["-M", "-N", "-f"]).status().expect("ssh").success() {
            assert!(began.elapsed() < Duration::from_secs(10), "sshd does not answer");
            std::thread::sleep(Duration::from_millis(50));
        }
        lab.call("office.json", "has_vm", &json!(["vm-1"]));
        lab
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// The ssh command over the operator's connection.
    fn ssh(&self, words: &[&str]) -> Command {
        let mut command = Command::new("ssh");
        command.args(self.options()).args(words).arg("root@127.0.0.1");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    fn options(&self) -> Vec<String> {
        let option = |name: &str, value: String| ["-o".to_owned(), format!("{name}={value}")];
        let mut words =
            vec!["-F".to_owned(), "none".to_owned(), "-i".to_owned(), self.path("operator")];
        words.extend(option("UserKnownHostsFile", self.path("known")));
        words.extend(option("IdentitiesOnly", "yes".to_owned()));
        words.extend(option("ControlPath", self.path("operator.sock")));
        words
    }

    fn start(&self, config: &str, method: &str, arguments: &Value) -> Child {
        let mut command = Command::new(program());
        command.args(["--config", &self.path(config)]).env_clear().env("PATH", "/usr/bin:/bin");
        command.env("TMPDIR", self.dir.path());
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the program");
        let context = json!({"director_uuid": "bench"});
        let request = json!({"method": method, "arguments": arguments, "context": context});
        child
            .stdin
            .take()
            .expect("piped")
            .write_all(request.to_string().as_bytes())
            .expect("a request");
        child
    }

    fn call(&self, config: &str, method: &str, arguments: &Value) -> Value {
        let output = self.start(config, method, arguments).wait_with_output().expect("an answer");
        let answer: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert!(answer["error"].is_null(), "{method}: {answer}");
        answer["result"].clone()
    }

    fn one_call(&self, table: &mut Table) {
        let (floor, _) =
            timed(|| assert!(self.ssh(&[]).arg("true").status().expect("ssh").success()));
        let (ours, _) = timed(|| self.call("office.json", "has_vm", &json!(["vm-1"])));
        table.add("has_vm, beside ssh host true", Target::Above(10.0), ours, floor);
        let (here, _) = timed(|| self.call("host.json", "has_vm", &json!(["vm-1"])));
        table.add("has_vm, beside one on the host", Target::AtMost(50.0), ours, here);
    }

    fn many_calls(&self, table: &mut Table) {
        let (ours, ()) = timed(|| {
            let calls: Vec<_> = (0..CALLERS)
                .map(|_| self.start("office.json", "has_vm", &json!(["vm-1"])))
                .collect();
            calls.into_iter().for_each(|call| {
                assert!(call.wait_with_output().expect("an answer").status.success());
            });
        });
        let (floor, ()) = timed(|| {
            let calls: Vec<_> =
                (0..CALLERS).map(|_| self.ssh(&[]).arg("true").spawn().expect("ssh")).collect();
            calls.into_iter().for_each(|mut call| assert!(call.wait().expect("its end").success()));
        });
        table.add("32 has_vm at once, beside 32 ssh", Target::Ratio(1.5), ours, floor);
    }

    fn stemcell(&self, table: &mut Table) {
        let image = self.path("image");
        if !PathBuf::from(&image).exists() {
            fs::write(&image, disk()).expect("an image");
        }
        let (ours, stemcell) =
            timed(|| self.call("office.json", "create_stemcell", &json!([image, {}])));
        let (again, second) =
            timed(|| self.call("office.json", "create_stemcell", &json!([image, {}])));
        for stemcell in [stemcell, second] {
            self.call("office.json", "delete_stemcell", &json!([stemcell]));
        }
        let copied = self.path("copied");
        let (sent, ()) = timed(|| {
            let mut scp = Command::new("scp");
            scp.arg("-q").args(self.options()).args([&image, &format!("root@127.0.0.1:{copied}")]);
            assert!(scp.status().expect("scp").success());
        });
        let (imported, stemcell) =
            timed(|| self.call("host.json", "create_stemcell", &json!([copied, {}])));
        self.call("host.json", "delete_stemcell", &json!([stemcell]));
        table.add("create_stemcell, 256 MiB, beside scp", Target::Ratio(1.0), ours, sent);
        table.add("… beside scp and create_stemcell", Target::Ratio(1.0), ours, sent + imported);
        table.add("… that the host has, beside scp", Target::Ratio(0.5), again, sent);
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = self.ssh(&["-O", "exit"]).status();
        let _ = self.sshd.kill();
        let _ = self.sshd.wait();
    }
}

/// A bootable disk in which every second MiB is noise.
fn disk() -> Vec<u8> {
    let mut bytes = vec![0; IMAGE];
    let mut state = 1_u64;
    for (number, block) in
        bytes.chunks_mut(1 << 20).enumerate().filter(|(number, _)| number % 2 == 1)
    {
        for word in block.chunks_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&(state ^ number as u64).to_le_bytes());
        }
    }
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    bytes
}

fn program() -> PathBuf {
    std::env::var_os("FLOORS_CPI")
        .map_or_else(|| env!("CARGO_BIN_EXE_bosh-qemu-cpi").into(), PathBuf::from)
}

fn run(program: &str, words: &[&str]) {
    assert!(
        Command::new(program).args(words).status().expect(program).success(),
        "{program} {words:?}"
    );
}

fn timed<T>(act: impl FnOnce() -> T) -> (Duration, T) {
    let began = Instant::now();
    let result = act();
    (began.elapsed(), result)
}
