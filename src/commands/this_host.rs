//! What everything done on a host begins with: the configuration of this machine, which must be one.

use std::path::{Path, PathBuf};

use nix::unistd::geteuid;

use crate::config::{self, Config, TransportKind};
use crate::cpi::Cpi;
use crate::error::{Error, ErrorKind, Result};
use crate::log;

/// The configuration, and the file that somebody named.
///
/// # Errors
/// [`ErrorKind::BadConfig`] if it sends calls elsewhere: what is here is nothing that anybody means. For anybody but root.
pub(super) fn config(file: Option<&Path>) -> Result<(Config, Option<PathBuf>)> {
    if !geteuid().is_root() {
        return Err(Error::new(ErrorKind::Host, "what is on a host is for root alone")
            .hint("do it as root"));
    }
    let file = config::path(file);
    let config = Config::load(file.as_deref())?;
    if config.transport.kind != TransportKind::Local || !config.hosts.is_empty() {
        let message = "this machine is no host: its configuration sends calls elsewhere";
        return Err(Error::new(ErrorKind::BadConfig, message)
            .hint("do it on the host; if this is one, take 'transport' and 'hosts' out of its configuration"));
    }
    Ok((config, file))
}

/// The host, for a command at a terminal.
///
/// # Errors
/// As [`config()`].
pub(super) fn cpi(file: Option<&Path>) -> Result<Cpi> {
    let (config, file) = config(file)?;
    log::init(&config.log);
    Ok(Cpi::new(config, file))
}
