//! `bosh-qemu-cpi host …`: this machine as a host of VMs, for local and remote callers.

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

/// Refuses `--config` for a command that reads no configuration: the operator most likely means the
/// configuration of the new host.
fn ensure_no_config(config: Option<&Path>) -> Result<()> {
    let Some(config) = config else { return Ok(()) };
    let message = format!("this command does not read '--config {}'", config.display());
    Err(Error::new(ErrorKind::BadRequest, message)
        .hint("use --host-config for the configuration of the new host"))
}

/// Runs the command. Returns false if the exit status must be 1 although there was no error.
///
/// # Errors
/// Those of the command.
pub fn run(config: Option<&Path>, command: HostCommand, output: &mut dyn Write) -> Result<bool> {
    match command {
        HostCommand::Start { json } => boot::start(config, json, output),
        HostCommand::Stop { timeout, json } => {
            boot::stop(config, Duration::from_secs(timeout), json, output)
        }
        HostCommand::Serve => serve::run(config).map(|()| true),
        HostCommand::Install(install) => {
            ensure_no_config(config).and_then(|()| install::install(&install, output))
        }
        HostCommand::Uninstall(machine) => {
            ensure_no_config(config).and_then(|()| install::uninstall(&machine, output))
        }
        HostCommand::Setup(setup) => {
            ensure_no_config(config).and_then(|()| setup::run(&setup, output))
        }
        HostCommand::Status { json } => status::run(config, json, output),
        HostCommand::Authorize { key } => authorize::run(config, &key, output),
    }
}
