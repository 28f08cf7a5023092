//! `bosh-qemu-cpi supervise CID`: what create_vm and reboot_vm start for each VM. Not for people.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::cid::VmCid;
use crate::config::Config;
use crate::error::Result;
use crate::log;
use crate::supervisor::{self, StartMode, VmContext};
use crate::sys::detach::detach;

/// Leaves the caller, then runs the VM until it stays off. Must be called before anything is opened.
pub fn run(config: Option<&Path>, cid: VmCid, adopt: bool, patience: Duration) -> Result<()> {
    let queue_deadline = Instant::now() + patience;
    let (lock, handshake) = detach()?;
    let config = match Config::load(config) {
        Ok(config) => config,
        Err(error) => {
            supervisor::report_failure(handshake, &error);
            return Err(error);
        }
    };
    log::init(&config.log);
    let begin = if adopt { StartMode::Adopt } else { StartMode::Launch { queue_deadline } };
    supervisor::supervise(&VmContext::new(config, cid), begin, lock, handshake)
}
