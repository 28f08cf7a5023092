//! Where the files of one VM are.

use std::path::PathBuf;

/// Everything of a VM that has a path but for its images, which may be in a pool.
#[derive(Debug, Clone)]
pub struct VmPaths {
    /// What survives a reboot.
    pub dir: PathBuf,
    /// What does not.
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
    /// FAT image labelled `CONFIG-2` with the agent's settings. Holds secrets.
    config_drive = dir / "config.img";
    /// What the guest wrote to its serial port.
    console_log = dir / "console.log";
    /// What QEMU wrote to its standard error.
    qemu_log = dir / "qemu.log";
    /// What the supervisor did.
    supervisor_log = dir / "supervisor.log";
    /// QEMU's events and the supervisor's own, one JSON object a line.
    events = dir / "events.jsonl";
    /// How the last run ended.
    exit = dir / "exit.json";
    /// QEMU's monitor for calls.
    qmp = run / "qmp.sock";
    /// QEMU's monitor for the supervisor.
    supervisor_qmp = run / "supervisor-qmp.sock";
    /// The guest's serial port, served by QEMU to the supervisor.
    serial = run / "serial.sock";
    /// Locked by QEMU as long as it lives.
    qemu_pid = run / "qemu.pid";
    /// Locked by the supervisor as long as it lives.
    supervisor_pid = run / "supervisor.pid";
}
