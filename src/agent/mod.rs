//! The BOSH agent's interface in the guest: its settings, on a config drive.

pub mod config_drive;
pub mod settings;
