//! What the BOSH agent in the guest reads: its settings, on a config drive.

pub mod config_drive;
pub mod settings;
