//! `bosh-qemu-cpi host …`: this machine as a host of VMs, for itself and for callers elsewhere.

mod authorize;
mod boot;
mod install;
mod proxy;
mod serve;
mod setup;
mod status;
mod syslog;

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use crate::cli::HostCommand;
use crate::error::{Error, ErrorKind, Result};

/// A configuration that would be read by nobody is more likely meant for the machine that becomes a host.
fn unconfigured(config: Option<&Path>) -> Result<()> {
    let Some(config) = config else { return Ok(()) };
    let message = format!("'--config {}' says nothing to this command", config.display());
    Err(Error::new(ErrorKind::BadRequest, message)
        .hint("what is to count on the host is given by --host-config"))
}

/// Does it. Whether all is as it should be.
///
/// # Errors
/// Those of each command.
pub fn run(config: Option<&Path>, command: HostCommand, output: &mut dyn Write) -> Result<bool> {
    match command {
        HostCommand::Start { json } => boot::start(config, json, output),
        HostCommand::Stop { timeout, json } => {
            boot::stop(config, Duration::from_secs(timeout), json, output)
        }
        HostCommand::Serve => serve::run(config).map(|()| true),
        HostCommand::Install(install) => {
            unconfigured(config).and_then(|()| install::install(&install, output))
        }
        HostCommand::Uninstall(machine) => {
            unconfigured(config).and_then(|()| install::uninstall(&machine, output))
        }
        HostCommand::Setup(setup) => unconfigured(config).and_then(|()| setup::run(&setup, output)),
        HostCommand::Status { json } => status::run(config, json, output),
        HostCommand::Authorize { key } => authorize::run(config, &key, output),
    }
}
