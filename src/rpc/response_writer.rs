//! Where the answer goes: written once, by whoever comes first, the call or its panic.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::panic::{Location, PanicHookInfo};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::rpc::response::Response;

/// What became of an answer.
#[derive(Debug)]
pub enum Delivery {
    /// The caller has it.
    Received,
    /// The caller is gone and can not have it.
    Lost(io::Error),
    /// It was on its way when the caller fell silent. Whether it arrived, nobody can tell.
    Unknown(io::Error),
}

/// How answers reach the caller.
pub trait ResponseSink: Send + Sync {
    /// Brings it `answer`. If it `matters` whether that arrives, says so after finding out, not only after sending.
    fn deliver(&self, answer: &Response, matters: bool) -> Delivery;
}

/// A pipe whose reader is the caller: what it took has arrived.
impl ResponseSink for File {
    fn deliver(&self, answer: &Response, _: bool) -> Delivery {
        match (&*self).write_all(answer.as_bytes()) {
            Ok(()) => Delivery::Received,
            // What was taken is no JSON.
            Err(error) => Delivery::Lost(error),
        }
    }
}

/// The way to the caller, for one answer.
pub struct ResponseWriter {
    way: Box<dyn ResponseSink>,
    used: AtomicBool,
}

impl ResponseWriter {
    /// Takes standard output for the answer alone.
    ///
    /// # Errors
    /// [`ErrorKind::Host`].
    pub fn stdout() -> Result<Self> {
        take_stdout().map(Self::new)
    }

    /// Answers by `way`.
    pub fn new(way: impl ResponseSink + 'static) -> Self {
        Self { way: Box::new(way), used: AtomicBool::new(false) }
    }

    /// Gives the one answer, as [`ResponseSink::deliver`].
    ///
    /// # Panics
    /// If there was an answer before.
    pub fn send(&self, response: &Response, matters: bool) -> Delivery {
        assert!(!self.used.swap(true, Ordering::SeqCst), "a second answer");
        self.way.deliver(response, matters)
    }

    /// From now on a panic, of any thread, is answered and ends the process with status 0. In a release build a
    /// panic aborts: the hook is the last that runs.
    pub fn answer_panics(self) -> Arc<Self> {
        let writer = Arc::new(self);
        let hooked = Arc::clone(&writer);
        std::panic::set_hook(Box::new(move |panic| {
            if !hooked.used.swap(true, Ordering::SeqCst) {
                // Nobody is left to be told that this failed, too.
                let _ = hooked.way.deliver(&Response::failure(&bug(panic)), false);
            }
            std::process::exit(0);
        }));
        writer
    }
}

/// Standard output, for us alone. File descriptor 1 becomes `/dev/null` and ours is not inherited: what a child prints can
/// not spoil an answer, and one that stays can not keep the caller waiting on it.
///
/// # Errors
/// [`ErrorKind::Host`].
pub fn take_stdout() -> Result<File> {
    let own = io::stdout()
        .as_fd()
        .try_clone_to_owned()
        .map_err(|e| Error::os("duplicate standard output", e))?;
    let null = std::path::Path::new("/dev/null");
    let nowhere = File::options().write(true).open(null).at("open", null)?;
    nix::unistd::dup2_stdout(&nowhere).map_err(|e| Error::os("replace standard output", e))?;
    Ok(File::from(own))
}

fn bug(panic: &PanicHookInfo<'_>) -> Error {
    describe(panic.payload().downcast_ref::<&'static str>().copied(), panic.location())
}

/// Only a literal message is shown: one that was put together may hold what the request said.
fn describe(literal: Option<&'static str>, location: Option<&Location<'_>>) -> Error {
    let place = location.map_or_else(|| "an unknown place".to_owned(), Location::to_string);
    let what = literal.map(|text| format!(": {text}")).unwrap_or_default();
    Error::new(ErrorKind::Internal, format!("a bug of the CPI at {place}{what}"))
        .hint("what was begun is finished or undone by the next call on the same cid")
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use super::*;

    #[test]
    fn the_answer_is_written_once() {
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
    fn a_panic_is_named_by_its_place_and_a_literal_message() {
        let here = Location::caller();
        let error = describe(Some("index out of range"), Some(here)).report();
        assert!(
            error.starts_with(&format!("a bug of the CPI at {here}: index out of range\nHint: ")),
            "{error}"
        );
        assert!(
            describe(None, None)
                .report()
                .starts_with("a bug of the CPI at an unknown place\nHint: ")
        );
    }
}
