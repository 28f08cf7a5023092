//! `bosh-qemu-cpi`: see [`bosh_qemu_cpi::cli`].

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use bosh_qemu_cpi::cli::{Cli, Command, NetworkDeed, Pool, Vm};
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
        Some(Command::Selftest { json }) => {
            commands::selftest::run(config, json, &mut std::io::stdout())
        }
        Some(Command::Vm(Vm::List { json })) => {
            commands::vm::list(config, json, &mut std::io::stdout()).map(|()| true)
        }
        Some(Command::Pool(Pool::List { json })) => {
            commands::pool::list(config, json, &mut std::io::stdout())
        }
        Some(Command::Network { deed, json }) => {
            let (deed, networks) = match deed {
                NetworkDeed::Plan { networks } => (Deed::Plan, networks),
                NetworkDeed::Apply { networks } => (Deed::Apply, networks),
                NetworkDeed::Remove { networks } => (Deed::Remove, networks),
            };
            commands::network::run(config, deed, &networks, json, &mut std::io::stdout())
        }
        Some(Command::Reference { page }) => {
            commands::reference::run(page, &mut std::io::stdout()).map(|()| true)
        }
        Some(Command::Disk(command)) => {
            commands::disk::run(config, command, &mut std::io::stdout()).map(|()| true)
        }
        Some(Command::Audit { json }) => {
            commands::audit::run(config, false, json, &mut std::io::stdout())
        }
        Some(Command::Gc { dry_run, json }) => {
            commands::audit::run(config, !dry_run, json, &mut std::io::stdout())
        }
        Some(Command::Host(host)) => commands::host::run(config, host, &mut std::io::stdout()),
        Some(Command::Supervise { vm, adopt, queue_timeout }) => {
            commands::supervise::run(config, vm, adopt, Duration::from_millis(queue_timeout))
                .map(|()| true)
        }
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
