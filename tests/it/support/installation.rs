//! Directories and configuration of one test, for calls that start no VM.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::answer::{Answer, run};

/// State directory, run directory and configuration of one test. Dropping it removes them and fails
/// the test if one of its processes still runs.
pub struct Installation {
    dir: TempDir,
}

impl Installation {
    /// An installation with the default configuration.
    pub fn new() -> Self {
        Self::with(&json!({}))
    }

    /// An installation with `config`, to which `state_dir` and `run_dir` are added.
    pub fn with(config: &Value) -> Self {
        // Not $TMPDIR: the path must be short, because socket paths have at most 107 bytes.
        let dir = tempfile::Builder::new().prefix("cpi-").tempdir_in("/tmp").unwrap();
        let installation = Self { dir };
        let mut config = config.clone();
        config["state_dir"] = json!(installation.path("state"));
        config["run_dir"] = json!(installation.path("run"));
        fs::write(installation.config(), config.to_string()).unwrap();
        installation
    }

    /// The path `name` in the directory of this installation.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The path of the configuration file.
    pub fn config(&self) -> PathBuf {
        self.path("cpi.json")
    }

    /// The program with this configuration. As under the Director, its environment is `PATH` alone.
    pub fn cpi(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bosh-qemu-cpi"));
        command.arg("--config").arg(self.config());
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command
    }

    /// Answer of the CPI to a call of `method`, requested as the Director does.
    pub fn call(&self, method: &str, arguments: &Value) -> Answer {
        let context = json!({"director_uuid": "deadbeef", "request_id": "cpi-123456"});
        self.ask(&json!({
            "method": method, "arguments": arguments, "context": context, "api_version": 2,
        }))
    }

    /// Answer of the CPI to a whole request.
    pub fn ask(&self, request: &Value) -> Answer {
        self.ask_raw(request.to_string().as_bytes())
    }

    /// Answer of the CPI to the bytes of a request, which may be malformed.
    pub fn ask_raw(&self, request: &[u8]) -> Answer {
        Answer::of(&run(self.cpi(), request))
    }
}

impl Drop for Installation {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let left = processes_in(self.dir.path());
            assert!(left.is_empty(), "processes are left: {left:#?}");
        }
    }
}

/// Command lines of other processes that name `dir` or have a file in it open.
fn processes_in(dir: &Path) -> Vec<String> {
    let needle = dir.as_os_str().as_bytes();
    let names = |bytes: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
    let processes = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let own = std::process::id().to_string();
    let others =
        processes.filter(|process| process.file_name().is_some_and(|name| name != own.as_str()));
    others
        .filter_map(|process| {
            let command_line = fs::read(process.join("cmdline")).ok()?;
            let files = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
            let mut links = files.filter_map(|file| fs::read_link(file.path()).ok());
            let here = names(&command_line) || links.any(|link| names(link.as_os_str().as_bytes()));
            here.then(|| {
                format!("{} {}", process.display(), String::from_utf8_lossy(&command_line))
            })
        })
        .collect()
}

/// Every request in `tests/fixtures/requests`, with the name of its flow.
pub fn recorded_requests() -> Vec<(String, Value)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/requests");
    let files = fs::read_dir(dir).unwrap().map(|file| file.unwrap().path());
    let lines = files.flat_map(|file| {
        let flow = file.file_stem().unwrap().to_string_lossy().into_owned();
        let text = fs::read_to_string(&file).unwrap();
        let requests: Vec<_> =
            text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()).collect();
        requests.into_iter().map(move |mut line| (flow.clone(), line["request"].take()))
    });
    let requests: Vec<_> = lines.collect();
    assert!(requests.len() > 150, "only {} recorded requests found", requests.len());
    requests
}
