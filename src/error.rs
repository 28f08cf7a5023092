//! The one error type that crosses module borders.
//!
//! An [`Error`] is a small, matchable [`ErrorKind`], a message that names the thing and its path, an optional
//! hint for the operator and an optional source. Modules whose callers must tell failures apart keep an enum of
//! their own (`qmp::MonitorError`, `image::ImageError`, …) and convert it here, where only the kind matters.
//!
//! Wording: lower case, no full stop, the thing and the path in quotes, the source not repeated. What a request
//! carried as a value (env, agent settings, cloud properties) is never quoted.

use std::fmt::Display;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

type Source = Box<dyn std::error::Error + Send + Sync>;

/// What went wrong, as far as a caller may act on it. `rpc::response` maps each kind to one `Bosh::Clouds` type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ErrorKind {
    /// The request is malformed: wrong JSON, arity, type or value.
    BadRequest,
    /// The configuration file, a template or a profile is malformed.
    BadConfig,
    /// The method is unknown, or this version does not have it yet.
    NotImplemented,
    /// The method exists but can not do this; nothing was changed.
    NotSupported,
    /// No such VM.
    VmNotFound,
    /// No such disk.
    DiskNotFound,
    /// No such stemcell.
    StemcellNotFound,
    /// No such network.
    NetworkNotFound,
    /// A filesystem is full.
    NoDiskSpace,
    /// The host has not the memory for a VM. `temporary`: it will have, when VMs that are being deleted are gone.
    NotEnoughMemory {
        /// Whether it may be there in a moment.
        #[serde(rename = "passing")]
        temporary: bool,
    },
    /// More VMs that had better not be on one host are on this one than when it was chosen. Another may do better.
    #[serde(rename = "Crowded")]
    StalePlacement,
    /// The VM could not be made and nothing of it is left. `retry`: the same arguments may succeed.
    VmCreationFailed {
        /// Whether the Director should try again at once.
        retry: bool,
    },
    /// Something else holds what the call needs: a disk attached elsewhere, a bridge that is not ours.
    Conflict,
    /// A deadline passed.
    Timeout,
    /// A record in the state directory can not be read.
    Corrupt,
    /// The host refused: a system call, a program, a missing device.
    Host,
    /// A bug of ours.
    Internal,
}

/// A failure: kind, message, optional hint and source.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    kind: ErrorKind,
    message: String,
    hint: Option<String>,
    #[source]
    source: Option<Source>,
}

impl Error {
    /// A failure of `kind` that says `message`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None, source: None }
    }

    /// `action` on `path` failed with `error`. A full filesystem becomes [`ErrorKind::NoDiskSpace`].
    pub fn io(action: impl Display, path: &Path, error: std::io::Error) -> Self {
        let kind = io_kind(&error);
        Self::new(kind, format!("{action} '{}'", path.display())).because(error)
    }

    /// A system call that names no path failed with `error`.
    pub fn os(action: impl Into<String>, error: impl Into<std::io::Error>) -> Self {
        let error = error.into();
        Self::new(io_kind(&error), action).because(error)
    }

    /// Adds the failure behind this one.
    #[must_use]
    pub fn because(mut self, source: impl Into<Source>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Adds what the operator can do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same failure under another kind.
    #[must_use]
    pub fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.kind = kind;
        self
    }

    /// Says what was being done when this failure happened, keeping kind and hint.
    #[must_use]
    pub fn during(mut self, doing: impl Into<String>) -> Self {
        let hint = self.hint.take();
        let outer = Self::new(self.kind, doing).because(self);
        Self { hint, ..outer }
    }

    /// What a caller may act on.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Whether this host has not the memory or the space, so that another may do better.
    pub fn lacks_room(&self) -> bool {
        self.is_of(|kind| {
            matches!(kind, ErrorKind::NoDiskSpace | ErrorKind::NotEnoughMemory { .. })
        })
    }

    /// Whether others were faster to put VMs on this host, so that it is to be chosen anew.
    pub fn is_stale_placement(&self) -> bool {
        self.is_of(|kind| kind == ErrorKind::StalePlacement)
    }

    /// Whether it or what is behind it is of such a kind.
    fn is_of(&self, such: impl Fn(ErrorKind) -> bool) -> bool {
        let behind = std::iter::successors(std::error::Error::source(self), |error| error.source());
        such(self.kind)
            || behind.filter_map(|error| error.downcast_ref::<Self>()).any(|error| such(error.kind))
    }

    /// What the operator can do about it, if that is known.
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// The whole chain on one line.
    pub fn chain(&self) -> String {
        let mut text = self.message.clone();
        let mut source = std::error::Error::source(self);
        while let Some(error) = source {
            text.push_str(": ");
            text.push_str(&error.to_string());
            source = error.source();
        }
        text
    }

    /// The whole chain on one line, then the hint on its own: what a person reads.
    pub fn report(&self) -> String {
        let mut text = self.chain();
        if let Some(hint) = &self.hint {
            text.push_str("\nHint: ");
            text.push_str(hint);
        }
        text
    }
}

fn io_kind(error: &std::io::Error) -> ErrorKind {
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            ErrorKind::NoDiskSpace
        }
        std::io::ErrorKind::TimedOut => ErrorKind::Timeout,
        // An image larger than its filesystem can have files: 16 TiB on ext4. Another pool may do.
        std::io::ErrorKind::FileTooLarge => ErrorKind::NotSupported,
        _ => ErrorKind::Host,
    }
}

/// Puts the action and the path on an `io::Error`: a bare "No such file or directory" helps nobody.
pub trait IoContext<T> {
    /// `fs::read(path).at("read", path)?` fails with "read '/x': No such file or directory".
    fn at(self, action: impl Display, path: &Path) -> Result<T>;
}

impl<T> IoContext<T> for std::io::Result<T> {
    fn at(self, action: impl Display, path: &Path) -> Result<T> {
        self.map_err(|error| Error::io(action, path, error))
    }
}

impl<T> IoContext<T> for nix::Result<T> {
    fn at(self, action: impl Display, path: &Path) -> Result<T> {
        self.map_err(|errno| Error::io(action, path, errno.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_joins_the_chain_once_and_ends_with_the_hint() {
        let error = Error::io("open", Path::new("/x"), std::io::ErrorKind::NotFound.into())
            .hint("create it")
            .during("attach disk 'disk-a'");
        assert_eq!(
            error.report(),
            "attach disk 'disk-a': open '/x': entity not found\nHint: create it"
        );
        assert_eq!(error.kind(), ErrorKind::Host);
    }

    #[test]
    fn that_there_is_no_room_is_known_whatever_comes_of_it() {
        let full = Error::new(ErrorKind::NotEnoughMemory { temporary: false }, "no memory");
        let failed = full
            .during("start it")
            .during("create VM")
            .with_kind(ErrorKind::VmCreationFailed { retry: false });
        assert!(failed.lacks_room());
        assert!(!Error::new(ErrorKind::VmCreationFailed { retry: true }, "x").lacks_room());
    }

    #[test]
    fn a_full_filesystem_is_its_own_kind() {
        let full = std::io::Error::from_raw_os_error(nix::libc::ENOSPC);
        assert_eq!(Error::io("write", Path::new("/x"), full).kind(), ErrorKind::NoDiskSpace);
        let large = std::io::Error::from_raw_os_error(nix::libc::EFBIG);
        assert_eq!(Error::io("grow", Path::new("/x"), large).kind(), ErrorKind::NotSupported);
    }
}
