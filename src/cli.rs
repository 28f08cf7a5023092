//! The command line's grammar and help texts, without any logic.
//!
//! Each command's help says what it does, what it prints and its exit status. clap does not wrap
//! lines, so the long texts keep the line breaks of the source.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::cid::{DiskCid, SnapshotCid, VmCid};

/// BOSH CPI that runs VMs on this host with QEMU.
///
/// Without a command it reads one CPI request (JSON) from standard input and writes the response to
/// standard output, as the Director and `bosh create-env` expect. The log goes to standard error.
///
/// Exit status: 0 success (a CPI response is always a success, even one that reports an error),
/// 1 failure, 2 wrong usage.
#[derive(Debug, Parser)]
#[command(name = "bosh-qemu-cpi", version, disable_help_subcommand = true, verbatim_doc_comment)]
pub struct Cli {
    /// Configuration file [default: $BOSH_QEMU_CPI_CONFIG, else /etc/bosh-qemu-cpi/cpi.json if it
    /// exists]
    #[arg(long, value_name = "FILE", global = true)]
    pub config: Option<PathBuf>,
    /// The operator's command; without one the program answers a CPI request.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// The operator's commands and the hidden ones that the program starts itself.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Check that this host can run VMs
    ///
    /// Runs a small built-in guest through a VM's life: create, boot, attach and detach a disk,
    /// reset, reboot, delete. Takes seconds, uses temporary directories and its own network
    /// namespace, and leaves nothing behind. Needs root.
    ///
    /// Prints one line for each check. Exit status: 0 if all checks pass, otherwise 1.
    #[command(verbatim_doc_comment)]
    Selftest {
        /// Print one JSON object instead of lines
        #[arg(long)]
        json: bool,
    },
    /// Restore a snapshot to a new disk, take over a disk of a lost host
    #[command(subcommand)]
    Disk(DiskCommand),
    /// List the VMs of this host
    #[command(subcommand)]
    Vm(VmCommand),
    /// Show how full the state directory and the pools are
    #[command(subcommand)]
    Pool(PoolCommand),
    /// Show, create or remove bridges, addresses and firewall rules of the host's networks
    Network {
        /// The action.
        #[command(subcommand)]
        command: NetworkCommand,
        /// Print one JSON object instead of text
        #[arg(long, global = true)]
        json: bool,
    },
    /// Print a generated page of the documentation.
    #[command(hide = true)]
    Reference {
        /// The page.
        page: Page,
    },
    /// Compare this host with its records and report every difference
    ///
    /// Reports unfinished creates and deletes, stopped VMs that should run, orphaned processes,
    /// links and files, and damaged records. Changes nothing. Needs root.
    ///
    /// Prints one line for each finding and what repairs it. Exit status: 0 if there is no finding,
    /// otherwise 1.
    #[command(verbatim_doc_comment)]
    Audit {
        /// Print one JSON object instead of lines
        #[arg(long)]
        json: bool,
    },
    /// Repair what `audit` finds, except for decisions that are the operator's
    ///
    /// Safe at any time: it skips everything that a running call works on. Needs root.
    ///
    /// Prints one line for each finding and its outcome. Exit status: 0 if everything is repaired,
    /// 1 if a repair failed or a finding needs the operator's decision.
    #[command(verbatim_doc_comment)]
    Gc {
        /// Only report, as `audit` does
        #[arg(long)]
        dry_run: bool,
        /// Print one JSON object instead of lines
        #[arg(long)]
        json: bool,
    },
    /// Start and stop all VMs, set up hosts and show their status
    #[command(subcommand)]
    Host(HostCommand),
    /// Run one VM. Started by create_vm and reboot_vm.
    #[command(hide = true)]
    Supervise {
        /// The VM's cid.
        vm: VmCid,
        /// Supervise the VM's running QEMU instead of starting one.
        #[arg(long)]
        adopt: bool,
        /// How long the VM may wait for a boot slot, milliseconds.
        // A call of the program before an upgrade starts this one with the old name.
        #[arg(long, alias = "patience", value_name = "MILLISECONDS", default_value_t = 60_000)]
        queue_timeout: u64,
    },
}

/// `host …`: commands for a host as a whole.
#[derive(Debug, Subcommand)]
pub enum HostCommand {
    /// Start every VM of this host that should run
    ///
    /// Runs at boot (bosh-qemu-cpi.service) and is safe at any time: it leaves running VMs alone
    /// and gives a running VM without a supervisor a new one. VMs start in the order of the tag
    /// `start_priority` (largest first), then a Director made by create-env, then the oldest.
    /// A VM whose guest powered itself off stays off. Needs root.
    ///
    /// Prints one line for each VM. Exit status: 0 if no VM failed, otherwise 1.
    #[command(verbatim_doc_comment)]
    Start {
        /// Print one JSON object instead of lines
        #[arg(long)]
        json: bool,
    },
    /// Shut down every VM of this host
    ///
    /// Presses each VM's power button and ends QEMU if the guest is not off within --timeout. The
    /// next `host start` starts these VMs again. Needs root.
    ///
    /// Prints one line for each VM. Exit status: 0 if no VM failed, otherwise 1.
    #[command(verbatim_doc_comment)]
    Stop {
        /// How long guests may take to shut down before QEMU is ended, seconds
        #[arg(long, value_name = "SECONDS", default_value_t = 120)]
        timeout: u64,
        /// Print one JSON object instead of lines
        #[arg(long)]
        json: bool,
    },
    /// Answer one call of a remote caller on standard input and output
    ///
    /// Started by sshd as a forced command (see `host authorize`) or by bosh-qemu-cpi.socket. For a
    /// user other than root it forwards the call to that socket.
    #[command(verbatim_doc_comment)]
    Serve,
    /// Set up another machine as a host over ssh
    ///
    /// Copies this program to the machine, prints what `host setup` would change there, asks, and
    /// then changes it: the program, its systemd units and, with --key, the key that may call the
    /// host.
    ///
    /// Prints the plan and what was done. Exit status: 0 if done, 1 if refused or failed.
    #[command(verbatim_doc_comment)]
    Install(Install),
    /// Remove the program and its units from another machine over ssh
    ///
    /// Undoes `host install`. Refused while VMs exist on the machine; the state directory stays.
    ///
    /// Prints the plan and what was done. Exit status: 0 if done, 1 if refused or failed.
    #[command(verbatim_doc_comment)]
    Uninstall(Machine),
    /// Set up this machine as a host
    ///
    /// Installs the program in /usr/local/bin, its systemd units and, with --key, the key that may
    /// call this host. Replaces only files that it installed before. Needs root.
    ///
    /// Prints one line for each step: = present, + added, ~ replaced, - removed, ! needs attention.
    /// Exit status: 0 if done, otherwise 1.
    #[command(verbatim_doc_comment)]
    Setup(Setup),
    /// Show version, VMs, accelerator, free memory and disk space of each configured host
    ///
    /// Asks all hosts of the configuration's `hosts` or `transport` at once, or this host if there
    /// are none.
    ///
    /// Prints a table. ACCEL: kvm or tcg, else the reason why no VM can start. LARGEST VM: the
    /// largest `ram` a new VM can have. FREE DISK: the most free space that the state directory or
    /// one pool has. Exit status: 0 if every host answers, otherwise 1.
    #[command(verbatim_doc_comment)]
    Status {
        /// Print a JSON array with sizes in bytes instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Print the authorized_keys line that lets a key call this host
    ///
    /// Append the line to ~/.ssh/authorized_keys of root or of a user in the group bosh-qemu-cpi.
    /// sshd then runs only `host serve` for this key: no shell, no forwarding. With --config the
    /// line passes that file on.
    #[command(verbatim_doc_comment)]
    Authorize {
        /// The public key, or the path of its .pub file
        // A private key begins with hyphens, and clap would repeat it as an unknown option.
        #[arg(allow_hyphen_values = true)]
        key: String,
    },
}

/// Arguments of `host install`.
#[derive(Debug, Args)]
pub struct Install {
    /// The machine and how to reach it.
    #[command(flatten)]
    pub machine: Machine,
    /// Public key that may call the host, or the path of its .pub file
    #[arg(long, allow_hyphen_values = true)]
    pub key: Option<String>,
    /// Local configuration file, installed there as /etc/bosh-qemu-cpi/cpi.json
    #[arg(long, value_name = "FILE")]
    pub host_config: Option<PathBuf>,
}

/// The machine that `host install` and `host uninstall` work on, and how they reach it.
#[derive(Debug, Args)]
pub struct Machine {
    /// The machine as ssh names it: `user@host`. A user other than root needs sudo without password
    pub target: String,
    /// Program to copy there [default: this one]
    #[arg(long, value_name = "FILE")]
    pub program: Option<PathBuf>,
    /// The ssh command, options included
    #[arg(long, value_name = "COMMAND", default_value = "ssh")]
    pub ssh: String,
    /// Do not ask before changing the machine
    #[arg(long)]
    pub yes: bool,
    /// Directory on the machine to install below, to inspect the result
    #[arg(long, value_name = "DIR")]
    pub root: Option<String>,
}

/// Arguments of `host setup`.
#[derive(Debug, Args)]
pub struct Setup {
    /// Only print what would change
    #[arg(long)]
    pub plan: bool,
    /// Remove what `host setup` installed. Refused while VMs exist; the state directory stays
    #[arg(long)]
    pub remove: bool,
    /// Public key that may call this host, or the path of its .pub file
    #[arg(long, allow_hyphen_values = true)]
    pub key: Option<String>,
    /// User whose authorized_keys gets the key [default: root]
    #[arg(long)]
    pub user: Option<String>,
    /// Configuration file, installed as /etc/bosh-qemu-cpi/cpi.json
    #[arg(long, value_name = "FILE")]
    pub host_config: Option<PathBuf>,
    /// Directory to install below, to inspect the result
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub root: PathBuf,
}

/// `disk …`: operations on persistent disks that the CPI contract does not have.
#[derive(Debug, Subcommand)]
pub enum DiskCommand {
    /// Create a new disk with the data of a snapshot
    ///
    /// The snapshot stays. Attach the new disk with `bosh attach-disk`. Needs root.
    ///
    /// Prints the cid of the new disk. Exit status: 0 if created, otherwise 1.
    #[command(verbatim_doc_comment)]
    Restore {
        /// The snapshot's cid
        snapshot: SnapshotCid,
    },
    /// Take over a disk of a shared pool from a host that is lost for good
    ///
    /// For a host that does not come back: detach the disk there if the host still runs. Refused
    /// while a QEMU has the image open, or if that cannot be determined. A host that returns after
    /// all no longer uses the disk. Needs root.
    ///
    /// Prints the disk's cid. Exit status: 0 if this host owns the disk, otherwise 1.
    #[command(verbatim_doc_comment)]
    Take {
        /// The disk's cid
        disk: DiskCid,
    },
}

/// `vm …`.
#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// List the VMs of this host with state, memory, disks and networks
    ///
    /// Prints a table. STATE is `unknown: …` for a VM that cannot be examined. Needs root.
    ///
    /// Exit status: 0 if the VMs could be listed, otherwise 1.
    #[command(verbatim_doc_comment)]
    List {
        /// Print a JSON array instead of a table
        #[arg(long)]
        json: bool,
    },
}

/// `pool …`.
#[derive(Debug, Subcommand)]
pub enum PoolCommand {
    /// Show how full the state directory and each pool is
    ///
    /// Prints a table. ALLOCATED: what images occupy. VIRTUAL SIZE: the sizes guests see. MAY GROW:
    /// what thin images can still grow by. STATUS: ok, low (less than 15 % free), full (less than
    /// 5 % free), or the reason why the pool cannot be used. Needs root.
    ///
    /// Exit status: 0 if every pool can be used, otherwise 1.
    #[command(verbatim_doc_comment)]
    List {
        /// Print a JSON array with sizes in bytes instead of a table
        #[arg(long)]
        json: bool,
    },
}

/// `network …`. Without names a command works on all networks of this host that have a bridge.
#[derive(Debug, Subcommand)]
pub enum NetworkCommand {
    /// Show what is missing and what conflicts with other programs. Changes nothing
    ///
    /// Prints a paragraph for each network: + what `apply` would do, ! what needs the operator.
    /// Exit status: 0, or 1 if a network cannot work as configured. Needs root.
    #[command(verbatim_doc_comment)]
    Plan {
        /// Names of networks [default: all]
        #[arg(value_name = "NETWORK")]
        networks: Vec<String>,
    },
    /// Create what is missing, and keep configured networks without VMs
    ///
    /// Without this command a network appears with its first VM and is removed with its last one.
    ///
    /// Prints a paragraph for each network: + what was done, ! what needs the operator.
    /// Exit status: 0, or 1 if a network could not be created. Needs root.
    #[command(verbatim_doc_comment)]
    Apply {
        /// Names of networks [default: all]
        #[arg(value_name = "NETWORK")]
        networks: Vec<String>,
    },
    /// Remove networks, those in use with their last VM
    ///
    /// Leaves bridges alone that the CPI did not create, and networks of create_network.
    ///
    /// Prints a line for each network. Exit status: 0, or 1 if a network could not be removed.
    /// Needs root.
    #[command(verbatim_doc_comment)]
    Remove {
        /// Names of networks [default: all]
        #[arg(value_name = "NETWORK")]
        networks: Vec<String>,
    },
}

/// The pages of the documentation that are generated from the code.
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
    fn without_a_command_it_is_a_call() {
        assert!(Cli::try_parse_from(["bosh-qemu-cpi"]).is_ok_and(|cli| cli.command.is_none()));
        assert!(
            Cli::try_parse_from(["bosh-qemu-cpi", "--config", "/x"])
                .is_ok_and(|cli| cli.config.is_some())
        );
        assert!(Cli::try_parse_from(["bosh-qemu-cpi", "--conf"]).is_err());
    }

    #[test]
    fn a_program_before_an_upgrade_starts_supervisors_by_the_old_option() {
        for option in ["--queue-timeout", "--queue-timeout"] {
            let cli =
                Cli::try_parse_from(["bosh-qemu-cpi", "supervise", "vm-1", option, "5"]).unwrap();
            let Some(Command::Supervise { queue_timeout: 5, .. }) = cli.command else {
                panic!("{cli:?}");
            };
        }
    }
}
