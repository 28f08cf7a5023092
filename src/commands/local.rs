//! Configuration and CPI of this machine, for commands that act on the local host only.

use std::path::{Path, PathBuf};

use nix::unistd::geteuid;

use crate::config::{self, Config, TransportKind};
use crate::cpi::context::Context;
use crate::cpi::properties;
use crate::error::{Error, ErrorKind, Result};
use crate::log;

/// Reads the configuration. Also returns the path of the file, or `None` for the defaults.
///
/// # Errors
/// [`ErrorKind::Host`] for a user other than root. [`ErrorKind::BadConfig`] if the configuration
/// sends calls to other hosts: a command on this machine would then act on the wrong host.
pub(super) fn config(file: Option<&Path>) -> Result<(Config, Option<PathBuf>)> {
    ensure_root()?;
    let file = config::path(file);
    let config = Config::load(file.as_deref())?;
    check_defaults(&config, file.as_deref())?;
    if config.transport.kind != TransportKind::Local || !config.hosts.is_empty() {
        let key = if config.hosts.is_empty() { "transport" } else { "hosts" };
        let message = "this machine is not a host: its configuration sends calls to other hosts";
        return Err(Error::new(ErrorKind::BadConfig, message).hint(format!(
            "run the command on the host itself; if this is the host, remove '{key}' from its \
             configuration"
        )));
    }
    Ok((config, file))
}

/// Checks the defaults of cloud properties in `config`, which `file` has.
///
/// # Errors
/// [`ErrorKind::BadConfig`] naming the property.
pub(super) fn check_defaults(config: &Config, file: Option<&Path>) -> Result<()> {
    let file = file.unwrap_or(Path::new(config::DEFAULT_FILE));
    properties::check_defaults(config).map_err(|error| error.in_file(&file.display().to_string()))
}

/// The context of a command on this host, with its log on standard error.
///
/// # Errors
/// As [`config()`].
pub(super) fn context(file: Option<&Path>) -> Result<Context> {
    let (config, file) = config(file)?;
    log::init(&config.log);
    Ok(Context::new(config, file))
}

/// # Errors
/// [`ErrorKind::Host`] for a user other than root.
pub(super) fn ensure_root() -> Result<()> {
    if geteuid().is_root() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Host, "this command must run as root").hint("use sudo"))
}
