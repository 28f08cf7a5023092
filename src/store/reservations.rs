//! Reservations of what only one VM can have: addresses on a wire and ports of the host.
//!
//! A reservation is a symlink `claims/<name>` whose text is the VM's cid, as for uids. Calls read
//! and make them under one lock, so concurrent calls never reserve the same. A create reserves
//! before it writes the VM's record, and the VM's removal releases. A symlink whose VM no longer
//! exists has no effect.

use std::net::IpAddr;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::time::Instant;

use ipnetwork::IpNetwork;

use super::Store;
use super::atomic;
use super::lock::{Rank, ShortLock};
use super::record::{Segment, VmRecord};
use crate::cid::{Cid, VmCid};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::link_name::LinkName;
use crate::ranges::Protocol;

/// An address block or a host port that one VM has reserved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reservation {
    /// A block of addresses on a wire, mostly a single address.
    Addresses {
        /// `<bridge>`, or `<bridge>@<vlan>` if the bridge filters VLANs.
        wire: String,
        /// The block.
        block: IpNetwork,
    },
    /// A port of the host.
    Port {
        /// TCP or UDP.
        protocol: Protocol,
        /// The host's port.
        port: u16,
        /// The host's address; absent: all its addresses.
        address: Option<IpAddr>,
    },
}

/// The bridge of a wire.
pub fn bridge(wire: &str) -> Option<LinkName> {
    LinkName::parse(wire.split('@').next()?).ok()
}

/// The wire of all VMs on the segment.
pub fn wire(segment: &Segment) -> String {
    segment
        .vlan
        .map_or_else(|| segment.bridge.to_string(), |vlan| format!("{}@{vlan}", segment.bridge))
}

/// All reservations of the host, under their lock.
#[derive(Debug)]
pub struct Reservations<'a> {
    store: &'a Store,
    all: Vec<Reservation>,
    _lock: ShortLock,
}

impl Store {
    fn reservations_dir(&self) -> PathBuf {
        self.state_dir().join("claims")
    }

    /// Runs `work` with the lock of all reservations.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] if another process holds the lock until `deadline`; those of `work`.
    pub fn with_reservations<T>(
        &self,
        deadline: Instant,
        work: impl FnOnce(&mut Reservations<'_>) -> Result<T>,
    ) -> Result<T> {
        work(&mut self.lock_reservations(deadline)?)
    }

    fn lock_reservations(&self, deadline: Instant) -> Result<Reservations<'_>> {
        let dir = self.reservations_dir();
        // State directories of old versions have no such directory.
        atomic::make_dir(&dir)?;
        let lock = self.short_lock(Rank::Reservations, "all", deadline)?;
        let names = dir.read_dir().at("list", &dir)?.flatten();
        let all =
            names.filter_map(|entry| Reservation::parse(entry.file_name().to_str()?)).collect();
        Ok(Reservations { store: self, all, _lock: lock })
    }

    /// Makes the reservations durable, so that a VM that survives a power cut still has its own.
    pub fn sync_reservations(&self) -> Result<()> {
        atomic::sync_dir(&self.reservations_dir())
    }

    /// Every reservation with its VM. Damaged reservations and other names in the directory are
    /// left out.
    pub fn reservations(&self) -> Result<Vec<(Reservation, VmCid)>> {
        let all = self.read_reservations()?.into_iter();
        Ok(all.filter_map(|(reservation, vm)| Some((reservation, vm.ok()?))).collect())
    }

    /// The reservations that name no VM.
    pub fn damaged_reservations(&self) -> Result<Vec<(Reservation, Error)>> {
        let all = self.read_reservations()?.into_iter();
        Ok(all.filter_map(|(reservation, vm)| Some((reservation, vm.err()?))).collect())
    }

    fn read_reservations(&self) -> Result<Vec<(Reservation, Result<VmCid>)>> {
        let names = atomic::names(&self.reservations_dir())?;
        let read = |name: &String| {
            let reservation = Reservation::parse(name)?;
            let vm = self.reserved_by(&reservation).transpose()?;
            Some((reservation, vm))
        };
        Ok(names.iter().filter_map(read).collect())
    }

    /// The VM of the reservation; `None` if there is no such reservation.
    fn reserved_by(&self, reservation: &Reservation) -> Result<Option<VmCid>> {
        let path = self.reservations_dir().join(reservation.name());
        let damaged = |why: &str| {
            let message = format!("reservation '{}' does not name a VM: {why}", path.display());
            Error::new(ErrorKind::Corrupt, message).hint(
                "it is a symlink whose text is the VM's cid: correct it, or remove it if no VM has \
                 the address or port",
            )
        };
        match std::fs::read_link(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(damaged(&error.to_string())),
            Ok(text) => {
                let vm = text.to_str().and_then(|text| VmCid::parse(text).ok());
                vm.map(Some).ok_or_else(|| damaged("its text is not a cid"))
            }
        }
    }

    /// Removes all reservations of `vm`.
    pub fn release_reservations(&self, vm: &VmCid) -> Result<()> {
        let dir = self.reservations_dir();
        for entry in dir.read_dir().into_iter().flatten().flatten() {
            if std::fs::read_link(entry.path())
                .is_ok_and(|holder| holder.as_os_str() == vm.as_str())
            {
                atomic::remove_file(&entry.path())?;
            }
        }
        Ok(())
    }
}

impl Reservations<'_> {
    /// The VM with a reservation that overlaps `wanted`. Removes overlapping reservations of VMs
    /// that no longer exist.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if such a reservation names no VM: its VM may be running.
    pub fn holder(&mut self, wanted: &Reservation) -> Result<Option<VmCid>> {
        while let Some(at) = self.all.iter().position(|known| known.overlaps(wanted)) {
            let holder = self.store.reserved_by(&self.all[at])?;
            if let Some(vm) = holder.filter(|vm| self.exists(vm)) {
                return Ok(Some(vm));
            }
            atomic::remove_file(&self.path(&self.all[at]))?;
            self.all.remove(at);
        }
        Ok(None)
    }

    /// Whether the VM exists or is being made. The file in `pending/` is not enough: a recovery
    /// that takes a create without a lock for an interrupted one removes that file last, when the
    /// create may have its lock.
    fn exists(&self, vm: &VmCid) -> bool {
        let entry_exists = |path: PathBuf| atomic::entry_exists(&path);
        let is_free = || matches!(self.store.try_lock(Rank::Vm, vm), Ok(Some(_)));
        entry_exists(self.store.vm(vm).dir)
            || entry_exists(self.store.pending_dir().join(vm))
            || !is_free()
    }

    /// Reserves `wanted`, which must have no [holder](Self::holder).
    pub fn reserve(&mut self, vm: &VmCid, wanted: Reservation) -> Result<()> {
        let path = self.path(&wanted);
        symlink(vm.as_str(), &path).at("make reservation", &path)?;
        self.all.push(wanted);
        Ok(())
    }

    /// Restores a reservation that `vm` has by its record, and replaces a damaged one. Returns the
    /// other VM if one has reserved it meanwhile.
    pub fn restore(&mut self, vm: &VmCid, lost: &Reservation) -> Result<Option<VmCid>> {
        if self.store.reserved_by(lost).is_err() {
            atomic::remove_file(&self.path(lost))?;
            self.all.retain(|known| known != lost);
        }
        match self.holder(lost)? {
            Some(holder) if holder == *vm => Ok(None),
            Some(other) => Ok(Some(other)),
            None => self.reserve(vm, lost.clone()).map(|()| None),
        }
    }

    /// The VMs with addresses on the wire.
    pub fn vms_on_wire(&mut self, wanted: &str) -> Result<Vec<VmCid>> {
        let is_on_wire = |known: &&Reservation| match known {
            Reservation::Addresses { wire, .. } => wire == wanted,
            Reservation::Port { .. } => false,
        };
        let mut vms = Vec::new();
        for known in self.all.iter().filter(is_on_wire).cloned().collect::<Vec<_>>() {
            vms.extend(self.holder(&known)?);
        }
        vms.sort();
        vms.dedup();
        Ok(vms)
    }

    fn path(&self, reservation: &Reservation) -> PathBuf {
        self.store.reservations_dir().join(reservation.name())
    }
}

impl Reservation {
    /// The reservation of a block on the segment's wire.
    pub fn block(segment: &Segment, block: IpNetwork) -> Self {
        Self::Addresses { wire: wire(segment), block }
    }

    /// All reservations that a VM has by its record.
    pub fn all_of(vm: &VmRecord) -> Vec<Self> {
        let mut all = Vec::new();
        for (nic, rules) in vm.nics.iter().filter_map(|nic| Some((nic, nic.rules.as_ref()?))) {
            if let Some((_, segment)) = nic.tap() {
                all.extend(rules.addresses.iter().map(|block| Self::block(segment, *block)));
            }
            for forward in &rules.forwards {
                let protocol =
                    Protocol::ALL.into_iter().find(|known| known.number() == forward.protocol);
                let ports = (forward.host..=u16::MAX).take(forward.count.into());
                let reservation =
                    |port| Some(Self::Port { protocol: protocol?, port, address: forward.address });
                // A port may be forwarded to an address of each family.
                let new: Vec<_> =
                    ports.filter_map(reservation).filter(|new| !all.contains(new)).collect();
                all.extend(new);
            }
        }
        all
    }

    /// Whether two VMs cannot have both.
    pub fn overlaps(&self, other: &Self) -> bool {
        match (self, other) {
            (
                Self::Addresses { wire, block },
                Self::Addresses { wire: other_wire, block: other },
            ) => {
                wire == other_wire
                    && (block.contains(other.network()) || other.contains(block.network()))
            }
            (
                Self::Port { protocol, port, address },
                Self::Port { protocol: other_protocol, port: other_port, address: other_address },
            ) => {
                let is_disjoint =
                    address.is_some() && other_address.is_some() && address != other_address;
                protocol == other_protocol && port == other_port && !is_disjoint
            }
            _ => false,
        }
    }

    /// The name of its symlink. No part contains a comma.
    pub fn name(&self) -> String {
        match self {
            Self::Addresses { wire, block } => {
                format!("ip,{wire},{},{}", block.network(), block.prefix())
            }
            Self::Port { protocol, port, address } => {
                format!(
                    "port,{protocol},{port},{}",
                    address.map_or_else(|| "any".to_owned(), |ip| ip.to_string())
                )
            }
        }
    }

    fn parse(name: &str) -> Option<Self> {
        let parts: Vec<_> = name.split(',').collect();
        match parts[..] {
            ["ip", wire, address, prefix] => {
                let block = IpNetwork::new(address.parse().ok()?, prefix.parse().ok()?).ok()?;
                Some(Self::Addresses { wire: wire.to_owned(), block })
            }
            ["port", protocol, port, address] => {
                let protocol =
                    Protocol::ALL.into_iter().find(|known| known.as_str() == protocol)?;
                let address = if address == "any" { None } else { Some(address.parse().ok()?) };
                Some(Self::Port { protocol, port: port.parse().ok()?, address })
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn block(text: &str) -> Reservation {
        Reservation::Addresses { wire: "br0@7".into(), block: text.parse().unwrap() }
    }

    fn port(address: Option<&str>) -> Reservation {
        Reservation::Port {
            protocol: Protocol::Udp,
            port: 53,
            address: address.map(|text| text.parse().unwrap()),
        }
    }

    #[test]
    fn a_name_and_its_reservation_convert_both_ways() {
        for reservation in
            [block("10.0.0.16/28"), block("fd00::5/128"), port(None), port(Some("fd00::1"))]
        {
            assert_eq!(Reservation::parse(&reservation.name()), Some(reservation));
        }
        assert_eq!(Reservation::parse("ip,br0,10.0.0.1"), None);
    }

    #[test]
    fn overlapping_reservations_are_found() {
        assert!(block("10.0.0.16/28").overlaps(&block("10.0.0.20/32")));
        assert!(block("10.0.0.20/32").overlaps(&block("10.0.0.16/28")));
        assert!(!block("10.0.0.32/32").overlaps(&block("10.0.0.16/28")));
        assert!(port(None).overlaps(&port(Some("192.0.2.1"))));
        assert!(!port(Some("192.0.2.2")).overlaps(&port(Some("192.0.2.1"))));
    }

    #[test]
    fn a_reservation_lasts_as_long_as_its_vm_exists() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path(), dir.path());
        store.prepare().unwrap();
        let (vm, wanted) = (VmCid::random(), block("10.0.0.5/32"));
        std::fs::create_dir(store.vm(&vm).dir).unwrap();
        let open = || store.lock_reservations(Instant::now() + Duration::from_secs(5)).unwrap();
        let mut reservations = open();
        assert_eq!(reservations.holder(&wanted).unwrap(), None);
        reservations.reserve(&vm, wanted.clone()).unwrap();
        drop(reservations);
        let mut reservations = open();
        assert_eq!(reservations.holder(&block("10.0.0.0/24")).unwrap(), Some(vm.clone()));
        assert_eq!(reservations.vms_on_wire("br0@7").unwrap(), std::slice::from_ref(&vm));
        std::fs::remove_dir(store.vm(&vm).dir).unwrap();
        drop(reservations);
        let made = store.lock(Rank::Vm, &vm, Instant::now()).unwrap();
        let mut reservations = open();
        assert_eq!(
            reservations.vms_on_wire("br0@7").unwrap(),
            std::slice::from_ref(&vm),
            "it is being made"
        );
        made.unlink().unwrap();
        assert_eq!(reservations.holder(&wanted).unwrap(), None);
        reservations.reserve(&vm, wanted.clone()).unwrap();
        store.release_reservations(&vm).unwrap();
        assert_eq!(store.reservations_dir().read_dir().unwrap().count(), 0);
    }
}
