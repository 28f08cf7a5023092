//! What is a VM's own by its record, and must be so by name: its uid, its addresses, its ports of the host. A link that
//! is not there, or says something else, lets another VM have the same; the record decides.

use std::collections::BTreeSet;

use super::{Audit, Kind};
use crate::cid::VmCid;
use crate::error::{Error, ErrorKind, Result};
use crate::host::uids;
use crate::store::reservations::Reservation;
use crate::store::{Phase, Rank, VmRecord, atomic};

impl Audit<'_> {
    pub(super) fn names(&mut self) -> Result<()> {
        for cid in self.cpi.store.list::<VmRecord>()? {
            let Some(_hold) = self.idle(Rank::Vm, &cid) else { continue };
            let Ok(Some(vm)) = self.cpi.store.read::<VmRecord>(&cid) else { continue };
            if vm.phase == Phase::Ready {
                self.uid(&vm)?;
                self.claims(&vm)?;
            }
        }
        self.nobodys()
    }

    fn uid(&mut self, vm: &VmRecord) -> Result<()> {
        let state_dir = self.cpi.store.state_dir();
        let owner = uids::owner(state_dir, vm.uid);
        if owner.as_ref() == Some(&vm.cid) {
            return Ok(());
        }
        let what = uids::path(state_dir, vm.uid).display().to_string();
        if let Some(other) = owner.filter(|other| self.exists(other)) {
            let why = format!("VM '{}' has the uid, and it says that VM '{other}' has", vm.cid);
            self.told(
                Kind::Unclaimed,
                &what,
                &why,
                "recreate one of them: both QEMUs may be one user",
            );
            return Ok(());
        }
        let why = format!("it does not say that VM '{}' has the uid", vm.cid);
        self.found(Kind::Unclaimed, &what, &why, || uids::restore(state_dir, &vm.cid, vm.uid));
        Ok(())
    }

    fn claims(&mut self, vm: &VmRecord) -> Result<()> {
        let cpi = self.cpi;
        let claimed: Vec<_> =
            cpi.store.reservations()?.into_iter().filter(|(_, holder)| *holder == vm.cid).collect();
        for claim in Reservation::all_of(vm) {
            if claimed.iter().any(|(its, _)| *its == claim) {
                continue;
            }
            let why = format!("it does not say that VM '{}' has it", vm.cid);
            self.found(Kind::Unclaimed, &format!("claim {}", claim.name()), &why, || {
                cpi.store.with_reservations(Self::deadline(), |claims| {
                    match claims.restore(&vm.cid, &claim)? {
                        None => Ok(()),
                        Some(other) => {
                            let message =
                                format!("VM '{other}' has claimed it: two VMs have the same");
                            Err(Error::new(ErrorKind::Conflict, message)
                                .hint("recreate one of them"))
                        }
                    }
                })
            });
        }
        Ok(())
    }

    /// What is somebody's by name, no record says whose, and the name does not either. Nobody gets it meanwhile.
    fn nobodys(&mut self) -> Result<()> {
        let (recorded, state_dir) = (self.recorded()?, self.cpi.store.state_dir());
        for (uid, owner) in uids::claims(state_dir)? {
            if owner.is_none() && !recorded.uids.contains(&uid) {
                let what = uids::path(state_dir, uid).display().to_string();
                let next = "remove it if no VM has the uid: its text is no cid";
                self.told(Kind::Corrupt, &what, "it does not say which VM has the uid", next);
            }
        }
        for (claim, error) in self.cpi.store.damaged_reservations()? {
            if !recorded.claims.contains(&claim.name()) {
                self.unusable(&format!("claim {}", claim.name()), &error);
            }
        }
        Ok(())
    }

    fn exists(&self, vm: &VmCid) -> bool {
        atomic::entry_exists(&self.cpi.store.vm(vm).dir)
    }

    /// What the records that can be read say.
    pub(super) fn recorded(&self) -> Result<Recorded> {
        let mut recorded = Recorded::default();
        for vm in self.cpi.store.list_readable::<VmRecord>()? {
            recorded.uids.insert(vm.uid);
            recorded.claims.extend(Reservation::all_of(&vm).iter().map(Reservation::name));
        }
        Ok(recorded)
    }
}

/// What is somebody's by a record.
#[derive(Default)]
pub(super) struct Recorded {
    pub(super) uids: BTreeSet<u32>,
    /// By the names of their links.
    pub(super) claims: BTreeSet<String>,
}
