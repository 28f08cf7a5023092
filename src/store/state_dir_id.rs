//! The identity of a state directory. It marks what belongs to the directory: objects in the
//! kernel, the run directory.

use std::fmt;
use std::io::ErrorKind::{AlreadyExists, NotFound};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use super::{Store, atomic};
use crate::error::{Error, ErrorKind, IoContext, Result};

/// Identity of a state directory: device and inode number, in hexadecimal digits with a dot between
/// them. Only kernel objects carry it, and they do not survive a reboot, so both numbers are stable
/// for their lifetime. A copy of the directory has another identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateDirId(String);

impl StateDirId {
    /// The text: hexadecimal digits and a dot.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for StateDirId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Store {
    /// The identity of this state directory, which must exist.
    pub fn state_dir_id(&self) -> Result<StateDirId> {
        let meta = self.state_dir().metadata().at("stat", self.state_dir())?;
        Ok(StateDirId(format!("{:x}.{:x}", meta.dev(), meta.ino())))
    }

    /// Binds the run directory to this state directory, because calls look up its processes in this
    /// directory's records.
    ///
    /// # Errors
    /// As [`Self::ensure_run_dir_matches`].
    pub fn bind_run_dir(&self) -> Result<()> {
        atomic::make_dir(self.run_dir())?;
        let link = self.run_dir_link();
        match symlink(self.state_dir(), &link) {
            Err(error) if error.kind() == AlreadyExists => self.ensure_run_dir_matches(),
            made => made.at("make", &link),
        }
    }

    /// Refuses a run directory that is bound to another state directory. Writes nothing.
    ///
    /// # Errors
    /// [`ErrorKind::BadConfig`] naming the other state directory, [`ErrorKind::Corrupt`] for an
    /// unreadable symlink.
    pub fn ensure_run_dir_matches(&self) -> Result<()> {
        let link = self.run_dir_link();
        let bound = match std::fs::read_link(&link) {
            Err(error) if error.kind() == NotFound => return Ok(()),
            target => target.at("read", &link).map_err(|error| {
                let hint = format!(
                    "it must be a symlink to '{}': remove it and repeat the call",
                    self.state_dir().display()
                );
                error.with_kind(ErrorKind::Corrupt).hint(hint)
            })?,
        };
        let same = |a: &Path, b: &Path| {
            a == b || (a.exists() && a.canonicalize().ok() == b.canonicalize().ok())
        };
        if same(&bound, self.state_dir()) {
            return Ok(());
        }
        let (run_dir, other, own) =
            (self.run_dir().display(), bound.display(), self.state_dir().display());
        Err(Error::new(
            ErrorKind::BadConfig,
            format!("run_dir '{run_dir}' belongs to state_dir '{other}', not '{own}'"),
        )
        .hint(format!(
            "give each state_dir its own run_dir; if the state_dir was moved and no VM \
                       runs, remove '{run_dir}'"
        )))
    }

    fn run_dir_link(&self) -> PathBuf {
        self.run_dir().join("state")
    }
}
