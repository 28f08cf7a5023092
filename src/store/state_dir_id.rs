//! Which state directory something belongs to: what is in the kernel, and the run directory.

use std::fmt;
use std::io::ErrorKind::{AlreadyExists, NotFound};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use super::{Store, atomic};
use crate::error::{Error, ErrorKind, IoContext, Result};

/// A word for one state directory: its filesystem's number and its own. What bears it lives in the kernel and is gone after
/// a reboot, so both stay what they are for as long as it matters; a copy of the directory is another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateDirId(String);

impl StateDirId {
    /// The word, of hexadecimal digits and a dot.
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
    /// The word for this state directory, which must be there.
    pub fn state_dir_id(&self) -> Result<StateDirId> {
        let meta = self.state_dir().metadata().at("look at", self.state_dir())?;
        Ok(StateDirId(format!("{:x}.{:x}", meta.dev(), meta.ino())))
    }

    /// Makes sure that the run directory goes with this state directory and no other: what runs there is looked for in
    /// the records here.
    ///
    /// # Errors
    /// As [`Self::ensure_run_dir_matches`].
    pub fn bind_run_dir(&self) -> Result<()> {
        atomic::make_dir(self.run_dir())?;
        let link = self.run_dirs_owner();
        match symlink(self.state_dir(), &link) {
            Err(error) if error.kind() == AlreadyExists => self.ensure_run_dir_matches(),
            made => made.at("make", &link),
        }
    }

    /// Whether the run directory goes with this state directory, or with none yet. Needs no write.
    ///
    /// # Errors
    /// [`ErrorKind::BadConfig`] naming the other state directory, [`ErrorKind::Corrupt`] if that can not be told.
    pub fn ensure_run_dir_matches(&self) -> Result<()> {
        let link = self.run_dirs_owner();
        let owner = match std::fs::read_link(&link) {
            Err(error) if error.kind() == NotFound => return Ok(()),
            owner => owner.at("read", &link).map_err(|error| {
                let hint = format!(
                    "it must be a link to '{}': remove it and repeat the call",
                    self.state_dir().display()
                );
                error.with_kind(ErrorKind::Corrupt).hint(hint)
            })?,
        };
        let same = |a: &Path, b: &Path| {
            a == b || (a.exists() && a.canonicalize().ok() == b.canonicalize().ok())
        };
        if same(&owner, self.state_dir()) {
            return Ok(());
        }
        let (run_dir, owner, ours) =
            (self.run_dir().display(), owner.display(), self.state_dir().display());
        Err(Error::new(
            ErrorKind::BadConfig,
            format!("run_dir '{run_dir}' goes with state_dir '{owner}', not '{ours}'"),
        )
        .hint(format!("give each state_dir a run_dir of its own; if it was moved and no VM runs, remove '{run_dir}'")))
    }

    fn run_dirs_owner(&self) -> PathBuf {
        self.run_dir().join("state")
    }
}
