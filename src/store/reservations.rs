//! Reservations: what only one VM can have, an address on a wire or a port of the host.
//!
//! A claim is a symlink `claims/<what>` whose text is the VM's cid, like a uid's. They are looked at and taken under one
//! lock, so of calls that want the same at once exactly one gets it. A VM's claims are made before its record is and
//! go with it; a link whose VM is gone means nothing.

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

/// What only one VM can have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reservation {
    /// Addresses on a wire: a block, mostly of one.
    Addresses {
        /// The bridge, with its VLAN where it tells them apart.
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
        /// Of one address of the host; absent: of all.
        address: Option<IpAddr>,
    },
}

/// The bridge of a wire.
pub fn bridge(wire: &str) -> Option<LinkName> {
    LinkName::parse(wire.split('@').next()?).ok()
}

/// The wire that VMs on the segment share.
pub fn wire(segment: &Segment) -> String {
    segment
        .vlan
        .map_or_else(|| segment.bridge.to_string(), |vlan| format!("{}@{vlan}", segment.bridge))
}

/// All claims of the host; nobody else changes them as long as this lives.
#[derive(Debug)]
pub struct Reservations<'a> {
    store: &'a Store,
    held: Vec<Reservation>,
    _lock: ShortLock,
}

impl Store {
    fn reservations_dir(&self) -> PathBuf {
        self.state_dir().join("claims")
    }

    /// Works on the claims while nobody else does.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] if that can not be had until `deadline`; those of `work`.
    pub fn with_reservations<T>(
        &self,
        deadline: Instant,
        work: impl FnOnce(&mut Reservations<'_>) -> Result<T>,
    ) -> Result<T> {
        work(&mut self.lock_reservations(deadline)?)
    }

    fn lock_reservations(&self, deadline: Instant) -> Result<Reservations<'_>> {
        let dir = self.reservations_dir();
        // State directories made before there were claims have no place for them.
        atomic::make_dir(&dir)?;
        let lock = self.short_lock(Rank::Reservations, "all", deadline)?;
        let names = dir.read_dir().at("list", &dir)?.flatten();
        let held =
            names.filter_map(|entry| Reservation::parse(entry.file_name().to_str()?)).collect();
        Ok(Reservations { store: self, held, _lock: lock })
    }

    /// Makes the claims durable: a VM that is there after a power cut must have its own.
    pub fn sync_reservations(&self) -> Result<()> {
        atomic::sync_dir(&self.reservations_dir())
    }

    /// Everything that is claimed, and by whom. Names that are no claims are somebody else's and left out.
    pub fn reservations(&self) -> Result<Vec<(Reservation, VmCid)>> {
        let claims = self.read_reservations()?.into_iter();
        Ok(claims.filter_map(|(claim, holder)| Some((claim, holder.ok()?))).collect())
    }

    /// The claims that do not say whose they are.
    pub fn damaged_reservations(&self) -> Result<Vec<(Reservation, Error)>> {
        let claims = self.read_reservations()?.into_iter();
        Ok(claims.filter_map(|(claim, holder)| Some((claim, holder.err()?))).collect())
    }

    fn read_reservations(&self) -> Result<Vec<(Reservation, Result<VmCid>)>> {
        let names = atomic::names(&self.reservations_dir())?;
        let claim = |name: &String| {
            let claim = Reservation::parse(name)?;
            let holder = self.reserved_by(&claim).transpose()?;
            Some((claim, holder))
        };
        Ok(names.iter().filter_map(claim).collect())
    }

    /// Whose the claim is; `None` if there is none.
    fn reserved_by(&self, claim: &Reservation) -> Result<Option<VmCid>> {
        let path = self.reservations_dir().join(claim.name());
        let damaged = |why: &str| {
            Error::new(ErrorKind::Corrupt, format!("claim '{}' does not say whose it is: {why}", path.display()))
                .hint("it is a link whose text is the VM's cid: correct it, or remove it if no VM has what it is for")
        };
        match std::fs::read_link(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(damaged(&error.to_string())),
            Ok(text) => {
                let vm = text.to_str().and_then(|text| VmCid::parse(text).ok());
                vm.map(Some).ok_or_else(|| damaged("its text is no cid"))
            }
        }
    }

    /// Gives back everything `vm` has claimed.
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
    /// The VM that has what `wanted` would take a part of.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if a claim does not say whose it is: it may be a VM's that runs.
    pub fn holder(&mut self, wanted: &Reservation) -> Result<Option<VmCid>> {
        while let Some(at) = self.held.iter().position(|held| held.overlaps(wanted)) {
            let holder = self.store.reserved_by(&self.held[at])?;
            if let Some(vm) = holder.filter(|vm| self.exists(vm)) {
                return Ok(Some(vm));
            }
            atomic::remove_file(&self.path(&self.held[at]))?;
            self.held.remove(at);
        }
        Ok(None)
    }

    /// Whether the VM is there or is being made. Its note alone does not tell: who takes a create that has no lock yet for
    /// one that was cut short removes it last, when the create may have the lock.
    fn exists(&self, vm: &VmCid) -> bool {
        let is_there = |path: PathBuf| atomic::entry_exists(&path);
        let is_free = || matches!(self.store.try_lock(Rank::Vm, vm), Ok(Some(_)));
        is_there(self.store.vm(vm).dir) || is_there(self.store.pending_dir().join(vm)) || !is_free()
    }

    /// Takes what nobody [holds](Self::holder).
    pub fn reserve(&mut self, vm: &VmCid, wanted: Reservation) -> Result<()> {
        let path = self.path(&wanted);
        symlink(vm.as_str(), &path).at("claim with", &path)?;
        self.held.push(wanted);
        Ok(())
    }

    /// Has what is `vm`'s by its record be so by name again, whatever is in the place of the name now. The VM that has
    /// claimed it instead, if there is one.
    pub fn restore(&mut self, vm: &VmCid, claim: &Reservation) -> Result<Option<VmCid>> {
        if self.store.reserved_by(claim).is_err() {
            atomic::remove_file(&self.path(claim))?;
            self.held.retain(|held| held != claim);
        }
        match self.holder(claim)? {
            Some(holder) if holder == *vm => Ok(None),
            Some(other) => Ok(Some(other)),
            None => self.reserve(vm, claim.clone()).map(|()| None),
        }
    }

    /// The VMs that have addresses on the wire.
    pub fn vms_on_wire(&mut self, wanted: &str) -> Result<Vec<VmCid>> {
        let is_there = |held: &&Reservation| matches!(held, Reservation::Addresses { wire, .. } if wire == wanted);
        let mut vms = Vec::new();
        for held in self.held.iter().filter(is_there).cloned().collect::<Vec<_>>() {
            vms.extend(self.holder(&held)?);
        }
        vms.sort();
        vms.dedup();
        Ok(vms)
    }

    fn path(&self, claim: &Reservation) -> PathBuf {
        self.store.reservations_dir().join(claim.name())
    }
}

impl Reservation {
    /// The claim of a block on the segment's wire.
    pub fn block(segment: &Segment, block: IpNetwork) -> Self {
        Self::Addresses { wire: wire(segment), block }
    }

    /// Everything that the record of a VM says it has.
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
                let claim =
                    |port| Some(Self::Port { protocol: protocol?, port, address: forward.address });
                // One port may lead to an address of each family.
                let new: Vec<_> =
                    ports.filter_map(claim).filter(|claim| !all.contains(claim)).collect();
                all.extend(new);
            }
        }
        all
    }

    /// Whether not both can be had.
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
                let apart =
                    address.is_some() && other_address.is_some() && address != other_address;
                protocol == other_protocol && port == other_port && !apart
            }
            _ => false,
        }
    }

    /// The name of its file. No part can hold a comma.
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
    fn a_name_says_all_of_a_claim() {
        for claim in
            [block("10.0.0.16/28"), block("fd00::5/128"), port(None), port(Some("fd00::1"))]
        {
            assert_eq!(Reservation::parse(&claim.name()), Some(claim));
        }
        assert_eq!(Reservation::parse("ip,br0,10.0.0.1"), None);
    }

    #[test]
    fn what_overlaps_meets() {
        assert!(block("10.0.0.16/28").overlaps(&block("10.0.0.20/32")));
        assert!(block("10.0.0.20/32").overlaps(&block("10.0.0.16/28")));
        assert!(!block("10.0.0.32/32").overlaps(&block("10.0.0.16/28")));
        assert!(port(None).overlaps(&port(Some("192.0.2.1"))));
        assert!(!port(Some("192.0.2.2")).overlaps(&port(Some("192.0.2.1"))));
    }

    #[test]
    fn a_claim_is_one_vms_as_long_as_that_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path(), dir.path());
        store.prepare().unwrap();
        let (vm, claim) = (VmCid::random(), block("10.0.0.5/32"));
        std::fs::create_dir(store.vm(&vm).dir).unwrap();
        let open = || store.lock_reservations(Instant::now() + Duration::from_secs(5)).unwrap();
        let mut claims = open();
        assert_eq!(claims.holder(&claim).unwrap(), None);
        claims.reserve(&vm, claim.clone()).unwrap();
        drop(claims);
        let mut claims = open();
        assert_eq!(claims.holder(&block("10.0.0.0/24")).unwrap(), Some(vm.clone()));
        assert_eq!(claims.vms_on_wire("br0@7").unwrap(), std::slice::from_ref(&vm));
        std::fs::remove_dir(store.vm(&vm).dir).unwrap();
        drop(claims);
        let made = store.lock(Rank::Vm, &vm, Instant::now()).unwrap();
        let mut claims = open();
        assert_eq!(
            claims.vms_on_wire("br0@7").unwrap(),
            std::slice::from_ref(&vm),
            "somebody makes it"
        );
        made.unlink().unwrap();
        assert_eq!(claims.holder(&claim).unwrap(), None);
        claims.reserve(&vm, claim.clone()).unwrap();
        store.release_reservations(&vm).unwrap();
        assert_eq!(store.reservations_dir().read_dir().unwrap().count(), 0);
    }
}
