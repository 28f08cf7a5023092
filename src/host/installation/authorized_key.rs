//! A line in a user's `authorized_keys`.

use std::fmt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Step, below};
use crate::error::{IoContext, Result};
use crate::store::atomic;

/// An ssh key with the command it may run.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct AuthorizedKey {
    /// The `authorized_keys` file.
    pub file: PathBuf,
    /// The line: options, key type, key and comment.
    pub line: String,
}

impl fmt::Display for AuthorizedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the key in {}", self.file.display())
    }
}

impl AuthorizedKey {
    /// Returns the step that installs this line in place of the installed lines `older`. `None` if
    /// the file has the key on a line that was not installed, possibly with other options.
    pub(super) fn step(&self, root: &Path, older: &[Self]) -> Result<Option<Step>> {
        let lines = self.lines(root)?;
        let replaced: Vec<_> =
            older.iter().filter(|old| lines.contains(&old.line)).map(Self::in_short).collect();
        let replacement = format!("{self}, in place of {}", replaced.join(", "));
        if lines.contains(&self.line) {
            return Ok(Some(if replaced.is_empty() {
                Step::Keep(self.to_string())
            } else {
                Step::Replace(replacement)
            }));
        }
        let mut foreign = lines.iter().filter(|line| !older.iter().any(|old| old.line == **line));
        let is_known =
            foreign.any(|line| line.split_ascii_whitespace().any(|word| word == self.key()));
        let step = if replaced.is_empty() {
            Step::Add(self.to_string())
        } else {
            Step::Replace(replacement)
        };
        Ok((!is_known).then_some(step))
    }

    /// Writes the line into its file, in place of `older`.
    pub(super) fn add(&self, root: &Path, older: &[Self]) -> Result<()> {
        let before = self.lines(root)?;
        let mut lines = before.clone();
        lines.retain(|line| !older.iter().any(|old| old.line == *line));
        if !lines.contains(&self.line) {
            lines.push(self.line.clone());
        }
        if lines == before { Ok(()) } else { self.write(root, &lines) }
    }

    /// Removes the line from its file and returns a line for the operator that says so. A line that
    /// was changed since its installation stays.
    pub(super) fn remove(&self, root: &Path) -> Result<String> {
        let mut lines = self.lines(root)?;
        let before = lines.len();
        lines.retain(|line| *line != self.line);
        if lines.len() == before {
            return Ok(format!("! {self} was modified, so it stays"));
        }
        self.write(root, &lines)?;
        Ok(format!("- {self}"))
    }

    fn key(&self) -> &str {
        self.line.split(' ').find(|word| word.starts_with("AAAA")).unwrap_or_default()
    }

    /// Returns the last 12 characters of the key: their beginnings are alike.
    fn in_short(&self) -> String {
        let key = self.key();
        format!("…{}", &key[key.len().saturating_sub(12)..])
    }

    fn lines(&self, root: &Path) -> Result<Vec<String>> {
        let path = below(root, &self.file);
        match std::fs::read_to_string(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            text => Ok(text.at("read", &path)?.lines().map(str::to_owned).collect()),
        }
    }

    /// Writes the file with `lines`. An existing file keeps its owner and mode.
    fn write(&self, root: &Path, lines: &[String]) -> Result<()> {
        let path = below(root, &self.file);
        let dir = path.parent().expect("a file is in a directory");
        if !dir.exists() {
            std::fs::create_dir_all(dir).at("make directory", dir)?;
            std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))
                .at("protect", dir)?;
            // The directory belongs to the user whose home it is in.
            if let Some(home) = dir.parent() {
                let owner = home.metadata().at("read the owner of", home)?;
                std::os::unix::fs::chown(dir, Some(owner.uid()), Some(owner.gid()))
                    .at("change the owner of", dir)?;
            }
        }
        let (mode, uid, gid) = match path.metadata() {
            Ok(meta) => (meta.mode() & 0o777, meta.uid(), meta.gid()),
            Err(_) => dir
                .metadata()
                .map(|meta| (0o600, meta.uid(), meta.gid()))
                .at("read the owner of", dir)?,
        };
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        atomic::write_as(&path, text.as_bytes(), mode, Some((uid, gid)))
    }
}
