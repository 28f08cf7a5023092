//! Image formats: qcow2 headers, empty images, copies, stemcell import, FAT config drives.
//!
//! ```text
//! import ──▶ qcow2 (header, create, decode)     fat
//!    └─────▶ qemu_img (conversion, LUKS)        raw ◀─── import
//! create ──▶ qcow2, raw, qemu_img
//! ```
//!
//! This module works on paths and bytes. It knows no BOSH method, no record and no running QEMU. It
//! never probes the format of an image that a guest could have written: the caller states the
//! format.

mod copy;
mod create;
pub mod fat;
mod grow;
pub mod import;
mod lock;
mod open;
pub mod qcow2;
pub mod qemu_img;
pub mod raw;
#[cfg(test)]
mod testing;

pub use copy::{CopySource, copy};
pub use grow::{grow, virtual_size};
pub use lock::{ensure_unlocked, wait_unlocked};
pub use open::{ensure_no_external_files, inspect, open};
pub use qemu_img::NewImage;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use tempfile::{NamedTempFile, TempPath};

use crate::crash;
use crate::error::{IoContext, Result};
pub use crate::store::record::Format;

/// Creates `path`, which must not exist, with mode 0600. The file is removed on drop unless
/// [`keep`] is called.
fn create_new(path: &Path) -> Result<NamedTempFile> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .at("create", path)?;
    crash::point!("{}: created", path.file_name().unwrap_or_default().display());
    let guard = TempPath::try_from_path(path).at("create", path)?;
    Ok(NamedTempFile::from_parts(file, guard))
}

/// A file whose content is complete but not yet synced to the disk.
#[derive(Debug)]
#[must_use = "a power cut loses the content of a file that is not synced"]
pub struct UnsyncedFile {
    file: File,
    path: PathBuf,
}

impl UnsyncedFile {
    /// Makes the content durable. The caller syncs the directory that holds the name.
    pub fn sync(self) -> Result<()> {
        self.file.sync_all().at("fsync", &self.path)?;
        crash::point!("{}: durable", self.path.file_name().unwrap_or_default().display());
        Ok(())
    }
}

/// Makes the content of `path` and its name durable.
pub fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).at("fsync", path)?;
    sync_parent(path)
}

/// Keeps a new file under its name, so that a drop no longer removes it.
fn keep(new: NamedTempFile) -> Result<UnsyncedFile> {
    let path = new.path().to_owned();
    let (file, path) = new.keep().map_err(|error| error.error).at("keep", &path)?;
    crash::point!("{}: complete", path.file_name().unwrap_or_default().display());
    Ok(UnsyncedFile { file, path })
}

/// Makes the names in the directory of `path` durable.
fn sync_parent(path: &Path) -> Result<()> {
    let parent = parent_of(path);
    File::open(parent).and_then(|directory| directory.sync_all()).at("fsync directory", parent)
}

/// The directory that contains `path`.
fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
