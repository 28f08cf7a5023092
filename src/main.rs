//! `bosh-qemu-cpi`: see [`bosh_qemu_cpi::cli`].

use std::io::Write;
use std::process::ExitCode;

use bosh_qemu_cpi::cli::Cli;
use bosh_qemu_cpi::commands;
use clap::Parser;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = match cli.command {
        None => commands::cpi::run(cli.config.as_deref()),
        Some(command) => match command {},
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Not `eprintln!`, which panics when stderr is closed.
            let _ = writeln!(std::io::stderr(), "Error: {}", error.report());
            ExitCode::FAILURE
        }
    }
}
