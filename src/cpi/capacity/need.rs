//! How much space a new image needs at once.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::cpi::context::Context;
use crate::error::Result;
use crate::store::beneath;
use crate::store::record::{DiskImage, Format, Preallocation};
use crate::units::{Bytes, MiB};

/// What an empty image takes: headers and first tables. Also for a VM, where the config drive takes
/// the most of it.
const EMPTY: u64 = 1 << 20;

/// What an empty encrypted image takes: a LUKS header with its eight key slots, too.
const EMPTY_ENCRYPTED: u64 = 4 << 20;

/// The need of a new persistent disk.
pub(in crate::cpi) fn disk(cx: &Context, size: MiB, image: &DiskImage) -> Bytes {
    let size = size.bytes().get();
    let empty = if image.encrypted { EMPTY_ENCRYPTED } else { EMPTY };
    Bytes(match image.preallocation {
        Preallocation::Falloc | Preallocation::Full => size + empty,
        _ if !cx.config.overcommit => size + empty,
        // qcow2 has 8 bytes of tables and 2 of reference count for 64 KiB of data.
        Preallocation::Metadata => (size >> 12) + empty,
        Preallocation::Off => empty,
    })
}

/// The need of new thin images of `size` together.
pub(in crate::cpi) fn thin(cx: &Context, size: Bytes) -> Bytes {
    Bytes(EMPTY.saturating_add(if cx.config.overcommit { 0 } else { size.get() }))
}

/// The least need of a stemcell's image, imported from a file that takes `source`.
pub(in crate::cpi) fn import(source: Bytes) -> Bytes {
    Bytes(EMPTY.saturating_add(source.get()))
}

/// The need of an image without holes.
pub(in crate::cpi) fn full(size: MiB) -> Bytes {
    Bytes(size.bytes().get() + EMPTY_ENCRYPTED)
}

/// The need of a copy by QEMU or `qemu-img` of the image `source`, which is at `path`.
pub(in crate::cpi) fn copy(
    cx: &Context,
    path: &Path,
    source: &DiskImage,
    target: &DiskImage,
    size: MiB,
) -> Result<Bytes> {
    // A hole in a raw LUKS image decrypts to noise, so a copy from or into one has no holes.
    let has_no_holes = |image: &DiskImage| image.encrypted && image.format == Format::Raw;
    let is_full = has_no_holes(source) || has_no_holes(target);
    let data = if is_full { full(size) } else { image(cx, path, size)? };
    Ok(data.max(disk(cx, size, target)))
}

/// The need of a copy with holes of the image at `path`: what that takes on the filesystem.
pub(in crate::cpi) fn image(cx: &Context, path: &Path, size: MiB) -> Result<Bytes> {
    let allocated = beneath::metadata(path)?.blocks() * 512;
    let as_thin = thin(cx, size.bytes()).get();
    Ok(Bytes(as_thin.max(thin(cx, Bytes(0)).get() + allocated)))
}
