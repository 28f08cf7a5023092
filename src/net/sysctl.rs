//! Kernel settings below `/proc/sys/net` of the calling thread's network namespace.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{IoContext, Result};

/// Sets `key` (`ipv4/ip_forward`) to `value`, unless the kernel lacks the setting or it has the
/// value already. Reads first: where `/proc/sys` is read-only, a host with the right value needs no
/// write.
pub(super) fn ensure(key: &str, value: &str) -> Result<()> {
    if read(key)?.is_none_or(|current| current == value) {
        return Ok(());
    }
    let hint = || format!("run on the host: sysctl -w {}={value}", name(key));
    tracing::info!(key, value, "changing a kernel setting");
    let path = path(key);
    fs::write(&path, value)
        .at(format!("write '{value}' to"), &path)
        .map_err(|error| error.hint(hint()))
}

/// Reads a setting. Returns `None` if the kernel lacks it: there is no IPv6, or the link was
/// removed.
pub(super) fn read(key: &str) -> Result<Option<String>> {
    let path = path(key);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text.trim_end().to_owned())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).at("read", &path),
    }
}

/// Returns the setting's name for sysctl(8), which swaps dots and slashes: a dot in a link's name
/// becomes a slash.
pub(super) fn name(key: &str) -> String {
    let swap = |c| match c {
        '/' => '.',
        '.' => '/',
        other => other,
    };
    format!("net.{}", key.chars().map(swap).collect::<String>())
}

fn path(key: &str) -> PathBuf {
    Path::new("/proc/sys/net").join(key)
}
