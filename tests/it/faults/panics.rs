//! What a CPI does when its own code misbehaves. The test binary starts itself as such a CPI: the product needs no
//! hidden way to panic, and the release build's abort comes after the hook tested here.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};

use bosh_qemu_cpi::error::{Error, ErrorKind};
use bosh_qemu_cpi::rpc::{outlet::Outlet, serve};

use crate::support::answer::{Answer, Failure};

const PLAY: &str = "CPI_TEST_PLAYS_CPI";
const REQUEST: &str = r#"{"method":"has_vm","arguments":["vm-1"]}"#;

struct Played {
    outcome: Result<serde_json::Value, Failure>,
    stderr: String,
    /// How `/proc/<pid>/fd` shows the pipe that was the child's stdout.
    stdout_pipe: String,
}

/// In the child: serves stdin with a CPI that does `misbehave`. Elsewhere: starts that child from `test`.
fn played(test: &str, misbehave: fn()) -> Option<Played> {
    if std::env::var_os(PLAY).is_some() {
        serve(std::io::stdin(), Outlet::stdout().unwrap(), |_| {
            misbehave();
            Err(Error::new(ErrorKind::VmNotFound, "after all that"))
        });
        return None;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(PLAY, "1");
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(REQUEST.as_bytes()).unwrap();
    let stdout = child.stdout.as_ref().unwrap().as_raw_fd();
    let stdout_pipe =
        std::fs::read_link(format!("/proc/self/fd/{stdout}")).unwrap().display().to_string();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    // The test harness introduces itself before the CPI takes stdout.
    let start = output.stdout.iter().position(|byte| *byte == b'{').expect("an answer");
    let outcome = Answer::outcome(std::str::from_utf8(&output.stdout[start..]).unwrap());
    Some(Played { outcome, stderr: String::from_utf8(output.stderr).unwrap(), stdout_pipe })
}

#[test]
fn panic_in_call_is_answered_as_cloud_error() {
    let Some(Played { outcome, .. }) =
        played("faults::panics::panic_in_call_is_answered_as_cloud_error", || panic!("for a test"))
    else {
        return;
    };
    let failure = outcome.unwrap_err();
    assert_eq!(failure.kind, "CloudError");
    assert!(
        failure.message.starts_with("a bug of the CPI at tests/it/faults/panics.rs:"),
        "{}",
        failure.message
    );
    assert!(failure.message.contains(": for a test\n"), "{}", failure.message);
}

#[test]
fn panic_with_request_data_does_not_repeat_it() {
    let play = || panic!("{}", std::env::args().next().map_or("", |_| "hunter2"));
    let Some(Played { outcome, .. }) =
        played("faults::panics::panic_with_request_data_does_not_repeat_it", play)
    else {
        return;
    };
    let message = outcome.unwrap_err().message;
    assert!(
        message.starts_with("a bug of the CPI at tests/it/faults/panics.rs:")
            && !message.contains("hunter2"),
        "{message}"
    );
}

#[test]
fn panic_in_thread_is_answered_with_its_message() {
    let play = || std::thread::spawn(|| panic!("in a thread")).join().unwrap();
    let Some(Played { outcome, .. }) =
        played("faults::panics::panic_in_thread_is_answered_with_its_message", play)
    else {
        return;
    };
    assert!(outcome.unwrap_err().message.contains(": in a thread\n"));
}

#[test]
fn print_to_stdout_does_not_corrupt_the_answer() {
    let play = || {
        writeln!(std::io::stdout(), "noise of ours").unwrap();
        assert!(Command::new("echo").arg("noise of a child").status().unwrap().success());
    };
    let Some(Played { outcome, .. }) =
        played("faults::panics::print_to_stdout_does_not_corrupt_the_answer", play)
    else {
        return;
    };
    assert_eq!(outcome.unwrap_err().message, "has_vm: after all that");
}

#[test]
fn spawn_child_does_not_inherit_the_answer_pipe() {
    // A child that stayed would keep the caller waiting for the end of its stdout.
    let play = || {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        for file in std::fs::read_dir(format!("/proc/{}/fd", child.id())).unwrap().flatten() {
            // The loader opens and closes files of its own meanwhile.
            let Ok(link) = std::fs::read_link(file.path()) else { continue };
            writeln!(std::io::stderr(), "{} is {}", file.file_name().display(), link.display())
                .unwrap();
        }
        drop(child.stdin.take());
        child.wait().unwrap();
    };
    let Some(played) = played("faults::panics::spawn_child_does_not_inherit_the_answer_pipe", play)
    else {
        return;
    };
    assert_eq!(played.outcome.unwrap_err().kind, "VMNotFound");
    assert!(played.stderr.contains("1 is /dev/null\n"), "{}", played.stderr);
    assert!(
        !played.stderr.contains(&played.stdout_pipe),
        "{}: {}",
        played.stdout_pipe,
        played.stderr
    );
}
