//! How full pools are: `pool list`, and the part of a host report.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use serde::Serialize;

use super::images::{self, Scope};
use crate::cpi::context::Context;
use crate::error::Result;
use crate::store::beneath;
use crate::units::Bytes;

/// How full a pool is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolUsage {
    /// Its directory.
    pub path: PathBuf,
    /// Size of its filesystem.
    pub capacity: Bytes,
    /// What is free there for programs that do not run as root, and so for every program.
    pub free: Bytes,
    /// What the images in the pool take. An image with several names counts once.
    pub allocated: Bytes,
    /// The sum of their sizes as their guests see them.
    pub virtual_size: Bytes,
    /// What they may still grow by.
    pub growth: Bytes,
}

/// How much is left, in one word. The thresholds are those at which Ceph warns and stops writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Watermark {
    /// At least 15 % of the filesystem is free.
    Ok,
    /// Less than 15 % is free.
    Low,
    /// Less than 5 % is free: guests may stop soon, and creates be refused.
    Full,
}

impl PoolUsage {
    /// How much is left.
    pub fn watermark(&self) -> Watermark {
        match u128::from(self.free.get()) * 100 {
            free if free < u128::from(self.capacity.get()) * 5 => Watermark::Full,
            free if free < u128::from(self.capacity.get()) * 15 => Watermark::Low,
            _ => Watermark::Ok,
        }
    }
}

impl Watermark {
    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Low => "low",
            Self::Full => "full",
        }
    }
}

/// The usage of the state directory, which has no name, and of each pool. A pool that is not
/// mounted is an error of its own.
pub fn all(cx: &Context) -> Vec<(Option<&str>, Result<PoolUsage>)> {
    let pools = std::iter::once(None).chain(cx.store.pools().names().map(Some));
    pools.map(|pool| (pool, of_pool(cx, pool))).collect()
}

/// The room in the state directory, whose name is empty, and in each pool that can be used.
pub(super) fn room_by_pool(cx: &Context) -> BTreeMap<String, Bytes> {
    let pools = std::iter::once(None).chain(cx.store.pools().names().map(Some));
    let room =
        |pool: Option<&str>| images::pool_dir(cx, pool).and_then(|dir| images::room(cx, &dir));
    pools.filter_map(|pool| Some((pool.unwrap_or_default().to_owned(), room(pool).ok()?))).collect()
}

fn of_pool(cx: &Context, pool: Option<&str>) -> Result<PoolUsage> {
    let dir = images::pool_dir(cx, pool)?;
    let stat = images::statvfs(&dir)?;
    let (mut seen, mut usage) = (BTreeSet::new(), [0; 3]);
    for image in images::list(cx, Scope::All, |of| of == pool)? {
        let meta = beneath::metadata(&image.path).ok();
        if meta.as_ref().is_none_or(|meta| seen.insert((meta.dev(), meta.ino()))) {
            let allocated = meta.map_or(0, |meta| meta.blocks() * 512);
            usage[0] += allocated;
            usage[1] += image.virtual_size.get();
            usage[2] += image.growth(allocated);
        }
    }
    let [allocated, virtual_size, growth] = usage.map(Bytes);
    let path = if pool.is_none() { cx.store.state_dir().to_owned() } else { dir };
    let capacity = Bytes(stat.f_blocks.saturating_mul(stat.f_frsize));
    Ok(PoolUsage { path, capacity, free: images::free(&stat), allocated, virtual_size, growth })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watermark_depends_on_the_free_share() {
        let none = Bytes(0);
        let left = |free| {
            let (capacity, free) = (Bytes(1000), Bytes(free));
            PoolUsage {
                path: PathBuf::new(),
                capacity,
                free,
                allocated: none,
                virtual_size: none,
                growth: none,
            }
        };
        let words = [1000, 150, 149, 50, 49, 0].map(|free| left(free).watermark().as_str());
        assert_eq!(words, ["ok", "ok", "low", "low", "full", "full"]);
    }
}
