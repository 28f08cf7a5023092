//! Uids, addresses and host ports of VMs, and the links that reserve them. A link that is missing
//! or names another VM lets a second VM have the same. The VM's record decides.

use super::{Audit, Kind};
use crate::cid::VmCid;
use crate::cpi::vm::orphans::Recorded;
use crate::error::{Error, ErrorKind, Result};
use crate::host::uids;
use crate::store::reservations::Reservation;
use crate::store::{Phase, Rank, VmRecord, atomic};

impl Audit<'_> {
    pub(super) fn reservations(&mut self) -> Result<()> {
        for cid in self.cx.store.list::<VmRecord>()? {
            let Some(_lock) = self.lock_object(Rank::Vm, &cid) else { continue };
            let Ok(Some(vm)) = self.cx.store.read::<VmRecord>(&cid) else { continue };
            if vm.phase == Phase::Ready {
                self.uid(&vm)?;
                self.addresses_and_ports(&vm)?;
            }
        }
        self.without_vm()
    }

    fn uid(&mut self, vm: &VmRecord) -> Result<()> {
        let state_dir = self.cx.store.state_dir();
        let owner = uids::owner(state_dir, vm.uid);
        if owner.as_ref() == Some(&vm.cid) {
            return Ok(());
        }
        let what = uids::path(state_dir, vm.uid).display().to_string();
        if let Some(other) = owner.filter(|other| self.exists(other)) {
            let why = format!("VM '{}' has this uid, which is reserved by VM '{other}'", vm.cid);
            self.for_operator(
                Kind::Unreserved,
                &what,
                &why,
                "recreate one of the two VMs: their QEMUs may run as one user",
            );
            return Ok(());
        }
        let why = format!("VM '{}' has this uid without a reservation", vm.cid);
        self.found(Kind::Unreserved, &what, &why, || uids::restore(state_dir, &vm.cid, vm.uid));
        Ok(())
    }

    fn addresses_and_ports(&mut self, vm: &VmRecord) -> Result<()> {
        let cx = self.cx;
        let reserved: Vec<_> =
            cx.store.reservations()?.into_iter().filter(|(_, holder)| *holder == vm.cid).collect();
        for reservation in Reservation::all_of(vm) {
            if reserved.iter().any(|(its, _)| *its == reservation) {
                continue;
            }
            let why = format!("VM '{}' has it without a reservation", vm.cid);
            self.found(
                Kind::Unreserved,
                &format!("reservation {}", reservation.name()),
                &why,
                || {
                    cx.store.with_reservations(Self::deadline(), |reservations| match reservations
                        .restore(
                        &vm.cid,
                        &reservation,
                    )? {
                        None => Ok(()),
                        Some(other) => {
                            let message = format!("VM '{other}' has reserved it, too");
                            Err(Error::new(ErrorKind::Conflict, message)
                                .hint("recreate one of them"))
                        }
                    })
                },
            );
        }
        Ok(())
    }

    /// Reservations that name no VM and that no record explains. New VMs cannot have what they
    /// reserve.
    fn without_vm(&mut self) -> Result<()> {
        let (recorded, state_dir) = (Recorded::read(self.cx)?, self.cx.store.state_dir());
        for (uid, owner) in uids::reservations(state_dir)? {
            if owner.is_none() && !recorded.uids.contains(&uid) {
                let what = uids::path(state_dir, uid).display().to_string();
                let next = "remove the link if no VM has the uid: it names no cid";
                self.for_operator(
                    Kind::Corrupt,
                    &what,
                    "the reservation of this uid names no VM",
                    next,
                );
            }
        }
        for (reservation, error) in self.cx.store.damaged_reservations()? {
            if !recorded.reservations.contains(&reservation.name()) {
                self.unusable(&format!("reservation {}", reservation.name()), &error);
            }
        }
        Ok(())
    }

    fn exists(&self, vm: &VmCid) -> bool {
        atomic::entry_exists(&self.cx.store.vm(vm).dir)
    }
}
