//! New files of objects.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{self, AtFlags, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

use super::{failure, name, parent, require_dir};
use crate::crash;
use crate::error::{IoContext, Result};
use crate::store::atomic::NEW;

/// Flags of a file that does not exist yet. `EXCL` does not follow a link, either.
pub(super) const NEW_FILE: OFlags =
    OFlags::RDWR.union(OFlags::CREATE).union(OFlags::EXCL).union(OFlags::CLOEXEC);
/// Mode of a new file: 0600.
pub(super) const PRIVATE: Mode = Mode::RUSR.union(Mode::WUSR);

/// A new file. The drop removes it, unless [`Self::keep`] or [`Self::publish`] kept it.
#[derive(Debug)]
pub struct NewFile {
    file: File,
    dir: OwnedFd,
    path: PathBuf,
    is_kept: bool,
}

/// Makes the file `path`, which is `<root>/<cid>/<file>` and must not exist, mode 0600.
///
/// # Errors
/// As [`super::names`].
pub fn create_new(path: &Path) -> Result<NewFile> {
    let dir = require_dir(parent(path))?;
    let file = fs::openat(&dir, name(path), NEW_FILE, PRIVATE)
        .map_err(|errno| failure("create", path, errno))?;
    Ok(NewFile { file: file.into(), dir, path: path.to_owned(), is_kept: false })
}

/// Writes `content` to the file `path`, as [`crate::store::atomic::write()`] does.
///
/// # Errors
/// As [`super::names`].
pub fn write(path: &Path, content: &[u8]) -> Result<()> {
    let mut new = create_new(&parent(path).join(temporary_name(NEW)))?;
    new.file.write_all(content).at("write", &new.path)?;
    new.file.sync_all().at("flush", &new.path)?;
    crash::point!("{}: new one written", name(path).display());
    fs::renameat(&new.dir, name(&new.path), &new.dir, name(path))
        .map_err(|errno| failure("replace", path, errno))?;
    new.is_kept = true;
    crash::point!("{}: replaced", name(path).display());
    super::sync_dir(parent(path))
}

/// A name that begins with `prefix` and that no other file has.
pub fn temporary_name(prefix: &str) -> String {
    let mut random = [0; 8];
    let filled = getrandom(&mut random, GetRandomFlags::empty());
    // The kernel never returns fewer than 256 requested bytes: getrandom(2).
    assert_eq!(filled, Ok(random.len()), "getrandom");
    format!("{prefix}{:016x}", u64::from_ne_bytes(random))
}

impl NewFile {
    /// The open file.
    pub fn as_file(&self) -> &File {
        &self.file
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Keeps it under its name.
    #[must_use]
    pub fn keep(mut self) -> Self {
        self.is_kept = true;
        self
    }

    /// Removes its name, and returns the open file.
    ///
    /// # Errors
    /// Those of unlink(2).
    pub fn unnamed(mut self) -> Result<File> {
        self.is_kept = true;
        fs::unlinkat(&self.dir, name(&self.path), AtFlags::empty())
            .map_err(|errno| failure("remove", &self.path, errno))?;
        self.file.try_clone().at("duplicate", &self.path)
    }

    /// Renames it to `to`, in the same directory. `false`: there is a file of that name.
    ///
    /// # Errors
    /// Those of rename(2).
    pub fn publish(mut self, to: &Path) -> Result<bool> {
        let (dir, from) = (&self.dir, name(&self.path));
        let renamed = match fs::renameat_with(dir, from, dir, name(to), RenameFlags::NOREPLACE) {
            // NFS has no such rename. The drop removes the first name.
            Err(Errno::INVAL | Errno::NOSYS) => {
                return match fs::linkat(dir, from, dir, name(to), AtFlags::empty()) {
                    Err(Errno::EXIST) => Ok(false),
                    linked => linked.map(|()| true).map_err(|errno| failure("create", to, errno)),
                };
            }
            renamed => renamed,
        };
        match renamed {
            Err(Errno::EXIST) => Ok(false),
            renamed => {
                renamed.map_err(|errno| failure("create", to, errno))?;
                self.is_kept = true;
                Ok(true)
            }
        }
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.is_kept {
            let _ = fs::unlinkat(&self.dir, name(&self.path), AtFlags::empty());
        }
    }
}
