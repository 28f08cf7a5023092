//! `disk restore`: what BOSH has no call for.

use std::io;
use std::path::Path;

use crate::cli::DiskCommand;
use crate::config::{self, Config};
use crate::cpi::Cpi;
use crate::error::{Error, Result};
use crate::log;

/// Carries out the command and prints its result on one line.
pub fn run(config: Option<&Path>, command: DiskCommand, output: &mut dyn io::Write) -> Result<()> {
    let file = config::file(config);
    let config = Config::load(file.as_deref())?;
    log::init(&config.log);
    let cpi = Cpi::new(config, file);
    let DiskCommand::Restore { snapshot } = command;
    let disk = cpi.restore(&snapshot)?;
    writeln!(output, "{disk}").map_err(|e| Error::os(format!("print the new disk's cid, '{disk}'"), e))
}
