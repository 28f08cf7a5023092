//! Boot slots: how many VMs of the host start at the same time, whoever starts them.
//!
//! A slot is a lock `boot.<n>` with n below `limits.parallel_boots`, held by a supervisor from before it opens its VM's
//! files until the guest runs. Who has none waits, and can be told to end meanwhile: delete_vm does not wait behind it.

use std::time::{Duration, Instant};

use super::Scope;
use crate::config::Limits;
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Rank, ShortLock};

/// flock(2) can not wait for one of several locks. A start takes at least 100 ms.
const LOOK: Duration = Duration::from_millis(10);

/// How many VMs start at the same time.
pub fn slots(limits: &Limits) -> usize {
    let cpus = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    limits.parallel_boots.map_or_else(cpus, |most| most.get() as usize)
}

/// Waits until `until` for a slot.
///
/// # Errors
/// [`ErrorKind::Timeout`] naming who holds the slots.
pub(super) async fn slot(scope: &Scope, until: Instant) -> Result<ShortLock> {
    let slots = slots(&scope.config.limits);
    loop {
        let mut held = None;
        for number in 0..slots {
            match scope.store.short_lock(Rank::Boot, number, Instant::now()) {
                Ok(slot) => return Ok(slot),
                Err(error) if error.kind() == ErrorKind::Timeout => held = Some(error),
                Err(error) => return Err(error),
            }
        }
        if Instant::now() >= until {
            let message = format!(
                "VM '{}' waited for one of {slots} boot slots until its call's time was nearly up",
                scope.cid
            );
            return Err(Error::new(ErrorKind::Timeout, message)
                .because(held.expect("at least one slot"))
                .hint("`limits.parallel_boots` VMs start at the same time; `bosh-qemu-cpi vm list` shows which"));
        }
        tokio::time::sleep(LOOK).await;
    }
}
