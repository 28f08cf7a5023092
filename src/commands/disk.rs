//! `bosh-qemu-cpi disk restore` and `disk take`: operations the CPI contract does not have.

use std::io;
use std::path::Path;

use super::local;
use crate::cli::DiskCommand;
use crate::cpi::Cpi;
use crate::cpi::contract::Contract;
use crate::error::{Error, Result};

/// Carries out the command and prints the cid of the disk.
pub fn run(config: Option<&Path>, command: DiskCommand, output: &mut dyn io::Write) -> Result<()> {
    let cpi = Cpi::new(local::context(config)?);
    let disk = match command {
        DiskCommand::Restore { snapshot } => cpi.restore_disk(&snapshot)?,
        DiskCommand::Take { disk } => cpi.take_disk(&disk).map(|()| disk)?,
    };
    writeln!(output, "{disk}")
        .map_err(|e| Error::os(format!("print the cid of disk '{disk}'"), e))?;
    cpi.acknowledge();
    Ok(())
}
