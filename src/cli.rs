//! The command line. No logic.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};

use crate::cid::VmCid;

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
pub enum Command {
    /// Check that this host runs VMs: a small guest's whole life in a few seconds, with nothing left behind.
    Selftest {
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Look at, make or remove the host's side of the networks.
    Network {
        /// What to do.
        #[command(subcommand)]
        deed: NetworkDeed,
        /// Print one JSON object.
        #[arg(long, global = true)]
        json: bool,
    },
    /// Print a reference page of the documentation.
    #[command(hide = true)]
    Reference {
        /// Which page.
        page: Page,
    },
    /// Run one VM. Started by create_vm and reboot_vm.
    #[command(hide = true)]
    Supervise {
        /// The VM.
        vm: VmCid,
    },
}

/// What to do with networks. Without a name: with all of them.
#[derive(Debug, Subcommand)]
pub enum NetworkDeed {
    /// Print what is missing and what other programs have put in the way. Changes nothing.
    Plan {
        /// Networks of the configuration.
        networks: Vec<String>,
    },
    /// Make what is missing. Networks of the configuration then stay without VMs.
    Apply {
        /// Networks of the configuration.
        networks: Vec<String>,
    },
    /// Remove networks of ours, each at once or with its last VM.
    Remove {
        /// Networks of the configuration.
        networks: Vec<String>,
    },
}

/// The pages made from the code.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Page {
    /// docs/config.md
    Config,
    /// docs/cloud-properties.md
    CloudProperties,
}

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
