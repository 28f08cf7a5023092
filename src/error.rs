//! The error type of this program.
//!
//! An [`Error`] has a kind that callers match on, a message that names the thing and its path, an
//! optional hint for the operator and an optional source. A module whose callers distinguish more
//! failures has its own enum (`qmp::MonitorError`, `image::ImageError`, …) and converts it to an
//! [`Error`] where only the kind matters.
//!
//! Wording: lower case, no full stop, the thing and the path in quotes, the source not repeated. A
//! message never quotes a secret (env, agent settings, keys); [`Expected`](crate::schema::Expected)
//! decides for values of documents.

use std::fmt::Display;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

type Source = Box<dyn std::error::Error + Send + Sync>;

/// The kind of a failure, for callers that act on it. `rpc::response` maps each kind to one
/// `Bosh::Clouds` type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ErrorKind {
    /// The request is invalid: wrong JSON, number of arguments, type or value.
    BadRequest,
    /// The configuration file, a template or a profile is invalid.
    BadConfig,
    /// The method is unknown, or this version does not implement it.
    NotImplemented,
    /// The method exists but cannot do this. It changed nothing.
    NotSupported,
    /// The VM does not exist.
    VmNotFound,
    /// The disk does not exist.
    DiskNotFound,
    /// The stemcell does not exist.
    StemcellNotFound,
    /// The network does not exist.
    NetworkNotFound,
    /// A filesystem is full.
    NoDiskSpace,
    /// The host lacks memory for a VM.
    NotEnoughMemory {
        /// Whether the host has the memory as soon as VMs that are being deleted have ended.
        #[serde(rename = "passing")]
        temporary: bool,
    },
    /// The host has more VMs of the VM's anti-affinity group than when the scheduler chose it. The
    /// scheduler chooses again.
    #[serde(rename = "Crowded")]
    StalePlacement,
    /// The create of a VM failed, and all its resources are removed.
    VmCreationFailed {
        /// Whether the Director should repeat the call at once: it may succeed.
        retry: bool,
    },
    /// Another object or program uses what the call needs: a disk that is attached, a bridge that
    /// the CPI did not make.
    Conflict,
    /// A deadline passed.
    Timeout,
    /// A file in the state directory is damaged.
    Corrupt,
    /// The host failed: a system call, a program, a missing device.
    Host,
    /// A bug of this program.
    Internal,
}

/// A failure, with a kind, a message, and an optional hint and source.
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
    /// A failure with a kind and a message.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None, source: None }
    }

    /// `action` on `path` failed with `error`. A full filesystem becomes
    /// [`ErrorKind::NoDiskSpace`].
    pub fn io(action: impl Display, path: &Path, error: std::io::Error) -> Self {
        let kind = io_kind(&error);
        Self::new(kind, format!("{action} '{}'", path.display())).because(error)
    }

    /// A system call without a path failed with `error`.
    pub fn os(action: impl Into<String>, error: impl Into<std::io::Error>) -> Self {
        let error = error.into();
        Self::new(io_kind(&error), action).because(error)
    }

    /// Sets the source: the failure that caused this one.
    #[must_use]
    pub fn because(mut self, source: impl Into<Source>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Sets the hint: the operator's next step.
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

    /// Wraps the failure into the action that failed because of it. Keeps kind and hint.
    #[must_use]
    pub fn during(mut self, doing: impl Into<String>) -> Self {
        let hint = self.hint.take();
        let outer = Self::new(self.kind, doing).because(self);
        Self { hint, ..outer }
    }

    /// Its kind.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Whether it or one of its sources is a lack of memory or disk space. Another host may have
    /// enough.
    pub fn lacks_room(&self) -> bool {
        self.has_kind(|kind| {
            matches!(kind, ErrorKind::NoDiskSpace | ErrorKind::NotEnoughMemory { .. })
        })
    }

    /// Whether it or one of its sources is [`ErrorKind::StalePlacement`].
    pub fn is_stale_placement(&self) -> bool {
        self.has_kind(|kind| kind == ErrorKind::StalePlacement)
    }

    /// Whether the kind of it or of one of its sources matches.
    fn has_kind(&self, matches: impl Fn(ErrorKind) -> bool) -> bool {
        let sources =
            std::iter::successors(std::error::Error::source(self), |error| error.source());
        matches(self.kind)
            || sources
                .filter_map(|error| error.downcast_ref::<Self>())
                .any(|error| matches(error.kind))
    }

    /// Its hint.
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// The message and those of all sources, on one line.
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

    /// [`Self::chain`], then the hint on a line of its own.
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
        // The image is larger than the filesystem's largest file: 16 TiB on ext4. Another pool may
        // support it.
        std::io::ErrorKind::FileTooLarge => ErrorKind::NotSupported,
        _ => ErrorKind::Host,
    }
}

/// Adds the action and the path to an `io::Error`, whose message names neither.
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
    fn a_lack_of_room_is_found_among_the_sources() {
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
