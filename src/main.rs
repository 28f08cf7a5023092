//! `bosh-qemu-cpi`: see [`bosh_qemu_cpi::cli`].

use std::io::Write;
use std::process::ExitCode;

use bosh_qemu_cpi::cli::{Cli, Command, NetworkDeed};
use bosh_qemu_cpi::commands::network::Deed;
use bosh_qemu_cpi::{commands, sys};
use clap::Parser;

fn main() -> ExitCode {
    // A starter that ignores SIGCHLD would make every wait for a child of ours fail.
    let _ = sys::signals::keep_exit_statuses();
    let cli = Cli::parse();
    let config = cli.config.as_deref();
    let outcome = match cli.command {
        None => commands::cpi::run(config).map(|()| true),
        Some(Command::Selftest { json }) => commands::selftest::run(config, json, &mut std::io::stdout()),
        Some(Command::Network { deed, json }) => {
            let (deed, networks) = match deed {
                NetworkDeed::Plan { networks } => (Deed::Plan, networks),
                NetworkDeed::Apply { networks } => (Deed::Apply, networks),
                NetworkDeed::Remove { networks } => (Deed::Remove, networks),
            };
            commands::network::run(config, deed, &networks, json, &mut std::io::stdout())
        }
        Some(Command::Reference { page }) => commands::reference::run(page, &mut std::io::stdout()).map(|()| true),
        Some(Command::Supervise { vm }) => commands::supervise::run(config, vm).map(|()| true),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            // Not `eprintln!`, which panics when stderr is closed.
            let _ = writeln!(std::io::stderr(), "Error: {}", error.report());
            ExitCode::FAILURE
        }
    }
}
