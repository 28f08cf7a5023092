//! The command line. No logic.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::cid::{DiskCid, SnapshotCid, VmCid};

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
    /// Persistent disks.
    #[command(subcommand)]
    Disk(DiskCommand),
    /// Look at VMs.
    #[command(subcommand)]
    Vm(Vm),
    /// Where images are.
    #[command(subcommand)]
    Pool(Pool),
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
    /// Compare this host with the records: report what is not as it should be.
    Audit {
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Put right what `audit` finds and nobody has to decide about.
    Gc {
        /// Only report, as `audit` does.
        #[arg(long)]
        dry_run: bool,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// This machine as a host: all its VMs, and calls from elsewhere.
    #[command(subcommand)]
    Host(Host),
    /// Run one VM. Started by create_vm and reboot_vm.
    #[command(hide = true)]
    Supervise {
        /// The VM.
        vm: VmCid,
        /// Take over its QEMU, which runs, instead of starting one.
        #[arg(long)]
        adopt: bool,
        /// How long to wait for its turn to boot, milliseconds.
        #[arg(long, default_value_t = 60_000)]
        queue_timeout: u64,
    },
}

/// What is done on a host as a whole.
#[derive(Debug, Subcommand)]
pub enum Host {
    /// Bring back every VM that should run, the Director first. For the boot of the host; harmless at any time.
    Start {
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Power all VMs off in order. They are wanted again at the next `host start`.
    Stop {
        /// How long guests may take before their QEMU is told to end, seconds.
        #[arg(long, default_value_t = 120)]
        timeout: u64,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Answer one call from another machine, on standard input and output. Started by sshd or by a socket unit.
    Serve,
    /// Make another machine a host: this program, its units, and a key that may call it.
    Install(Install),
    /// Undo that. The VMs must be gone.
    Uninstall(Machine),
    /// Make this machine a host.
    Setup(Setup),
    /// Show what each host of the configuration has: version, accelerator, VMs, memory and space.
    Status {
        /// Print one JSON array, sizes in bytes.
        #[arg(long)]
        json: bool,
    },
    /// Print the line of root's authorized_keys that lets a key call this host, and do nothing else here.
    Authorize {
        /// The public key, or the file it is in.
        key: String,
    },
}

/// A machine that is made a host.
#[derive(Debug, Args)]
pub struct Install {
    /// Which.
    #[command(flatten)]
    pub machine: Machine,
    /// The public key that may call, or the file it is in.
    #[arg(long)]
    pub key: Option<String>,
    /// Configuration for the machine, to be its /etc/bosh-qemu-cpi/cpi.json.
    #[arg(long, value_name = "FILE")]
    pub host_config: Option<PathBuf>,
}

/// A machine that becomes a host, or is one no longer.
#[derive(Debug, Args)]
pub struct Machine {
    /// The machine, as ssh takes it: `user@host`. Who is not root there must be let by sudo without a password.
    pub target: String,
    /// The program to bring there [default: this one]
    #[arg(long, value_name = "FILE")]
    pub program: Option<PathBuf>,
    /// How to call ssh.
    #[arg(long, value_name = "COMMAND", default_value = "ssh")]
    pub ssh: String,
    /// Do not ask.
    #[arg(long)]
    pub yes: bool,
    /// Where on the machine, for a look at what is installed.
    #[arg(long, value_name = "DIR")]
    pub root: Option<String>,
}

/// What is set up on this machine.
#[derive(Debug, Args)]
pub struct Setup {
    /// Only print what would be done.
    #[arg(long)]
    pub plan: bool,
    /// Undo it. The VMs must be gone.
    #[arg(long)]
    pub remove: bool,
    /// The public key that may call, or the file it is in.
    #[arg(long)]
    pub key: Option<String>,
    /// Whose authorized_keys the key is put into [default: root]
    #[arg(long)]
    pub user: Option<String>,
    /// A file to be /etc/bosh-qemu-cpi/cpi.json.
    #[arg(long, value_name = "FILE")]
    pub host_config: Option<PathBuf>,
    /// Set it up below this directory, for a look at it.
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub root: PathBuf,
}

/// What is done with disks and BOSH has no call for.
#[derive(Debug, Subcommand)]
pub enum DiskCommand {
    /// Make a new disk with the data of a snapshot, and print its cid. The snapshot stays.
    Restore {
        /// The snapshot.
        snapshot: SnapshotCid,
    },
    /// Have a disk of a shared pool on this host, although another has it, which is gone for good.
    Take {
        /// The disk.
        disk: DiskCid,
    },
}

/// What can be done with VMs by hand.
#[derive(Debug, Subcommand)]
pub enum Vm {
    /// List the VMs of this host: what each is doing, its memory, disks and networks.
    List {
        /// Print one JSON array.
        #[arg(long)]
        json: bool,
    },
}

/// What can be done with pools by hand.
#[derive(Debug, Subcommand)]
pub enum Pool {
    /// Show how full the state directory and each pool is, and what thin images may still grow by.
    List {
        /// Print one JSON array, sizes in bytes.
        #[arg(long)]
        json: bool,
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
        assert!(
            Cli::try_parse_from(["bosh-qemu-cpi", "--config", "/x"])
                .is_ok_and(|cli| cli.config.is_some())
        );
        assert!(Cli::try_parse_from(["bosh-qemu-cpi", "--conf"]).is_err());
    }
}
