//! Files below a directory whose other writers may be hostile: a pool is written by other hosts,
//! by its server and by that server's clients.
//!
//! ```text
//!   <root>/            the operator's directory, or one of the state directory: links are followed
//!     <cid>/           below it: no link at any component, the same mount
//!       <file>         a regular file, and with one name if only one object has it
//! ```
//!
//! Only this module opens, links, renames or lists such files. A file is first opened with
//! `O_PATH`, which neither waits for the writer of a FIFO nor calls a device's driver, and checked.
//! All access is then through that descriptor, so a file that replaces the checked one is not used.

mod new_file;

use std::ffi::OsStr;
use std::fs::{File, Metadata, OpenOptions};
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::libc;
use rustix::fs::{self, AtFlags, CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::crash;
use crate::error::{Error, ErrorKind, IoContext, Result};

use new_file::{NEW_FILE, PRIVATE};
pub use new_file::{NewFile, create_new, temporary_name, write};

/// Most names that an object's directory may have. Each object has fewer than ten files.
const MOST_NAMES: usize = 1000;
/// How a path below the root is resolved.
const RESOLVE: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_XDEV);

/// Which file is expected at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// A file of one object, with one name (hard link). Another name could be a file of the host.
    Own,
    /// A stemcell's image, which has a name in the directory of each of its VMs.
    Shared,
    /// A file that the operator names, such as a light stemcell's image: links are followed.
    OfOperator,
}

/// A regular file that was checked. It stays the same file whatever its path comes to name.
#[derive(Debug)]
pub struct Found {
    handle: File,
    path: PathBuf,
    meta: Metadata,
}

/// The file `path`, which is `<root>/<cid>/<file>` unless it is the operator's; `None` if it does
/// not exist.
///
/// # Errors
/// [`ErrorKind::Corrupt`] naming the path for a link at any component below the root, a file that
/// is not regular, on another mount, or with another number of names than expected.
pub fn find(path: &Path, expected: Expected) -> Result<Option<Found>> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let opened = if expected == Expected::OfOperator {
        fs::openat(CWD, path, flags, Mode::empty())
    } else {
        let root = grandparent(path);
        let Some(open) = open_root(root)? else { return Ok(None) };
        let below = path.strip_prefix(root).expect("a path begins with its ancestor");
        fs::openat2(&open, below, flags, Mode::empty(), RESOLVE)
    };
    let handle = match opened {
        Err(Errno::NOENT) => return Ok(None),
        opened => File::from(opened.map_err(|errno| failure("open", path, errno))?),
    };
    let meta = handle.metadata().at("stat", path)?;
    if !meta.is_file() {
        return Err(refused(path, "is not a regular file"));
    }
    if expected == Expected::Own && meta.nlink() != 1 {
        return Err(refused(path, &format!("has {} names (hard links), not one", meta.nlink())));
    }
    Ok(Some(Found { handle, path: path.to_owned(), meta }))
}

/// As [`find`], of a file that must exist.
///
/// # Errors
/// As [`find`].
pub fn file(path: &Path, expected: Expected) -> Result<Found> {
    find(path, expected)?.ok_or_else(|| Error::io("open", path, Errno::NOENT.into()))
}

/// The metadata of the file `path`, however many names it has.
///
/// # Errors
/// As [`file()`].
pub fn metadata(path: &Path) -> Result<Metadata> {
    file(path, Expected::Shared).map(|found| found.meta)
}

impl Found {
    /// Its path when it was found, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its metadata when it was found.
    pub fn metadata(&self) -> &Metadata {
        &self.meta
    }

    /// Opens it for reading.
    pub fn read(&self) -> Result<File> {
        self.open(false, 0).at("open", &self.path)
    }

    /// Opens it for reading and writing.
    pub fn write(&self) -> Result<File> {
        self.open(true, 0).at("open", &self.path)
    }

    /// Opens it with additional flags of open(2).
    pub fn open(&self, writable: bool, flags: libc::c_int) -> std::io::Result<File> {
        let path = format!("/proc/self/fd/{}", self.handle.as_raw_fd());
        OpenOptions::new().read(true).write(writable).custom_flags(flags).open(path)
    }

    /// The descriptor of it, opened with `O_PATH`, for a child to inherit.
    pub fn handle(&self) -> &File {
        &self.handle
    }
}

/// The content of the file `path`, which has one name and at most `most` bytes.
///
/// # Errors
/// As [`file()`]; [`ErrorKind::Corrupt`] for a larger file.
pub fn read(path: &Path, most: u64) -> Result<Vec<u8>> {
    let mut content = Vec::new();
    file(path, Expected::Own)?.read()?.take(most + 1).read_to_end(&mut content).at("read", path)?;
    if content.len() as u64 > most {
        return Err(refused(path, &format!("has more than {most} bytes")));
    }
    Ok(content)
}

/// Whether the directory of `path` has that name, whatever it is.
///
/// # Errors
/// As [`names`].
pub fn entry_exists(path: &Path) -> Result<bool> {
    let Some(dir) = open_dir(parent(path))? else { return Ok(false) };
    match fs::statat(&dir, name(path), AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => Ok(false),
        found => found.map(|_| true).map_err(|errno| failure("stat", path, errno)),
    }
}

/// The names in the directory `dir`, which is `<root>/<cid>`, that are UTF-8; none if it does not
/// exist.
///
/// # Errors
/// [`ErrorKind::Corrupt`] if it is not a directory or a link, or has more names than an object has.
pub fn names(dir: &Path) -> Result<Vec<String>> {
    let Some(open) = open_dir(dir)? else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for entry in fs::Dir::new(open).map_err(|errno| failure("list", dir, errno))? {
        let entry = entry.map_err(|errno| failure("list", dir, errno))?;
        let name = entry.file_name().to_str().ok().filter(|name| !matches!(*name, "." | ".."));
        found.extend(name.map(str::to_owned));
        if found.len() > MOST_NAMES {
            return Err(refused(dir, &format!("has more than {MOST_NAMES} files")));
        }
    }
    Ok(found)
}

/// Makes the directory `dir`, which is `<root>/<cid>`, mode 0700, if it does not exist. Durable
/// when it returns.
///
/// # Errors
/// As [`names`].
pub fn make_dir(dir: &Path) -> Result<()> {
    let root = parent(dir);
    let open = File::open(root).at("open", root)?;
    match fs::mkdirat(&open, name(dir), Mode::RWXU) {
        Ok(()) => {}
        Err(Errno::EXIST) => return require_dir(dir).map(drop),
        Err(errno) => return Err(failure("make directory", dir, errno)),
    }
    crash::point!("directory made");
    open.sync_all().at("flush directory", root)
}

/// Makes the names in the directory `dir`, which is `<root>/<cid>`, durable.
///
/// # Errors
/// As [`names`].
pub fn sync_dir(dir: &Path) -> Result<()> {
    File::from(require_dir(dir)?).sync_all().at("flush directory", dir)
}

/// Makes the empty file `path` directly below its root, mode 0600, if no file is there.
///
/// # Errors
/// [`ErrorKind::Corrupt`] for anything but a file; [`ErrorKind::Host`] if it cannot be written.
pub fn make_marker(path: &Path) -> Result<()> {
    let root = parent(path);
    let open = open_root(root)?.ok_or_else(|| Error::io("open", root, Errno::NOENT.into()))?;
    match fs::openat(&open, name(path), NEW_FILE, PRIVATE) {
        Ok(_) => Ok(()),
        Err(Errno::EXIST) if path.symlink_metadata().is_ok_and(|meta| meta.is_file()) => Ok(()),
        Err(Errno::EXIST) => Err(refused(path, "is not a regular file")),
        Err(errno) => Err(failure("make", path, errno)),
    }
}

/// Renames a file in the directory `dir`, which is `<root>/<cid>`. `false`: there is none called
/// `from`.
///
/// # Errors
/// As [`names`].
pub fn rename(dir: &Path, from: &str, to: &str) -> Result<bool> {
    let open = require_dir(dir)?;
    match fs::renameat(&open, from, &open, to) {
        Ok(()) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(errno) => Err(failure("make", &dir.join(to), errno)),
    }
}

/// Gives the stemcell's image `from` the second name `to`.
///
/// # Errors
/// As [`file()`], and then `to` does not exist.
pub fn hard_link(from: &Path, to: &Path) -> Result<()> {
    let (source, target) = (require_dir(parent(from))?, require_dir(parent(to))?);
    let image = file(from, Expected::Shared)?;
    fs::linkat(&source, name(from), &target, name(to), AtFlags::empty()).map_err(|errno| {
        let action = format!("link the stemcell's image '{}' to", from.display());
        match errno {
            Errno::XDEV => Error::io(action, to, errno.into())
                .hint("stemcells and VMs of a pool or state directory must be on one filesystem"),
            errno => failure(&action, to, errno),
        }
    })?;
    // The name may have come to be another file's since the check.
    let inode = |meta: &Metadata| (meta.dev(), meta.ino());
    let linked = file(to, Expected::Shared)?;
    if inode(&linked.meta) == inode(&image.meta) {
        return Ok(());
    }
    remove_file(to)?;
    Err(refused(from, "was replaced while it was linked"))
}

/// Removes the file `path` if it exists. A link is removed itself.
///
/// # Errors
/// As [`names`].
pub fn remove_file(path: &Path) -> Result<()> {
    let Some(dir) = open_dir(parent(path))? else { return Ok(()) };
    match fs::unlinkat(&dir, name(path), AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(failure("remove", path, errno)),
    }
}

fn open_root(root: &Path) -> Result<Option<OwnedFd>> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match fs::openat(CWD, root, flags, Mode::empty()) {
        Err(Errno::NOENT) => Ok(None),
        opened => opened.map(Some).map_err(std::io::Error::from).at("open", root),
    }
}

/// The directory `dir`, which is `<root>/<cid>`; `None` if it does not exist.
fn open_dir(dir: &Path) -> Result<Option<OwnedFd>> {
    let Some(root) = open_root(parent(dir))? else { return Ok(None) };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match fs::openat2(&root, name(dir), flags, Mode::empty(), RESOLVE) {
        Err(Errno::NOENT) => Ok(None),
        opened => opened.map(Some).map_err(|errno| failure("open", dir, errno)),
    }
}

fn require_dir(dir: &Path) -> Result<OwnedFd> {
    open_dir(dir)?.ok_or_else(|| Error::io("open directory", dir, Errno::NOENT.into()))
}

fn parent(path: &Path) -> &Path {
    path.parent().expect("an object's file has a parent")
}

fn grandparent(path: &Path) -> &Path {
    parent(parent(path))
}

fn name(path: &Path) -> &OsStr {
    path.file_name().expect("an object's file has a name")
}

fn failure(action: &str, path: &Path, errno: Errno) -> Error {
    match errno {
        Errno::LOOP => refused(path, "is a symbolic link, or is behind one"),
        Errno::XDEV => refused(path, "is on another mount than the directory above it"),
        Errno::NOTDIR => refused(path, "is not a directory, or a part of its path is not"),
        Errno::NOSYS => Error::io(action, path, errno.into())
            .hint("the program needs openat2(2): use Linux 5.6 or later"),
        _ => Error::io(action, path, errno.into()),
    }
}

fn refused(path: &Path, why: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("'{}' {why}", path.display())).hint(
        "this program did not make it so: find out who writes there, and restore the file or \
         directory",
    )
}

#[cfg(test)]
mod tests;
