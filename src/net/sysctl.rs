//! Kernel settings below `/proc/sys/net`, which are those of the calling thread's network namespace.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{IoContext, Result};

/// Gives the setting `key` (`ipv4/ip_forward`) the value `value`, if it is there and has another. Reads first: where
/// `/proc/sys` is read-only, a host that is already right is right.
pub(super) fn ensure(key: &str, value: &str) -> Result<()> {
    if read(key)?.is_none_or(|is| is == value) {
        return Ok(());
    }
    let hint = || format!("make it so on the host: sysctl -w {}={value}", name(key));
    tracing::info!(key, value, "changing a kernel setting");
    let path = path(key);
    fs::write(&path, value)
        .at(format!("write '{value}' to"), &path)
        .map_err(|error| error.hint(hint()))
}

/// The setting, or `None` if the kernel has none of that name: no IPv6, or a link that has gone meanwhile.
pub(super) fn read(key: &str) -> Result<Option<String>> {
    let path = path(key);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text.trim_end().to_owned())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).at("read", &path),
    }
}

/// The setting as sysctl(8) takes it: dots and slashes change places, so a dot in a link's name becomes a slash.
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
