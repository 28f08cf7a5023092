//! `bosh-qemu-cpi supervise CID`: the supervisor of one VM. create_vm, reboot_vm and `host start`
//! start it; operators do not.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::cid::VmCid;
use crate::config::Config;
use crate::error::Result;
use crate::log;
use crate::supervisor::{self, StartMode, VmContext};
use crate::sys::detach::detach;
use crate::sys::limits;

/// Detaches from the caller, then runs the VM until it stays off. Waits at most `queue_timeout` for
/// a boot slot. Must run before the process opens anything, because it replaces standard
/// descriptors.
pub fn run(config: Option<&Path>, cid: VmCid, adopt: bool, queue_timeout: Duration) -> Result<()> {
    let queue_deadline = Instant::now() + queue_timeout;
    let (lock, handshake) = detach()?;
    let config = match Config::load(config) {
        Ok(config) => config,
        Err(error) => {
            supervisor::report_failure(handshake, &error);
            return Err(error);
        }
    };
    log::init(&config.log);
    for (limit, value) in limits::unmet() {
        tracing::warn!(limit, value, "the VM has a lower resource limit than it may need");
    }
    let begin = if adopt { StartMode::Adopt } else { StartMode::Launch { queue_deadline } };
    supervisor::supervise(&VmContext::new(config, cid), begin, lock, handshake)
}
