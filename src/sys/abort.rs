//! The answer of a process that aborts: the Rust runtime has no memory left, or a stack overflows.
//! Neither is a panic.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// The descriptor for the answer; -1 if none is to be written.
static OUTPUT: AtomicI32 = AtomicI32::new(-1);
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
