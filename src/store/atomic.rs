//! Atomic and durable changes to files: after a power cut, a file has its old content or its new
//! one.

use std::fs::{DirBuilder, File, Permissions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::crash;
use crate::error::{IoContext, Result};

/// Prefix of the names of temporary files.
pub const NEW: &str = ".new-";

/// Writes `contents` to `path`, mode 0600: a temporary file beside it, fsync, rename, fsync of the
/// directory. The new file is durable when this returns. Until then, a power cut leaves the old
/// one.
pub fn write(path: &Path, contents: &[u8]) -> Result<()> {
    stage(path, contents)?.commit()
}

/// As [`write()`], with a mode and an owner (uid, gid).
pub fn write_as(path: &Path, contents: &[u8], mode: u32, owner: Option<(u32, u32)>) -> Result<()> {
    let staged = stage(path, contents)?;
    let file = staged.file.as_file();
    if let Some((user, group)) = owner {
        std::os::unix::fs::fchown(file, Some(user), Some(group))
            .at("set the owner of", staged.file.path())?;
    }
    file.set_permissions(Permissions::from_mode(mode)).at("set the mode of", staged.file.path())?;
    file.sync_all().at("flush", staged.file.path())?;
    staged.commit()
}

/// As [`write()`], but an existing file is kept.
pub fn write_once(path: &Path, contents: &[u8]) -> Result<()> {
    let Staged { file, path } = stage(path, contents)?;
    match file.persist_noclobber(&path) {
        Err(error) if error.error.kind() == std::io::ErrorKind::AlreadyExists => {}
        made => drop(made.map_err(|e| e.error).at("make", &path)?),
    }
    sync_dir(parent(&path))
}

/// As [`stage`], of indented JSON.
pub fn stage_json(path: &Path, value: &impl Serialize) -> Result<Staged> {
    stage(path, &json(value))
}

/// `value` as indented JSON.
pub(super) fn json(value: &impl Serialize) -> Vec<u8> {
    let mut text = serde_json::to_vec_pretty(value).expect("a record is plain data");
    text.push(b'\n');
    text
}

/// As [`write()`], of indented JSON.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    stage_json(path, value)?.commit()
}

/// Contents in a durable temporary file, not yet at their path. The drop discards them.
#[must_use = "the file is replaced by commit() only"]
pub struct Staged {
    file: tempfile::NamedTempFile,
    path: PathBuf,
}

/// The first half of [`write()`]: all steps that a full filesystem can fail.
pub fn stage(path: &Path, contents: &[u8]) -> Result<Staged> {
    let directory = parent(path);
    // tempfile makes the file with mode 0600 and removes it on drop.
    let mut file = tempfile::Builder::new()
        .prefix(NEW)
        .tempfile_in(directory)
        .at("make a file in", directory)?;
    file.write_all(contents).at("write", file.path())?;
    file.as_file().sync_all().at("flush", file.path())?;
    crash::point!("{}: new one written", path.file_name().unwrap_or_default().display());
    Ok(Staged { file, path: path.to_owned() })
}

impl Staged {
    /// The second half of [`write()`]: replaces the file at the path. Durable when it returns.
    pub fn commit(self) -> Result<()> {
        let Self { file, path } = self;
        file.persist(&path).map_err(|e| e.error).at("replace", &path)?;
        crash::point!("{}: replaced", path.file_name().unwrap_or_default().display());
        sync_dir(parent(&path))
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().expect("a file in the state directory has a parent")
}

/// Makes the names in `directory` durable.
pub fn sync_dir(directory: &Path) -> Result<()> {
    File::open(directory).and_then(|dir| dir.sync_all()).at("flush directory", directory)
}

/// Makes `directory` and its missing parents, mode 0700. Durable when it returns.
pub fn make_dir(directory: &Path) -> Result<()> {
    if directory.is_dir() {
        return Ok(());
    }
    let parent = parent(directory);
    make_dir(parent)?;
    match DirBuilder::new().mode(0o700).create(directory) {
        // Another process was faster.
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists && directory.is_dir() => {}
        made => made.at("make directory", directory)?,
    }
    crash::point!("directory made");
    sync_dir(parent)
}

/// Whether the directory has an entry `path`. A dangling symlink is an entry. A path that cannot be
/// looked up counts as one: a caller that reads it gets the reason, and does not take an object for
/// deleted.
pub fn entry_exists(path: &Path) -> bool {
    use std::io::ErrorKind::{NotADirectory, NotFound};
    match path.symlink_metadata() {
        Ok(_) => true,
        Err(error) => !matches!(error.kind(), NotFound | NotADirectory),
    }
}

/// Whether `path` is a symlink. After a "not found" it tells a dangling symlink from a file that
/// another process has just made.
pub fn is_symlink(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|meta| meta.is_symlink())
}

/// The names in `dir` that are UTF-8, as all names that this program writes; none if `dir` does not
/// exist.
pub(super) fn names(dir: &Path) -> Result<Vec<String>> {
    let entries = match dir.read_dir() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.at("list", dir)?,
    };
    let names = entries.map(|entry| entry.map(|entry| entry.file_name().into_string().ok()));
    names.filter_map(Result::transpose).collect::<std::io::Result<_>>().at("list", dir)
}

/// Removes the file `path` if it exists.
pub fn remove_file(path: &Path) -> Result<()> {
    ignore_not_found(std::fs::remove_file(path)).at("remove", path)
}

/// Removes `directory` with its content if it exists.
pub fn remove_dir(directory: &Path) -> Result<()> {
    ignore_not_found(std::fs::remove_dir_all(directory)).at("remove directory", directory)
}

fn ignore_not_found(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_replaces_the_file_and_keeps_it_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record.json");
        write(&path, b"one").unwrap();
        write(&path, b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(dir.path().read_dir().unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn a_missing_directory_is_named() {
        let error = write(Path::new("/nonexistent-state/x.json"), b"").unwrap_err();
        assert!(
            error.report().starts_with("make a file in '/nonexistent-state'"),
            "{}",
            error.report()
        );
    }
}
