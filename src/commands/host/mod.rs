//! `bosh-qemu-cpi host …`: this machine as a host of VMs, for itself and for callers elsewhere.

mod authorize;
mod every_vm;
mod install;
mod pass_on;
mod serve;
mod setup;
mod status;
mod syslog;

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use crate::cli::Host;
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
pub fn run(config: Option<&Path>, command: Host, output: &mut dyn Write) -> Result<bool> {
    match command {
        Host::Start { json } => every_vm::start(config, json, output),
        Host::Stop { timeout, json } => {
            every_vm::stop(config, Duration::from_secs(timeout), json, output)
        }
        Host::Serve => serve::run(config).map(|()| true),
        Host::Install(install) => {
            unconfigured(config).and_then(|()| install::install(&install, output))
        }
        Host::Uninstall(machine) => {
            unconfigured(config).and_then(|()| install::uninstall(&machine, output))
        }
        Host::Setup(setup) => unconfigured(config).and_then(|()| setup::run(&setup, output)),
        Host::Status { json } => status::run(config, json, output),
        Host::Authorize { key } => authorize::run(config, &key, output),
    }
}
