//! Panics and stray output of the CPI's own code. The test binary starts itself as the CPI, so the
//! program needs no hidden way to panic. The release build aborts after the panic hook tested here.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};

use bosh_qemu_cpi::error::{Error, ErrorKind};
use bosh_qemu_cpi::rpc::{response_writer::ResponseWriter, serve};

use crate::support::answer::{Answer, Failure};

const RUN_AS_CPI_VARIABLE: &str = "BOSH_QEMU_CPI_TEST_RUNS_AS_CPI";
const REQUEST: &str = r#"{"method":"has_vm","arguments":["vm-1"]}"#;

struct ChildOutput {
    outcome: Result<serde_json::Value, Failure>,
    stderr: String,
    /// The child's stdout pipe as `/proc/<pid>/fd` names it.
    stdout_pipe: String,
}

/// In the child process, serves stdin with a CPI that runs `misbehave` and returns `None`. In the
/// parent, starts that child for the test `test` and returns its output.
fn run_as_cpi(test: &str, misbehave: fn()) -> Option<ChildOutput> {
    if std::env::var_os(RUN_AS_CPI_VARIABLE).is_some() {
        serve(std::io::stdin(), ResponseWriter::stdout().unwrap(), |_| {
            misbehave();
            Err(Error::new(ErrorKind::VmNotFound, "after all that"))
        });
        return None;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(RUN_AS_CPI_VARIABLE, "1");
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
    // The test harness prints before the CPI takes stdout.
    let start = output.stdout.iter().position(|byte| *byte == b'{').expect("an answer");
    let outcome = Answer::outcome(std::str::from_utf8(&output.stdout[start..]).unwrap());
    Some(ChildOutput { outcome, stderr: String::from_utf8(output.stderr).unwrap(), stdout_pipe })
}

#[test]
fn panic_in_call_is_answered_as_cloud_error() {
    let Some(ChildOutput { outcome, .. }) =
        run_as_cpi("faults::panics::panic_in_call_is_answered_as_cloud_error", || {
            panic!("for a test")
        })
    else {
        return;
    };
    let failure = outcome.unwrap_err();
    assert_eq!(failure.kind, "CloudError");
    assert!(
        failure.message.starts_with("bug in the CPI at tests/it/faults/panics.rs:"),
        "{}",
        failure.message
    );
    assert!(failure.message.contains(": for a test\n"), "{}", failure.message);
}

#[test]
fn panic_with_request_data_does_not_repeat_it() {
    let misbehave = || panic!("{}", std::env::args().next().map_or("", |_| "hunter2"));
    let Some(ChildOutput { outcome, .. }) =
        run_as_cpi("faults::panics::panic_with_request_data_does_not_repeat_it", misbehave)
    else {
        return;
    };
    let message = outcome.unwrap_err().message;
    assert!(
        message.starts_with("bug in the CPI at tests/it/faults/panics.rs:")
            && !message.contains("hunter2"),
        "{message}"
    );
}

#[test]
fn panic_in_thread_is_answered_with_its_message() {
    let misbehave = || std::thread::spawn(|| panic!("in a thread")).join().unwrap();
    let Some(ChildOutput { outcome, .. }) =
        run_as_cpi("faults::panics::panic_in_thread_is_answered_with_its_message", misbehave)
    else {
        return;
    };
    assert!(outcome.unwrap_err().message.contains(": in a thread\n"));
}

#[test]
fn print_to_stdout_does_not_corrupt_the_answer() {
    let misbehave = || {
        writeln!(std::io::stdout(), "output of the CPI").unwrap();
        assert!(Command::new("echo").arg("output of a child").status().unwrap().success());
    };
    let Some(ChildOutput { outcome, .. }) =
        run_as_cpi("faults::panics::print_to_stdout_does_not_corrupt_the_answer", misbehave)
    else {
        return;
    };
    assert_eq!(outcome.unwrap_err().message, "has_vm: after all that");
}

#[test]
fn spawn_child_does_not_inherit_the_answer_pipe() {
    // A child that outlives the call would delay the end of the caller's stdout.
    let misbehave = || {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        for file in std::fs::read_dir(format!("/proc/{}/fd", child.id())).unwrap().flatten() {
            // The dynamic loader opens and closes files meanwhile.
            let Ok(link) = std::fs::read_link(file.path()) else { continue };
            writeln!(std::io::stderr(), "{} is {}", file.file_name().display(), link.display())
                .unwrap();
        }
        drop(child.stdin.take());
        child.wait().unwrap();
    };
    let Some(output) =
        run_as_cpi("faults::panics::spawn_child_does_not_inherit_the_answer_pipe", misbehave)
    else {
        return;
    };
    assert_eq!(output.outcome.unwrap_err().kind, "VMNotFound");
    assert!(output.stderr.contains("1 is /dev/null\n"), "{}", output.stderr);
    assert!(
        !output.stderr.contains(&output.stdout_pipe),
        "{}: {}",
        output.stdout_pipe,
        output.stderr
    );
}

/// The Rust runtime aborts without a panic when it has no memory left.
#[test]
fn abort_of_call_without_memory_is_answered_as_cloud_error() {
    let Some(ChildOutput { outcome, .. }) = run_as_cpi(
        "faults::panics::abort_of_call_without_memory_is_answered_as_cloud_error",
        || std::alloc::handle_alloc_error(std::alloc::Layout::new::<u64>()),
    ) else {
        return;
    };
    let error = outcome.unwrap_err();
    assert!(error.message.contains("ran out of memory"), "{}", error.message);
}
