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
fn a_panic_is_an_answer() {
    let Some(Played { outcome, .. }) =
        played("faults::panics::a_panic_is_an_answer", || panic!("for a test"))
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
fn a_panic_does_not_repeat_what_a_request_said() {
    let play = || panic!("{}", std::env::args().next().map_or("", |_| "hunter2"));
    let Some(Played { outcome, .. }) =
        played("faults::panics::a_panic_does_not_repeat_what_a_request_said", play)
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
fn a_thread_that_panics_is_answered_too() {
    let play = || std::thread::spawn(|| panic!("in a thread")).join().unwrap();
    let Some(Played { outcome, .. }) =
        played("faults::panics::a_thread_that_panics_is_answered_too", play)
    else {
        return;
    };
    assert!(outcome.unwrap_err().message.contains(": in a thread\n"));
}

#[test]
fn what_a_child_prints_does_not_spoil_the_answer() {
    let play = || {
        writeln!(std::io::stdout(), "noise of ours").unwrap();
        assert!(Command::new("echo").arg("noise of a child").status().unwrap().success());
    };
    let Some(Played { outcome, .. }) =
        played("faults::panics::what_a_child_prints_does_not_spoil_the_answer", play)
    else {
        return;
    };
    assert_eq!(outcome.unwrap_err().message, "has_vm: after all that");
}

#[test]
fn no_child_inherits_the_way_to_the_caller() {
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
    let Some(played) = played("faults::panics::no_child_inherits_the_way_to_the_caller", play)
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
