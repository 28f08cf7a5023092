//! Where an import writes the image, and the space it has for that.

use std::cell::Cell;
use std::fs::File;
use std::path::Path;

use crate::error::{IoContext, Result};
use crate::image::raw;
use crate::units::Bytes;

/// Grants space for at least so many more bytes. Returns how many it grants.
///
/// # Errors
/// [`NoDiskSpace`](crate::error::ErrorKind::NoDiskSpace).
pub type Grant<'a> = &'a dyn Fn(Bytes) -> Result<Bytes>;

/// Where an import writes the image.
pub(super) struct Output<'a> {
    /// The raw file.
    pub raw: &'a File,
    /// The temporary file that gets a copy of a qcow2 file; `None` means to decode the image to
    /// `raw`.
    pub spool: Option<&'a File>,
    /// Virtual size, once the header or the archive states it.
    pub size: Cell<Option<Bytes>>,
    grant: Grant<'a>,
    /// Bytes that were granted and not yet written.
    granted: Cell<u64>,
}

impl<'a> Output<'a> {
    pub(super) fn new(raw: &'a File, grant: Grant<'a>) -> Self {
        Self { raw, spool: None, size: Cell::new(None), grant, granted: Cell::new(0) }
    }

    /// Writes `data` of the image at `offset` of the raw file. `target` is the file's later name.
    pub(super) fn write(&self, offset: u64, data: &[u8], target: &Path) -> Result<()> {
        let written = raw::write_sparse(self.raw, offset, data).at("write", target)?;
        self.take(written)
    }

    /// Takes space for `bytes`. A hostile image of a few kilobytes can have terabytes of data, so
    /// the caller asks for space as the image takes it, not once for its stated size.
    pub(super) fn take(&self, bytes: u64) -> Result<()> {
        let mut granted = self.granted.get();
        if bytes > granted {
            granted = granted.saturating_add((self.grant)(Bytes(bytes - granted))?.get());
        }
        self.granted.set(granted.saturating_sub(bytes));
        Ok(())
    }
}
