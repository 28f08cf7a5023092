//! Opens existing images and checks what their headers refer to.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::libc;

use super::Format;
use super::import::{InvalidImage, header_check};
use super::qcow2::Header;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::store::beneath::{self, Expected, Found};
use crate::units::{Bytes, MiB};

/// Opens an image for QEMU. With `direct`, bypasses the page cache if the filesystem supports that
/// (tmpfs before Linux 6.6 does not). Returns whether it is bypassed: QEMU's `cache.direct` must
/// agree.
pub fn open(image: &Found, writable: bool, direct: bool) -> Result<(OwnedFd, bool)> {
    if direct {
        match image.open(writable, libc::O_DIRECT) {
            Ok(file) => return Ok((file.into(), true)),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => return Err(Error::io("open", image.path(), error)),
        }
    }
    Ok((image.open(writable, 0).at("open", image.path())?.into(), false))
}

/// Fails if the image's header names another file. Images of this program name none but an
/// overlay's backing file. A guest that broke out of its QEMU could have written any header into
/// its own image.
///
/// # Errors
/// [`ErrorKind::Corrupt`].
pub fn ensure_no_external_files(image: &Found, format: Format, is_overlay: bool) -> Result<()> {
    if format == Format::Raw {
        return Ok(());
    }
    let named = match Header::read(image)? {
        Header { external_data_file: true, .. } => "a data file",
        Header { backing_file: Some(_), .. } if !is_overlay => "a backing file",
        _ => return Ok(()),
    };
    Err(Error::new(
        ErrorKind::Corrupt,
        format!(
            "the header of image '{}' names {named}; no image of this program does",
            image.path().display()
        ),
    )
    .hint(
        "a guest may have forged it: inspect the header with care, `qemu-img` opens the files it \
         names",
    ))
}

/// Format and virtual size of an image the operator provides. Its header is trusted, but it must
/// not need other files.
///
/// # Errors
/// [`ErrorKind::BadRequest`] if it is not a regular file, or a qcow2 image that needs other files
/// or a key.
pub fn inspect(path: &Path) -> Result<(Format, Bytes)> {
    let refused =
        |why: &str| Error::new(ErrorKind::BadRequest, format!("image '{}': {why}", path.display()));
    let file = beneath::file(path, Expected::OfOperator).map_err(|error| {
        if error.kind() == ErrorKind::Corrupt { refused("not a regular file") } else { error }
    })?;
    let mut head = Vec::new();
    file.read()?.take(Header::PREFIX as u64).read_to_end(&mut head).at("read", path)?;
    let (format, size) =
        probe_image(&head, file.metadata().len()).map_err(|reason| refused(&reason.to_string()))?;
    let size = Bytes(size.next_multiple_of(512));
    if size > MiB::MAX.bytes() || size.get() == 0 {
        return Err(refused("empty or larger than 64 TiB"));
    }
    Ok((format, size))
}

fn probe_image(head: &[u8], length: u64) -> Result<(Format, u64), InvalidImage> {
    match header_check::detect_format(head, None)? {
        Format::Raw => Ok((Format::Raw, length)),
        Format::Qcow2 => {
            let header = header_check::check_qcow2_header(head)?;
            header.check_offsets(length)?;
            Ok((Format::Qcow2, header.virtual_size.get()))
        }
    }
}
