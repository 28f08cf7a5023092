//! Admission of new images.

use std::path::Path;
use std::time::Instant;

use super::images;
use crate::cpi::context::Context;
use crate::error::{Error, ErrorKind, Result};
use crate::store::Rank;
use crate::units::Bytes;

/// Runs `record`, which writes the record of a new image that needs `need` bytes in `pool`, if
/// there is room.
///
/// # Errors
/// [`ErrorKind::NoDiskSpace`] naming the pool, its free space and the need. Those of
/// [`crate::store::Pools::dir`].
pub(in crate::cpi) fn admit(
    cx: &Context,
    pool: Option<&str>,
    need: Bytes,
    deadline: Instant,
    record: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let dir = images::pool_dir(cx, pool)?;
    let _lock = cx.store.short_lock(Rank::Space, "all", deadline)?;
    let room = images::room(cx, &dir)?;
    if need <= room { record() } else { Err(no_space(pool, &dir, room, need, "")) }
}

/// Most bytes that [`grant`] grants at once, unless the need is larger.
const GRANT: u64 = 64 << 20;
/// Most bytes of a filesystem that imports leave free. They leave 5 % of a smaller filesystem.
const RESERVE: u64 = 1 << 30;

/// Grants an image that is being imported at least `need` more bytes in `pool`. Returns how many.
///
/// # Errors
/// Those of [`admit`].
pub(in crate::cpi) fn grant(
    cx: &Context,
    pool: Option<&str>,
    need: Bytes,
    deadline: Instant,
) -> Result<Bytes> {
    let dir = images::pool_dir(cx, pool)?;
    let _lock = cx.store.short_lock(Rank::Space, "all", deadline)?;
    let stat = images::statvfs(&dir)?;
    let reserve = (stat.f_blocks.saturating_mul(stat.f_frsize) / 20).min(RESERVE);
    let room = Bytes(images::room(cx, &dir)?.get().saturating_sub(reserve));
    // A part of the room: imports at the same time do not count each other's grants.
    let granted = need.max(Bytes((room.get() / 4).min(GRANT)));
    if need <= room { Ok(granted) } else { Err(no_space(pool, &dir, room, need, " more")) }
}

fn no_space(pool: Option<&str>, dir: &Path, room: Bytes, need: Bytes, more: &str) -> Error {
    let what = pool.map_or("the state directory".to_owned(), |pool| format!("pool '{pool}'"));
    // The need is rounded up.
    let need = Bytes(need.get().next_multiple_of(1 << 20)).rounded();
    let (room, dir) = (room.rounded(), dir.display());
    let message = format!("{what} at '{dir}' has {room} left, the image needs {need}{more}");
    Error::new(ErrorKind::NoDiskSpace, message).hint("free or add space there, or use another pool")
}
