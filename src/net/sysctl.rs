//! Kernel settings below `/proc/sys/net` of the calling thread's network namespace.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use crate::error::{IoContext, Result};

/// Sets `key` (`ipv4/ip_forward`) to `value`, unless the kernel lacks the setting or it has the
/// value already. Reads first: where `/proc/sys` is read-only, a host with the right value needs no
/// write.
pub(super) fn ensure(key: &str, value: &str) -> Result<()> {
    write(key, value).at(format!("write '{value}' to"), &path(key)).map_err(|error| {
        error.hint(format!("run on the host: sysctl -w {}={value}", name(&lasting(key))))
    })
}

/// As [`ensure`], for a setting that the network works without. Where `/proc/sys` is read-only, as
/// in containers, the setting stays as it is.
pub(super) fn prefer(key: &str, value: &str) -> Result<()> {
    match write(key, value) {
        Err(error) if error.kind() == ErrorKind::ReadOnlyFilesystem => {
            tracing::info!(key, value, "/proc/sys is read-only: leaving a kernel setting");
            Ok(())
        }
        result => result.at(format!("write '{value}' to"), &path(key)),
    }
}

fn write(key: &str, value: &str) -> io::Result<()> {
    let path = path(key);
    match fs::read_to_string(&path) {
        Ok(current) if current.trim_end() == value => return Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        result => result?,
    };
    tracing::info!(key, value, "changing a kernel setting");
    fs::write(&path, value)
}

/// Returns the key that outlasts the link of `key`: a call that fails removes the links that it
/// made, and new links take the settings of `default`.
fn lasting(key: &str) -> String {
    match key.split('/').collect::<Vec<_>>()[..] {
        [family, "conf", _link, setting] => format!("{family}/conf/default/{setting}"),
        _ => key.to_owned(),
    }
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
