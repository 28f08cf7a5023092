//! The command line. No logic.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// Runs VMs on this host for BOSH. Without a command it is a CPI: it reads one request from standard input and
/// answers on standard output.
#[derive(Debug, Parser)]
#[command(name = "bosh-qemu-cpi", version, disable_help_subcommand = true)]
pub struct Cli {
    /// Configuration file [default: $BOSH_QEMU_CPI_CONFIG, else /etc/bosh-qemu-cpi/cpi.json if it is there]
    #[arg(long, value_name = "FILE", global = true)]
    pub config: Option<PathBuf>,
    /// What to do instead of answering a request.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// What the program does besides answering requests.
#[derive(Debug, Subcommand)]
pub enum Command {}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_grammar_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn nothing_at_all_is_a_call() {
        assert!(Cli::try_parse_from(["bosh-qemu-cpi"]).is_ok_and(|cli| cli.command.is_none()));
        assert!(Cli::try_parse_from(["bosh-qemu-cpi", "--config", "/x"]).is_ok_and(|cli| cli.config.is_some()));
        assert!(Cli::try_parse_from(["bosh-qemu-cpi", "--conf"]).is_err());
    }
}
