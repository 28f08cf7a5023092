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
use crate::error::Result;

/// Does it. Whether all is as it should be.
///
/// # Errors
/// Those of each command.
pub fn run(config: Option<&Path>, command: Host, output: &mut dyn Write) -> Result<bool> {
    match command {
        Host::Start { json } => every_vm::start(config, json, output),
        Host::Stop { timeout, json } => every_vm::stop(config, Duration::from_secs(timeout), json, output),
        Host::Serve => serve::run(config).map(|()| true),
        Host::Install(install) => install::run(&install, false, output),
        Host::Uninstall(install) => install::run(&install, true, output),
        Host::Setup(setup) => setup::run(&setup, output),
        Host::Status { json } => status::run(config, json, output),
        Host::Authorize { key } => authorize::run(config, &key, output),
    }
}
