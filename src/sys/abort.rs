//! The answer of a process that aborts: the Rust runtime has no memory left, or a stack overflows.
//! Neither is a panic.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::Pid;

/// The descriptor for the answer; -1 if none is to be written.
static OUTPUT: AtomicI32 = AtomicI32::new(-1);
/// The process that answers. A child has the same handler and descriptor until it executes its
/// program, and Rust's runtime aborts it if it cannot report a failure to a killed parent.
static PROCESS: AtomicI32 = AtomicI32::new(0);
static ANSWER: OnceLock<Vec<u8>> = OnceLock::new();

/// Has an abort of this process write `answer` to `output` and end the process with status 0.
/// `output` must stay open until [`disarm`].
#[allow(unsafe_code)]
pub fn answer_with(output: BorrowedFd<'_>, answer: Vec<u8>) {
    // The handler may run on the small stack that the runtime has for overflows of the stack.
    let action = SigAction::new(
        SigHandler::Handler(on_abort),
        SaFlags::SA_ONSTACK | SaFlags::SA_RESETHAND,
        SigSet::empty(),
    );
    if ANSWER.set(answer).is_ok() {
        PROCESS.store(Pid::this().as_raw(), Ordering::SeqCst);
        OUTPUT.store(output.as_raw_fd(), Ordering::SeqCst);
        // SAFETY: the handler only loads atomics and makes system calls.
        let _ = unsafe { sigaction(Signal::SIGABRT, &action) };
    }
}

/// Has an abort write nothing, because the answer is written otherwise.
pub fn disarm() {
    OUTPUT.store(-1, Ordering::SeqCst);
}

#[allow(unsafe_code)]
extern "C" fn on_abort(_: libc::c_int) {
    // The signal ends a child when this returns: the handler is installed for one signal.
    if Pid::this().as_raw() != PROCESS.load(Ordering::SeqCst) {
        return;
    }
    let output = OUTPUT.swap(-1, Ordering::SeqCst);
    if let (0.., Some(answer)) = (output, ANSWER.get()) {
        // SAFETY: the bytes are live and never change; both functions are async-signal-safe
        // (signal-safety(7)).
        unsafe {
            libc::write(output, answer.as_ptr().cast(), answer.len());
            libc::_exit(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::process::{CommandExt, ExitStatusExt};
    use std::process::Command;

    use super::*;

    #[test]
    #[allow(unsafe_code)]
    fn abort_of_child_before_exec_writes_no_answer() {
        let (read, write) = nix::unistd::pipe().unwrap();
        answer_with(write.as_fd(), b"{}".to_vec());
        let mut command = Command::new("true");
        // SAFETY: abort(3) is async-signal-safe (signal-safety(7)).
        unsafe { command.pre_exec(|| std::process::abort()) };
        let status = command.spawn().unwrap().wait().unwrap();
        disarm();
        drop(write);
        let mut answer = String::new();
        File::from(read).read_to_string(&mut answer).unwrap();
        assert_eq!((answer.as_str(), status.signal()), ("", Some(libc::SIGABRT)));
    }
}
