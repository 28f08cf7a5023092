//! A line of somebody's `authorized_keys`.

use std::fmt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Step, below};
use crate::error::{IoContext, Result};
use crate::store::atomic;

/// A key with what it may start.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct AuthorizedKey {
    /// The file.
    pub file: PathBuf,
    /// The line: options, kind, key and comment.
    pub line: String,
}

impl fmt::Display for AuthorizedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the key in {}", self.file.display())
    }
}

impl AuthorizedKey {
    /// What it needs, `older` being keys of ours that it replaces. `None` if the key is there with other rights.
    pub(super) fn step(&self, root: &Path, older: &[Self]) -> Result<Option<Step>> {
        let lines = self.lines(root)?;
        let replaced: Vec<_> =
            older.iter().filter(|old| lines.contains(&old.line)).map(Self::in_short).collect();
        let said = format!("{self}, in place of {}", replaced.join(", "));
        if lines.contains(&self.line) {
            let is_all = replaced.is_empty();
            return Ok(Some(if is_all {
                Step::Keep(self.to_string())
            } else {
                Step::Replace(said)
            }));
        }
        let mut theirs = lines.iter().filter(|line| !older.iter().any(|old| old.line == **line));
        let is_known =
            theirs.any(|line| line.split_ascii_whitespace().any(|word| word == self.key()));
        let step =
            if replaced.is_empty() { Step::Add(self.to_string()) } else { Step::Replace(said) };
        Ok((!is_known).then_some(step))
    }

    /// Puts it there, in place of `older`.
    pub(super) fn add(&self, root: &Path, older: &[Self]) -> Result<()> {
        let before = self.lines(root)?;
        let mut lines = before.clone();
        lines.retain(|line| !older.iter().any(|old| old.line == *line));
        if !lines.contains(&self.line) {
            lines.push(self.line.clone());
        }
        if lines == before { Ok(()) } else { self.write(root, &lines) }
    }

    /// What was done.
    pub(super) fn remove(&self, root: &Path) -> Result<String> {
        let mut lines = self.lines(root)?;
        let before = lines.len();
        lines.retain(|line| *line != self.line);
        if lines.len() == before {
            return Ok(format!("! {self} was changed since, and stays"));
        }
        self.write(root, &lines)?;
        Ok(format!("- {self}"))
    }

    fn key(&self) -> &str {
        self.line.split(' ').find(|word| word.starts_with("AAAA")).unwrap_or_default()
    }

    /// The key by its end, which tells keys apart.
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

    /// Everything else of the file stays: its owner, its mode, its other lines.
    fn write(&self, root: &Path, lines: &[String]) -> Result<()> {
        let path = below(root, &self.file);
        let dir = path.parent().expect("a file is in a directory");
        if !dir.exists() {
            std::fs::create_dir_all(dir).at("make directory", dir)?;
            std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))
                .at("protect", dir)?;
            // Of the user whose home it is in.
            if let Some(home) = dir.parent() {
                let owner = home.metadata().at("look at", home)?;
                std::os::unix::fs::chown(dir, Some(owner.uid()), Some(owner.gid()))
                    .at("give away", dir)?;
            }
        }
        let (mode, uid, gid) = match path.metadata() {
            Ok(meta) => (meta.mode() & 0o777, meta.uid(), meta.gid()),
            Err(_) => {
                dir.metadata().map(|meta| (0o600, meta.uid(), meta.gid())).at("look at", dir)?
            }
        };
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        atomic::write_as(&path, text.as_bytes(), mode, Some((uid, gid)))
    }
}
