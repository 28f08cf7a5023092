//! The program `bosh-qemu-cpi`: dispatches the command line of [`bosh_qemu_cpi::cli`].

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use bosh_qemu_cpi::cli::{Cli, Command, NetworkCommand, PoolCommand, VmCommand};
use bosh_qemu_cpi::commands::network::Action;
use bosh_qemu_cpi::{commands, schema, sys};
use clap::Parser;

fn main() -> ExitCode {
    // A parent that ignores SIGCHLD passes that on, and every wait for a child process would fail.
    let _ = sys::signals::keep_exit_statuses();
    sys::limits::prepare_process();
    let cli = Cli::parse();
    let config = cli.config.as_deref();
    let outcome = match cli.command {
        None => commands::cpi::run(config).map(|()| true),
        Some(Command::Selftest { json }) => {
            commands::selftest::run(config, json, &mut std::io::stdout())
        }
        Some(Command::Vm(VmCommand::List { json })) => {
            commands::vm::list(config, json, &mut std::io::stdout()).map(|()| true)
        }
        Some(Command::Pool(PoolCommand::List { json })) => {
            commands::pool::list(config, json, &mut std::io::stdout())
        }
        Some(Command::Network { command, json }) => {
            let (action, networks) = match command {
                NetworkCommand::Plan { networks } => (Action::Plan, networks),
                NetworkCommand::Apply { networks } => (Action::Apply, networks),
                NetworkCommand::Remove { networks } => (Action::Remove, networks),
            };
            commands::network::run(config, action, &networks, json, &mut std::io::stdout())
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
            // `eprintln!` panics if stderr is closed.
            let _ = writeln!(std::io::stderr(), "Error: {}", schema::escaped(&error.report()));
            ExitCode::FAILURE
        }
    }
}
