//! Writes the response exactly once: the call's, or that of the first panic.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::panic::{Location, PanicHookInfo};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::rpc::response::Response;
use crate::sys::abort;

/// The fate of a response.
#[derive(Debug)]
pub enum Delivery {
    /// The caller has received it.
    Received,
    /// The caller cannot receive it: it has closed its end.
    Lost(io::Error),
    /// It was sent, but the connection broke or timed out before the caller acknowledged it.
    Unknown(io::Error),
}

/// A destination of responses.
pub trait ResponseSink: Send + Sync {
    /// Sends `response`. With `await_receipt`, waits until the caller acknowledges it.
    fn deliver(&self, response: &Response, await_receipt: bool) -> Delivery;
}

/// A pipe to the caller. What the pipe accepts counts as received, but no process reads
/// `/dev/null`: Rust's runtime opens it as the standard output that the caller has closed.
impl ResponseSink for File {
    fn deliver(&self, response: &Response, await_receipt: bool) -> Delivery {
        match (&*self).write_all(response.as_bytes()) {
            Ok(()) if await_receipt && is_null(self) => Delivery::Lost(io::Error::new(
                io::ErrorKind::BrokenPipe,
                "standard output is closed or /dev/null",
            )),
            Ok(()) => Delivery::Received,
            // A part that was written is not valid JSON, so the caller cannot use it.
            Err(error) => Delivery::Lost(error),
        }
    }
}

/// Sends one response to the caller.
pub struct ResponseWriter {
    sink: Box<dyn ResponseSink>,
    used: AtomicBool,
}

impl ResponseWriter {
    /// A writer to standard output, which nothing else can write to from now on. An abort of the
    /// process is answered, too.
    ///
    /// # Errors
    /// As [`take_stdout`].
    pub fn stdout() -> Result<Self> {
        let output = take_stdout()?;
        let error = Error::new(ErrorKind::Host, "the call ran out of memory or stack").hint(
            "see its standard error; the next call on the same cid finishes or undoes what \
                 this call began",
        );
        abort::answer_with(output.as_fd(), Response::failure(&error).as_bytes().to_vec());
        Ok(Self::new(output))
    }

    /// A writer to `sink`.
    pub fn new(sink: impl ResponseSink + 'static) -> Self {
        Self { sink: Box::new(sink), used: AtomicBool::new(false) }
    }

    /// Sends the response, as [`ResponseSink::deliver`].
    ///
    /// # Panics
    /// If a response was sent before.
    pub fn send(&self, response: &Response, await_receipt: bool) -> Delivery {
        assert!(!self.used.swap(true, Ordering::SeqCst), "a second response");
        abort::disarm();
        self.sink.deliver(response, await_receipt)
    }

    /// Installs a panic hook: a panic of any thread sends an error response and ends the process
    /// with status 0. In a release build panics abort, and the hook is the last code that runs.
    pub fn answer_panics(self) -> Arc<Self> {
        let writer = Arc::new(self);
        let hooked = Arc::clone(&writer);
        std::panic::set_hook(Box::new(move |panic| {
            if !hooked.used.swap(true, Ordering::SeqCst) {
                abort::disarm();
                // The process ends either way, so a failure to deliver cannot be reported.
                let _ = hooked.sink.deliver(&Response::failure(&bug(panic)), false);
            }
            std::process::exit(0);
        }));
        writer
    }
}

/// Takes standard output away from the rest of the process. File descriptor 1 becomes `/dev/null`,
/// and child processes do not inherit the returned duplicate. So a child's output cannot corrupt
/// the response, and a child that stays cannot keep the caller waiting for the end of the output.
///
/// # Errors
/// [`ErrorKind::Host`] if a descriptor cannot be duplicated or /dev/null cannot be opened.
pub fn take_stdout() -> Result<File> {
    let own = io::stdout()
        .as_fd()
        .try_clone_to_owned()
        .map_err(|e| Error::os("duplicate standard output", e))?;
    let null = std::path::Path::new("/dev/null");
    let sink = File::options().write(true).open(null).at("open", null)?;
    nix::unistd::dup2_stdout(&sink).map_err(|e| Error::os("replace standard output", e))?;
    Ok(File::from(own))
}

/// Whether `file` is `/dev/null`: device 1:3 (`admin-guide/devices.txt` of the kernel).
fn is_null(file: &File) -> bool {
    file.metadata().is_ok_and(|meta| {
        meta.file_type().is_char_device() && meta.rdev() == nix::libc::makedev(1, 3)
    })
}

fn bug(panic: &PanicHookInfo<'_>) -> Error {
    describe(panic.payload().downcast_ref::<&'static str>().copied(), panic.location())
}

/// The error for a panic. Shows only a literal message: a formatted one may contain values of the
/// request.
fn describe(literal: Option<&'static str>, location: Option<&Location<'_>>) -> Error {
    let place = location.map_or_else(|| "an unknown location".to_owned(), Location::to_string);
    let what = literal.map(|text| format!(": {text}")).unwrap_or_default();
    Error::new(ErrorKind::Internal, format!("bug in the CPI at {place}{what}"))
        .hint("report it; the next call on the same cid finishes or undoes what this call began")
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use super::*;

    #[test]
    fn the_response_is_written_once() {
        let mut file = tempfile::tempfile().unwrap();
        let writer = ResponseWriter::new(file.try_clone().unwrap());
        assert!(matches!(writer.send(&Response::success(&true), false), Delivery::Received));
        let mut written = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut written).unwrap();
        assert_eq!(written, r#"{"result":true,"error":null,"log":""}"#);
        let again = std::panic::AssertUnwindSafe(|| writer.send(&Response::success(&true), false));
        assert!(std::panic::catch_unwind(again).is_err());
    }

    #[test]
    fn a_response_to_dev_null_is_lost_where_it_matters() {
        let send = |matters| {
            let null = File::options().write(true).open("/dev/null").unwrap();
            ResponseWriter::new(null).send(&Response::success(&"disk-1"), matters)
        };
        assert!(matches!(send(true), Delivery::Lost(_)));
        assert!(matches!(send(false), Delivery::Received));
    }

    #[test]
    fn a_panic_is_reported_with_its_location_and_a_literal_message() {
        let here = Location::caller();
        let error = describe(Some("index out of range"), Some(here)).report();
        assert!(
            error.starts_with(&format!("bug in the CPI at {here}: index out of range\nHint: ")),
            "{error}"
        );
        assert!(
            describe(None, None)
                .report()
                .starts_with("bug in the CPI at an unknown location\nHint: ")
        );
    }
}
