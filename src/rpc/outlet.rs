//! Where the answer goes: written once, by whoever comes first, the call or its panic.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::panic::{Location, PanicHookInfo};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::rpc::response::Response;

/// The way to the caller.
#[derive(Debug)]
pub struct Outlet {
    file: File,
    used: AtomicBool,
}

impl Outlet {
    /// Takes standard output for the answer alone. File descriptor 1 becomes `/dev/null` and ours is not inherited:
    /// what a child prints can not spoil the answer, and one that stays can not keep the caller waiting on it.
    ///
    /// # Errors
    /// [`ErrorKind::Host`].
    pub fn stdout() -> Result<Self> {
        let own = io::stdout().as_fd().try_clone_to_owned().map_err(|e| Error::os("duplicate standard output", e))?;
        let null = std::path::Path::new("/dev/null");
        let nowhere = File::options().write(true).open(null).at("open", null)?;
        nix::unistd::dup2_stdout(&nowhere).map_err(|e| Error::os("replace standard output", e))?;
        Ok(Self::new(File::from(own)))
    }

    /// Answers into `file`.
    pub fn new(file: File) -> Self {
        Self { file, used: AtomicBool::new(false) }
    }

    /// Writes the one answer.
    ///
    /// # Errors
    /// When not all of it was taken; EPIPE if the caller is gone. What was taken is then no JSON.
    ///
    /// # Panics
    /// If there was an answer before.
    pub fn send(&self, response: &Response) -> io::Result<()> {
        assert!(!self.used.swap(true, Ordering::SeqCst), "a second answer");
        (&self.file).write_all(response.as_bytes())
    }

    /// From now on a panic, of any thread, is answered and ends the process with status 0. In a release build a
    /// panic aborts: the hook is the last that runs.
    pub fn answer_panics(self) -> Arc<Self> {
        let outlet = Arc::new(self);
        let hooked = Arc::clone(&outlet);
        std::panic::set_hook(Box::new(move |panic| {
            if !hooked.used.swap(true, Ordering::SeqCst) {
                // Nobody is left to be told that this failed, too.
                let _ = (&hooked.file).write_all(Response::failure(&bug(panic)).as_bytes());
            }
            std::process::exit(0);
        }));
        outlet
    }
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
        let outlet = Outlet::new(file.try_clone().unwrap());
        outlet.send(&Response::success(&true)).unwrap();
        let mut written = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut written).unwrap();
        assert_eq!(written, r#"{"result":true,"error":null,"log":""}"#);
        let again = std::panic::AssertUnwindSafe(|| outlet.send(&Response::success(&true)));
        assert!(std::panic::catch_unwind(again).is_err());
    }

    #[test]
    fn a_panic_is_named_by_its_place_and_a_literal_message() {
        let here = Location::caller();
        let error = describe(Some("index out of range"), Some(here)).report();
        assert!(error.starts_with(&format!("a bug of the CPI at {here}: index out of range\nHint: ")), "{error}");
        assert!(describe(None, None).report().starts_with("a bug of the CPI at an unknown place\nHint: "));
    }
}
