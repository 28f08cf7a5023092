//! Paths of one VM's files.

use std::path::PathBuf;

/// Paths of a VM's files, except its images, which may be in a pool.
#[derive(Debug, Clone)]
pub struct VmPaths {
    /// Directory of files that survive a reboot.
    pub dir: PathBuf,
    /// Directory of files that do not: sockets and pid files.
    pub run: PathBuf,
}

macro_rules! paths {
    ($($(#[$doc:meta])* $name:ident = $root:ident / $file:literal;)*) => {
        impl VmPaths {$(
            $(#[$doc])*
            pub fn $name(&self) -> PathBuf {
                self.$root.join($file)
            }
        )*}
    };
}

paths! {
    /// Config drive: a FAT image labelled `CONFIG-2` with the agent's settings. Contains secrets.
    config_drive = dir / "config.img";
    /// The guest's output on its serial port.
    console_log = dir / "console.log";
    /// What QEMU prints.
    qemu_log = dir / "qemu.log";
    /// The supervisor's log.
    supervisor_log = dir / "supervisor.log";
    /// Events of QEMU and of the supervisor, one JSON object per line.
    events = dir / "events.jsonl";
    /// Exit record of the last run.
    exit = dir / "exit.json";
    /// QEMU's monitor for calls.
    qmp = run / "qmp.sock";
    /// QEMU's monitor for the supervisor.
    supervisor_qmp = run / "supervisor-qmp.sock";
    /// The guest's serial port, served by QEMU to the supervisor.
    serial = run / "serial.sock";
    /// The pipe for QEMU's standard output and error.
    qemu_output = run / "qemu.output";
    /// QEMU's pid file, locked while QEMU runs.
    qemu_pid = run / "qemu.pid";
    /// The supervisor's pid file, locked while it runs.
    supervisor_pid = run / "supervisor.pid";
}
