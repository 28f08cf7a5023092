//! The packet filter of VMs: what a guest may send, and what reaches it. It is two nftables tables
//! named `bosh-qemu-guard`, one of the family `bridge` and one of the family `inet`. Hosts and
//! operators know that name, so it stays.
//!
//! ```text
//!    store::NicRules ── elements (pure) ──▶ add · remove ──▶ one transaction
//!                                              ▲
//!                             rules (the same for all VMs)
//! ```
//! The tables exist while any VM with rules exists. A VM is only elements of their sets, which name
//! its taps: packets and VMs cost the same however many VMs the host has. Elements outlive a tap
//! that is removed and made again, so a VM is never on a wire without its rules.
//!
//! Several calls and supervisors change the tables at once, perhaps with different state
//! directories. None waits for a lock: a transaction names the generation it is based on, and is
//! repeated if that has changed.

mod nic_elements;
mod rules;

use std::collections::BTreeSet;

use ipnetwork::IpNetwork;

use self::nic_elements::SetElements;
use super::nft::{self, DataType, Element, Outcome, Part, RawElement, Set, Step, Table};
use crate::error::{Error, ErrorKind, Result};
use crate::link_name::LinkName;
use crate::store::record::Nic;

/// How often the host's nftables may change during one call before it fails. Each change is another
/// process's progress.
const MAX_ATTEMPTS: u32 = 64;

/// Puts the rules of `nics` in force. If the tables are missing or another version's, it writes
/// them anew with the NICs that `others` returns: all VMs on the host.
///
/// # Errors
/// [`ErrorKind::Host`] for what the kernel refused; [`ErrorKind::Conflict`] if other processes
/// change the tables throughout.
pub fn add(nics: &[Nic], others: impl Fn() -> Result<Vec<Nic>>) -> Result<()> {
    if nics.iter().all(|nic| nic.tap().is_none() || nic.rules.is_none()) {
        return Ok(());
    }
    let (bridge, inet) = (rules::bridge_table(), rules::inet_table());
    retry_while_stale(|| {
        let generation = nft::generation()?;
        if nft::is_current(&bridge)? && nft::is_current(&inet)? {
            let members = encode(&elements_of_all(nics));
            return nft::commit(&steps(&bridge, &inet, &members, Step::AddElements), None);
        }
        tracing::info!("writing the tables 'bosh-qemu-guard'");
        let all = others()?;
        let members = encode(&elements_of_all(nics.iter().chain(&all)));
        let mut steps = steps(&bridge, &inet, &members, Step::AddElements);
        steps.splice(..0, [Step::ReplaceTable(&bridge), Step::ReplaceTable(&inet)]);
        let outcome = nft::commit(&steps, Some(generation))?;
        if outcome == Outcome::Done {
            // A VM that was removed meanwhile found no tables to remove its elements from.
            let remaining = others()?;
            let remains = |nic: &&Nic| {
                remaining
                    .iter()
                    .any(|other| other.tap().map(|tap| tap.0) == nic.tap().map(|tap| tap.0))
            };
            all.iter()
                .filter(|nic| !remains(nic))
                .try_for_each(|nic| remove(std::slice::from_ref(nic)))?;
        }
        Ok(outcome)
    })
}

/// Whether any rule of `nics` is not in force: the tables are missing or another version's, or they
/// lack elements.
///
/// # Errors
/// [`ErrorKind::Host`] for what the kernel refused.
pub fn is_missing(nics: &[Nic]) -> Result<bool> {
    let (bridge, inet) = (rules::bridge_table(), rules::inet_table());
    let members = elements_of_all(nics);
    if members.0.is_empty() {
        return Ok(false);
    }
    if !(nft::is_current(&bridge)? && nft::is_current(&inet)?) {
        return Ok(true);
    }
    for (table, wanted) in [(&bridge, &members.0), (&inet, &members.1)] {
        for SetElements { set, elements } in wanted {
            let present: BTreeSet<_> =
                nft::elements(table, set)?.into_iter().flatten().map(|raw| raw.first).collect();
            if !elements.iter().all(|element| present.contains(&element.encode().first)) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// Removes the elements of `nics`, and both tables with the last VM's elements.
///
/// # Errors
/// As [`add`].
pub fn remove(nics: &[Nic]) -> Result<()> {
    let members = elements_of_all(nics);
    if members.0.is_empty() {
        return Ok(());
    }
    remove_elements(&encode(&members))
}

/// Elements of a VM whose record does not exist.
#[derive(Debug)]
pub struct StrayElements(RawTableElements);

/// Returns the elements of these taps, of these addresses on their bridges, and of ports forwarded
/// to them.
///
/// # Errors
/// [`ErrorKind::Host`] for what the kernel refused.
pub fn stray_elements(
    taps: &[LinkName],
    addresses: &[(LinkName, IpNetwork)],
    ports: &[(u8, u16)],
) -> Result<StrayElements> {
    let first = |parts| Element::new(parts).encode().first;
    let mut prefixes: Vec<_> =
        taps.iter().map(|tap| first(vec![Part::Link(tap.clone())])).collect();
    prefixes.extend(
        addresses
            .iter()
            .map(|(bridge, block)| first(nic_elements::masked_key_prefix(bridge, *block))),
    );
    let of_port = |raw: &RawElement| {
        let tail = |(protocol, port): &(u8, u16)| {
            first(vec![Part::Protocols(*protocol, *protocol), Part::Ports(*port, *port)])
        };
        ports.iter().any(|port| raw.first.ends_with(&tail(port)))
    };
    let belongs_to_vm = |set: &Set, raw: &RawElement| {
        if set.key.first() == Some(&DataType::Link) {
            return prefixes.iter().any(|head| raw.first.starts_with(head));
        }
        let target = nic_elements::forward_target(&raw.data);
        target.is_some_and(|ip| addresses.iter().any(|(_, block)| block.contains(ip)))
            && of_port(raw)
    };
    let of = |table: &Table| -> Result<RawSetElements> {
        let mut found = Vec::new();
        for set in &table.sets {
            let mut elements = nft::elements(table, set)?.unwrap_or_default();
            elements.retain(|raw| belongs_to_vm(set, raw));
            found.push((*set, elements));
        }
        found.retain(|(_, elements)| !elements.is_empty());
        Ok(found)
    };
    Ok(StrayElements((of(&rules::bridge_table())?, of(&rules::inet_table())?)))
}

impl StrayElements {
    /// Whether there are no such elements.
    pub fn is_empty(&self) -> bool {
        self.0.0.is_empty() && self.0.1.is_empty()
    }

    /// Removes the elements, and both tables with the last VM's elements.
    ///
    /// # Errors
    /// As [`add`].
    pub fn remove(&self) -> Result<()> {
        if self.is_empty() { Ok(()) } else { remove_elements(&self.0) }
    }
}

fn remove_elements(members: &RawTableElements) -> Result<()> {
    let (bridge, inet) = (rules::bridge_table(), rules::inet_table());
    // A stale outcome means that the tables are removed, and the elements with them.
    let _: Outcome = nft::commit(&steps(&bridge, &inet, members, Step::RemoveElements), None)?;
    retry_while_stale(|| {
        let generation = nft::generation()?;
        if nft::elements(&inet, &rules::TAPS)?.is_none_or(|taps| !taps.is_empty()) {
            return Ok(Outcome::Done);
        }
        let both = [
            Step::DropTable(bridge.family, &bridge.name),
            Step::DropTable(inet.family, &inet.name),
        ];
        nft::commit(&both, Some(generation))
    })
}

fn retry_while_stale(mut attempt: impl FnMut() -> Result<Outcome>) -> Result<()> {
    for _ in 0..MAX_ATTEMPTS {
        if attempt()? == Outcome::Done {
            return Ok(());
        }
    }
    Err(Error::new(
        ErrorKind::Conflict,
        format!(
            "gave up on the nftables tables 'bosh-qemu-guard' after {MAX_ATTEMPTS} attempts: \
             another program keeps changing nftables"
        ),
    )
    .hint("find the program: nft monitor"))
}

type TableElements = (Vec<SetElements>, Vec<SetElements>);

/// Returns the elements of all NICs, in one list for each set.
fn elements_of_all<'a>(nics: impl IntoIterator<Item = &'a Nic>) -> TableElements {
    let mut all = TableElements::default();
    for nic in nics {
        let (bridge, inet) = nic_elements::elements_of(nic);
        merge(&mut all.0, bridge);
        merge(&mut all.1, inet);
    }
    all
}

fn merge(all: &mut Vec<SetElements>, more: Vec<SetElements>) {
    for members in more {
        match all.iter_mut().find(|known| known.set.name == members.set.name) {
            Some(known) => known.elements.extend(members.elements),
            None => all.push(members),
        }
    }
}

type RawSetElements = Vec<(Set, Vec<RawElement>)>;
type RawTableElements = (RawSetElements, RawSetElements);

/// Encodes the elements for the kernel.
fn encode(members: &TableElements) -> RawTableElements {
    let of = |all: &[SetElements]| {
        all.iter().map(|m| (m.set, m.elements.iter().map(Element::encode).collect())).collect()
    };
    (of(&members.0), of(&members.1))
}

fn steps<'a>(
    bridge: &'a Table,
    inet: &'a Table,
    members: &'a RawTableElements,
    step: fn(&'a Table, &'a Set, &'a [RawElement]) -> Step<'a>,
) -> Vec<Step<'a>> {
    let of = |table, members: &'a RawSetElements| {
        members.iter().map(move |(set, elements)| step(table, set, elements))
    };
    of(bridge, &members.0).chain(of(inet, &members.1)).collect()
}
