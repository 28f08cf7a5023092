//! `bosh-qemu-cpi supervise CID`: what create_vm and reboot_vm start for each VM. Not for people.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::cid::VmCid;
use crate::config::Config;
use crate::error::Result;
use crate::log;
use crate::supervisor::{self, Begin, Scope};
use crate::sys::detach::detach;

/// Leaves the caller, then runs the VM until it stays off. Must be called before anything is opened.
pub fn run(config: Option<&Path>, cid: VmCid, adopt: bool, queue_timeout: Duration) -> Result<()> {
    let queue_until = Instant::now() + queue_timeout;
    let (lock, handshake) = detach()?;
    let config = match Config::load(config) {
        Ok(config) => config,
        Err(error) => {
            supervisor::refuse(handshake, &error);
            return Err(error);
        }
    };
    log::init(&config.log);
    let begin = if adopt { Begin::Adopt } else { Begin::Launch { queue_until } };
    supervisor::supervise(&Scope::new(config, cid), begin, lock, handshake)
}
