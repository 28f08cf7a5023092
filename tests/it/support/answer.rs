//! Strict reader of the answers that the CPI writes to stdout.

use std::io::{self, Write};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

/// Most bytes that a call may write to stderr: the bound of the log, and one notice.
const MAX_STDERR: usize = (64 << 10) + 100;

/// Error types in the Director's `errors.rb`. The Director turns any other into `UnknownError`.
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

/// Runs `command` with `input` on stdin.
///
/// The command must read all of it, because the Director fails on a CPI that does not. Like the
/// Director, this returns at the end of stdout and stderr, so a process that inherits them delays
/// it.
pub fn run(command: Command, input: &[u8]) -> Output {
    let mut child = spawn(command);
    let mut stdin = child.stdin.take().unwrap();
    let (written, output) = std::thread::scope(|scope| {
        let writer = scope.spawn(move || stdin.write_all(input));
        (writer.join().unwrap(), child.wait_with_output().unwrap())
    });
    let written: io::Result<()> = written;
    written.expect("the request is read to its end");
    output
}

/// Starts a command with pipes for its input, its output and its log.
pub fn spawn(mut command: Command) -> Child {
    let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    pipes.spawn().expect("spawn")
}

/// An answer in the only shape that the Director accepts.
#[derive(Debug)]
pub struct Answer {
    /// The result of the method, or its error.
    pub outcome: Result<Value, Failure>,
    /// The whole answer, as written to stdout.
    pub stdout: String,
    /// The log, as written to stderr.
    pub stderr: String,
}

/// The error in an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The error type without `Bosh::Clouds::`.
    pub kind: String,
    /// The message for the operator.
    pub message: String,
    /// Whether the Director should repeat the call.
    pub ok_to_retry: bool,
}

impl Answer {
    /// Checks everything that the Director (`external_cpi.rb`, RESPONSE_SCHEMA) and bosh-cli check,
    /// and more.
    pub fn of(output: &Output) -> Self {
        assert!(output.status.success(), "{output:?}");
        assert!(output.stderr.len() <= MAX_STDERR, "{} bytes on stderr", output.stderr.len());
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("UTF-8");
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        Self { outcome: Self::outcome(&stdout), stdout, stderr }
    }

    /// Parses `stdout`, which must be exactly one JSON object.
    pub fn outcome(stdout: &str) -> Result<Value, Failure> {
        let mut answer: Value =
            serde_json::from_str(stdout).unwrap_or_else(|e| panic!("{e} in {stdout:?}"));
        let keys: Vec<_> = answer.as_object().expect("an object").keys().collect();
        assert_eq!(keys, ["error", "log", "result"], "{stdout}");
        let log = answer["log"].as_str().expect("a string");
        assert!(log.is_empty() || log.ends_with('\n'), "{stdout}");
        let error = answer["error"].take();
        if error.is_null() {
            return Ok(answer["result"].take());
        }
        assert!(answer["result"].is_null(), "{stdout}");
        let kind = error["type"]
            .as_str()
            .and_then(|name| name.strip_prefix("Bosh::Clouds::"))
            .expect("a type");
        assert!(DIRECTOR_TYPES.contains(&kind), "the Director does not know {kind}");
        let ok_to_retry = error["ok_to_retry"].as_bool().expect("a boolean");
        assert!(!ok_to_retry || kind == "VMCreationFailed", "{stdout}");
        let message = error["message"].as_str().expect("a message").to_owned();
        assert!(!message.is_empty() && message.len() < 10_000, "{} bytes", message.len());
        Err(Failure { kind: kind.to_owned(), message, ok_to_retry })
    }

    /// The error of an answer that must be one.
    pub fn failure(&self) -> &Failure {
        self.outcome.as_ref().expect_err("a failure")
    }

    /// The result of an answer that must be one.
    pub fn result(&self) -> &Value {
        self.outcome.as_ref().unwrap_or_else(|failure| panic!("{failure:?}; log: {}", self.stderr))
    }
}
