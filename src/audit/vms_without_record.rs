//! What is left of VMs that do not exist: an operator removed their directories by hand, or a
//! delete was interrupted.

use super::locks::ObjectLock;
use super::{Audit, Kind};
use crate::cid::VmCid;
use crate::cpi::creation::pending;
use crate::cpi::machine::pids;
use crate::cpi::vm::orphans::{self, Orphans, Recorded};
use crate::error::Result;
use crate::store::{Rank, atomic};

impl Audit<'_> {
    pub(super) fn vms_without_record(&mut self) -> Result<()> {
        let recorded = Recorded::read(self.cx)?;
        for vm in orphans::named_vms(self.cx)? {
            self.orphans_of(&vm, &recorded)?;
        }
        Ok(())
    }

    fn orphans_of(&mut self, vm: &VmCid, recorded: &Recorded) -> Result<()> {
        let cx = self.cx;
        // A dangling link is a VM whose filesystem is not mounted.
        let exists = || atomic::entry_exists(&cx.store.vm(vm).dir);
        if exists() {
            return Ok(());
        }
        let Some(lock) = self.lock(Rank::Vm, vm) else { return Ok(()) };
        let had_lock = lock.had_file();
        if exists() || pending::contains(cx, vm) {
            return lock.release();
        }
        let found = Orphans::find(cx, vm, recorded);
        let (unknown, orphans) = match found.and_then(|o| Ok((o.unknown_processes()?, o))) {
            Ok(found) => found,
            Err(error) => {
                self.unknown(vm, &error);
                return lock.release();
            }
        };
        if !unknown.is_empty() {
            let pids = pids(&unknown);
            let why = format!("the VM does not exist, but its control group has processes: {pids}");
            let next = "no pid file says what they are: see `ps`, end them, then repeat `gc`";
            self.for_operator(Kind::Orphan, vm, &why, next);
            return lock.release();
        }
        let mut left = orphans.describe();
        left.extend(had_lock.then(|| "lock".to_owned()));
        if left.is_empty() {
            return lock.unlink();
        }
        let mut lock = Some(lock);
        let why = format!("the VM does not exist; this is left of it: {}", left.join(", "));
        self.found(Kind::Orphan, vm, &why, || {
            orphans.remove(cx, Self::deadline())?;
            lock.take().expect("taken once").unlink()
        });
        lock.map_or(Ok(()), ObjectLock::release)
    }
}
