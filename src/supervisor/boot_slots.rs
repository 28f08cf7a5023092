//! Boot slots: they limit how many VMs start on the host at the same time.
//!
//! A slot is a lock `boot.<n>` with n below `limits.parallel_boots`. A supervisor holds it from
//! before it opens its VM's files until the guest runs. A supervisor without a slot waits and can
//! be cancelled meanwhile, so delete_vm does not wait behind it.

use std::time::{Duration, Instant};

use super::VmContext;
use crate::config::Limits;
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Rank, ShortLock};

/// How often to try all slots: flock(2) cannot wait for one of several locks. A start takes at
/// least 100 ms.
const SLOT_POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Returns the number of boot slots: `limits.parallel_boots`, else the number of CPUs.
pub fn count(limits: &Limits) -> usize {
    let cpus = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    limits.parallel_boots.map_or_else(cpus, |most| most.get() as usize)
}

/// Waits until `deadline` for a slot.
///
/// # Errors
/// [`ErrorKind::Timeout`] naming the holder of a slot.
pub(super) async fn acquire(context: &VmContext, deadline: Instant) -> Result<ShortLock> {
    let slots = count(&context.config.limits);
    loop {
        let mut held = None;
        for number in 0..slots {
            match context.store.short_lock(Rank::Boot, number, Instant::now()) {
                Ok(slot) => return Ok(slot),
                Err(error) if error.kind() == ErrorKind::Timeout => held = Some(error),
                Err(error) => return Err(error),
            }
        }
        if Instant::now() >= deadline {
            let message = format!(
                "VM '{}' waited for one of {slots} boot slots until its call's deadline was near",
                context.cid
            );
            return Err(Error::new(ErrorKind::Timeout, message)
                .because(held.expect("at least one slot"))
                .hint(
                    "`bosh-qemu-cpi vm list` shows which VMs are starting; \
                     `limits.parallel_boots` sets how many may start at the same time",
                ));
        }
        tokio::time::sleep(SLOT_POLL_INTERVAL).await;
    }
}
