//! What every integration test stands on: a world of its own, and a strict reader of answers.

pub mod answer;
pub mod host;
pub mod netns;
pub mod nftables;

use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

/// The most the CPI may write to stderr in a call: the log's bound and one notice.
const MAX_STDERR: usize = (64 << 10) + 100;

/// A state directory, a run directory and a configuration of one test, gone with it. Sees to it that nothing the
/// test started is left.
pub struct World {
    dir: TempDir,
}

impl World {
    /// With the default configuration.
    pub fn new() -> Self {
        Self::with(&json!({}))
    }

    /// With `config`; `state_dir` and `run_dir` are added.
    pub fn with(config: &Value) -> Self {
        // Not $TMPDIR: the run directory must be short, socket paths end at 107 bytes.
        let dir = tempfile::Builder::new().prefix("cpi-").tempdir_in("/tmp").unwrap();
        let world = Self { dir };
        let mut config = config.clone();
        config["state_dir"] = json!(world.path("state"));
        config["run_dir"] = json!(world.path("run"));
        fs::write(world.config(), config.to_string()).unwrap();
        world
    }

    /// Something in this world.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The configuration file.
    pub fn config(&self) -> PathBuf {
        self.path("cpi.json")
    }

    /// The CPI, started as the Director does: a path and nothing else in its environment.
    pub fn cpi(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bosh-qemu-cpi"));
        command.arg("--config").arg(self.config());
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command
    }

    /// What the CPI answers to `method` with `arguments`, asked as the Director does.
    pub fn call(&self, method: &str, arguments: &Value) -> Answer {
        let context = json!({"director_uuid": "deadbeef", "request_id": "cpi-123456"});
        self.ask(&json!({"method": method, "arguments": arguments, "context": context, "api_version": 2}))
    }

    /// What the CPI answers to a whole request.
    pub fn ask(&self, request: &Value) -> Answer {
        self.ask_raw(request.to_string().as_bytes())
    }

    /// What the CPI answers to bytes.
    pub fn ask_raw(&self, request: &[u8]) -> Answer {
        Answer::of(&run(self.cpi(), request))
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let left = processes_in(self.dir.path());
            assert!(left.is_empty(), "processes are left: {left:#?}");
        }
    }
}

/// Command lines of processes that name `dir` or have a file in it open.
fn processes_in(dir: &Path) -> Vec<String> {
    let needle = dir.as_os_str().as_bytes();
    let names = |bytes: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
    let processes = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let own = std::process::id().to_string();
    let others = processes.filter(|process| process.file_name().is_some_and(|name| name != own.as_str()));
    others
        .filter_map(|process| {
            let command_line = fs::read(process.join("cmdline")).ok()?;
            let files = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
            let mut links = files.filter_map(|file| fs::read_link(file.path()).ok());
            let here = names(&command_line) || links.any(|link| names(link.as_os_str().as_bytes()));
            here.then(|| format!("{} {}", process.display(), String::from_utf8_lossy(&command_line)))
        })
        .collect()
}

/// Runs `command` with `input` on stdin, all of which it must read, as the Director fails on one that does not.
pub fn run(mut command: Command, input: &[u8]) -> Output {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("spawn");
    let mut stdin = child.stdin.take().unwrap();
    let (written, output) = std::thread::scope(|scope| {
        let writer = scope.spawn(move || stdin.write_all(input));
        (writer.join().unwrap(), child.wait_with_output().unwrap())
    });
    let written: io::Result<()> = written;
    written.expect("the request is read to its end");
    output
}

/// An answer in the only shape the Director takes.
#[derive(Debug)]
pub struct Answer {
    /// What the method returned, or what went wrong.
    pub outcome: Result<Value, Failure>,
    /// What was logged.
    pub stderr: String,
}

/// The answer's error.
#[derive(Debug, PartialEq, Eq)]
pub struct Failure {
    /// Without `Bosh::Clouds::`.
    pub kind: String,
    /// For a person.
    pub message: String,
    /// Whether the Director should try again.
    pub ok_to_retry: bool,
}

impl Answer {
    /// Checks all that the Director (`external_cpi.rb`, RESPONSE_SCHEMA) and bosh-cli check, and more.
    pub fn of(output: &Output) -> Self {
        assert!(output.status.success(), "{output:?}");
        assert!(output.stderr.len() <= MAX_STDERR, "{} bytes on stderr", output.stderr.len());
        let stderr = String::from_utf8(output.stderr.clone()).expect("UTF-8 on stderr");
        Self { outcome: Self::outcome(&output.stdout), stderr }
    }

    /// Reads the one JSON object that is all of `stdout`.
    pub fn outcome(stdout: &[u8]) -> Result<Value, Failure> {
        let shown = String::from_utf8_lossy(stdout);
        let mut answer: Value = serde_json::from_slice(stdout).unwrap_or_else(|e| panic!("{e} in {shown:?}"));
        let keys: Vec<_> = answer.as_object().expect("an object").keys().collect();
        assert_eq!(keys, ["error", "log", "result"], "{shown}");
        let log = answer["log"].as_str().expect("a string");
        assert!(log.is_empty() || log.ends_with('\n'), "{shown}");
        let error = answer["error"].take();
        if error.is_null() {
            return Ok(answer["result"].take());
        }
        assert!(answer["result"].is_null(), "{shown}");
        let kind = error["type"].as_str().and_then(|name| name.strip_prefix("Bosh::Clouds::")).expect("a type");
        assert!(DIRECTOR_TYPES.contains(&kind), "the Director does not know {kind}");
        let ok_to_retry = error["ok_to_retry"].as_bool().expect("a boolean");
        assert!(!ok_to_retry || kind == "VMCreationFailed", "{shown}");
        let message = error["message"].as_str().expect("a message").to_owned();
        assert!(!message.is_empty() && message.len() < 10_000, "{} bytes", message.len());
        Err(Failure { kind: kind.to_owned(), message, ok_to_retry })
    }

    /// The error it must be.
    pub fn failure(&self) -> &Failure {
        self.outcome.as_ref().expect_err("a failure")
    }

    /// The result it must be.
    pub fn result(&self) -> &Value {
        self.outcome.as_ref().expect("a success")
    }
}

/// Of the Director's `errors.rb`; it makes any other a nameless `UnknownError`.
const DIRECTOR_TYPES: [&str; 10] = [
    "CpiError",
    "NotSupported",
    "NotImplemented",
    "CloudError",
    "VMNotFound",
    "NetworkNotFound",
    "NoDiskSpace",
    "DiskNotAttached",
    "DiskNotFound",
    "VMCreationFailed",
];

/// Every recorded request of the real clients, with the name of its flow.
pub fn recorded_requests() -> Vec<(String, Value)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/requests");
    let files = fs::read_dir(dir).unwrap().map(|file| file.unwrap().path());
    let lines = files.flat_map(|file| {
        let flow = file.file_stem().unwrap().to_string_lossy().into_owned();
        let text = fs::read_to_string(&file).unwrap();
        let requests: Vec<_> = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()).collect();
        requests.into_iter().map(move |mut line| (flow.clone(), line["request"].take()))
    });
    let requests: Vec<_> = lines.collect();
    assert!(requests.len() > 150, "only {} recorded requests found", requests.len());
    requests
}

/// Says why a test does nothing here. A runner counts these lines.
#[allow(clippy::print_stderr)]
pub fn skip(reason: &str) {
    eprintln!("SKIP {}: {reason}", std::thread::current().name().unwrap_or("test"));
}
