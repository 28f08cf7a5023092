//! Boot slots: how many VMs of the host start at the same time, whoever starts them.
//!
//! A slot is a lock `boot.<n>` with n below `limits.parallel_boots`, held by a supervisor from before it opens its VM's
//! files until the guest runs. Who has none waits, and can be told to end meanwhile: delete_vm does not wait behind it.

use std::time::{Duration, Instant};

use super::VmContext;
use crate::config::Limits;
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Brief, Rank};

/// flock(2) can not wait for one of several locks. A start takes at least 100 ms.
const SLOT_POLL_INTERVAL: Duration = Duration::from_millis(10);

/// How many VMs start at the same time.
pub fn count(limits: &Limits) -> usize {
    let cpus = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    limits.parallel_boots.map_or_else(cpus, |most| most.get() as usize)
}

/// Waits until `until` for a slot.
///
/// # Errors
/// [`ErrorKind::Timeout`] naming who holds the slots.
pub(super) async fn acquire(context: &VmContext, deadline: Instant) -> Result<Brief> {
    let slots = count(&context.config.limits);
    loop {
        let mut held = None;
        for number in 0..slots {
            match context.store.brief(Rank::Boot, number, Instant::now()) {
                Ok(slot) => return Ok(slot),
                Err(error) if error.kind() == ErrorKind::Timeout => held = Some(error),
                Err(error) => return Err(error),
            }
        }
        if Instant::now() >= deadline {
            let message = format!(
                "VM '{}' waited for one of {slots} boot slots until its call's time was nearly up",
                context.cid
            );
            return Err(Error::new(ErrorKind::Timeout, message)
                .because(held.expect("at least one slot"))
                .hint("`limits.parallel_boots` VMs start at the same time; `bosh-qemu-cpi vm list` shows which"));
        }
        tokio::time::sleep(SLOT_POLL_INTERVAL).await;
    }
}
