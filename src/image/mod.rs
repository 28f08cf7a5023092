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

use std::path::Path;

use crate::crash;
use crate::error::{IoContext, Result};
use crate::store::beneath::{self, Expected, NewFile};
pub use crate::store::record::Format;

/// Creates `path`, which must not exist, with mode 0600. The file is removed on drop unless
/// [`keep`] is called.
fn create_new(path: &Path) -> Result<NewFile> {
    let new = beneath::create_new(path)?;
    crash::point!("{}: created", path.file_name().unwrap_or_default().display());
    Ok(new)
}

/// A file whose content is complete but not yet synced to the disk.
#[derive(Debug)]
#[must_use = "a power cut loses the content of a file that is not synced"]
pub struct UnsyncedFile(NewFile);

impl UnsyncedFile {
    /// Makes the content durable. The caller syncs the directory that holds the name.
    pub fn sync(self) -> Result<()> {
        let path = self.0.path();
        self.0.as_file().sync_all().at("fsync", path)?;
        crash::point!("{}: durable", path.file_name().unwrap_or_default().display());
        Ok(())
    }
}

/// Makes the content of `path` and its name durable.
pub fn sync(path: &Path) -> Result<()> {
    sync_data(path)?;
    beneath::sync_dir(parent_of(path))
}

/// Makes the content of `path` durable.
pub fn sync_data(path: &Path) -> Result<()> {
    beneath::file(path, Expected::Own)?.read()?.sync_all().at("fsync", path)
}

/// Keeps a new file under its name, so that a drop no longer removes it.
fn keep(new: NewFile) -> UnsyncedFile {
    let new = new.keep();
    crash::point!("{}: complete", new.path().file_name().unwrap_or_default().display());
    UnsyncedFile(new)
}

/// The directory that contains `path`.
fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
