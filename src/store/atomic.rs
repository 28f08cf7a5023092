//! Files that are whole or not there, also after a power cut.

use std::fs::{DirBuilder, File, Permissions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::crash;
use crate::error::{IoContext, Result};

/// How the names of files begin that are not whole yet.
pub const NEW: &str = ".new-";

/// Writes `contents` to `path`, mode 0600: a temporary file beside it, fsync, rename, fsync of the directory. When
/// this returns, the file survives a power cut; before, the old one does.
pub fn write(path: &Path, contents: &[u8]) -> Result<()> {
    stage(path, contents)?.commit()
}

/// The same with another mode, and of another owner: a user and a group.
pub fn write_as(path: &Path, contents: &[u8], mode: u32, owner: Option<(u32, u32)>) -> Result<()> {
    let staged = stage(path, contents)?;
    let file = staged.file.as_file();
    if let Some((user, group)) = owner {
        std::os::unix::fs::fchown(file, Some(user), Some(group))
            .at("give away", staged.file.path())?;
    }
    file.set_permissions(Permissions::from_mode(mode)).at("set the mode of", staged.file.path())?;
    file.sync_all().at("flush", staged.file.path())?;
    staged.commit()
}

/// The same, unless there is such a file: then that stays.
pub fn write_once(path: &Path, contents: &[u8]) -> Result<()> {
    let Staged { file, path } = stage(path, contents)?;
    match file.persist_noclobber(&path) {
        Err(error) if error.error.kind() == std::io::ErrorKind::AlreadyExists => {}
        made => drop(made.map_err(|e| e.error).at("make", &path)?),
    }
    sync_dir(parent(&path))
}

/// As [`stage`], of JSON that people can read, too.
pub fn stage_json(path: &Path, value: &impl Serialize) -> Result<Staged> {
    let mut text = serde_json::to_vec_pretty(value).expect("what we write is plain data");
    text.push(b'\n');
    stage(path, &text)
}

/// As [`write()`], of JSON that people can read, too.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    stage_json(path, value)?.commit()
}

/// Contents that are on the disk and not yet at their path. Dropped, they are gone.
#[must_use = "nothing is written before it is committed"]
pub struct Staged {
    file: tempfile::NamedTempFile,
    path: PathBuf,
}

/// The first half of [`write()`], after which no full filesystem can get in the way of the second.
pub fn stage(path: &Path, contents: &[u8]) -> Result<Staged> {
    let directory = parent(path);
    // tempfile makes it with mode 0600 and removes it unless it is persisted.
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
    /// The second half.
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

/// Makes the names in `directory` survive a power cut.
pub fn sync_dir(directory: &Path) -> Result<()> {
    File::open(directory).and_then(|dir| dir.sync_all()).at("flush directory", directory)
}

/// Makes `directory` and those of its parents that are missing, mode 0700, each with a durable name.
pub fn make_dir(directory: &Path) -> Result<()> {
    if directory.is_dir() {
        return Ok(());
    }
    let parent = parent(directory);
    make_dir(parent)?;
    match DirBuilder::new().mode(0o700).create(directory) {
        // Another call was faster.
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists && directory.is_dir() => {}
        made => made.at("make directory", directory)?,
    }
    crash::point!("directory made");
    sync_dir(parent)
}

/// Whether there is anything at `path`, a link to nothing included.
pub fn entry_exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// Whether a path that was not found is a link to nothing. A file that is there a moment later was made meanwhile.
pub fn is_symlink(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|meta| meta.is_symlink())
}

/// The names in `dir` that are UTF-8, as all of ours are; none if it is not there.
pub(super) fn names(dir: &Path) -> Result<Vec<String>> {
    let entries = match dir.read_dir() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.at("list", dir)?,
    };
    let names = entries.map(|entry| entry.map(|entry| entry.file_name().into_string().ok()));
    names.filter_map(Result::transpose).collect::<std::io::Result<_>>().at("list", dir)
}

/// Removes `path` if it is there.
pub fn remove_file(path: &Path) -> Result<()> {
    absent_is_fine(std::fs::remove_file(path)).at("remove", path)
}

/// Removes `directory` with all in it if it is there.
pub fn remove_dir(directory: &Path) -> Result<()> {
    absent_is_fine(std::fs::remove_dir_all(directory)).at("remove directory", directory)
}

fn absent_is_fine(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_whole_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record.json");
        write(&path, b"one").unwrap();
        write(&path, b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(dir.path().read_dir().unwrap().count(), 1, "nothing left beside it");
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
