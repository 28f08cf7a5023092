//! Opening images that exist.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::libc;

use super::Format;
use super::import::{InvalidImage, probe};
use super::qcow2::Header;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::units::{Bytes, MiB};

/// Opens an image for QEMU. With `direct`, past the page cache if the filesystem can (tmpfs before Linux 6.6 can not);
/// answers whether it could, because QEMU must be told the same.
pub fn open(path: &Path, writable: bool, direct: bool) -> Result<(OwnedFd, bool)> {
    let open = |flags| OpenOptions::new().read(true).write(writable).custom_flags(flags).open(path);
    if direct {
        match open(libc::O_DIRECT) {
            Ok(file) => return Ok((file.into(), true)),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => return Err(Error::io("open", path, error)),
        }
    }
    Ok((open(0).at("open", path)?.into(), false))
}

/// Refuses an image whose header names other files. Ours never do, but for an overlay's backing file; a guest that broke
/// out of its QEMU could have written any header into an image of its own.
///
/// # Errors
/// [`ErrorKind::Corrupt`].
pub fn ensure_no_external_files(path: &Path, format: Format, is_overlay: bool) -> Result<()> {
    if format == Format::Raw {
        return Ok(());
    }
    let header = Header::read(path)?;
    let named = match header {
        Header { external_data_file: true, .. } => "a data file",
        Header { backing_file: Some(_), .. } if !is_overlay => "a backing file",
        _ => return Ok(()),
    };
    Err(Error::new(
        ErrorKind::Corrupt,
        format!("the header of image '{}' names {named}, which we never do", path.display()),
    )
    .hint("a guest may have forged it: look into the image with care, `qemu-img` opens the files it names"))
}

/// Format and size of an operator's image. Its header is trusted as far as the operator is; it must stand alone.
///
/// # Errors
/// [`ErrorKind::BadRequest`] if it is no plain file, or a qcow2 that needs other files or a key.
pub fn inspect(path: &Path) -> Result<(Format, Bytes)> {
    let refused =
        |why: &str| Error::new(ErrorKind::BadRequest, format!("image '{}': {why}", path.display()));
    let file = path.metadata().at("look at", path)?;
    if !file.is_file() {
        return Err(refused("not a plain file"));
    }
    let mut head = Vec::new();
    File::open(path)
        .and_then(|open| open.take(Header::PREFIX as u64).read_to_end(&mut head))
        .at("read", path)?;
    let (format, size) =
        probe_image(&head, file.len()).map_err(|reason| refused(&reason.to_string()))?;
    let size = Bytes(size.next_multiple_of(512));
    if size > MiB::MAX.bytes() || size.get() == 0 {
        return Err(refused("empty or larger than 64 TiB"));
    }
    Ok((format, size))
}

fn probe_image(head: &[u8], length: u64) -> Result<(Format, u64), InvalidImage> {
    match probe::detect_format(head, None)? {
        Format::Raw => Ok((Format::Raw, length)),
        Format::Qcow2 => {
            let header = probe::check_qcow2_header(head)?;
            header.check_offsets(length)?;
            Ok((Format::Qcow2, header.virtual_size.get()))
        }
    }
}
