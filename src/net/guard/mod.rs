//! What a guest may send, and what reaches it: two tables of ours, `bosh-qemu-guard` for bridges and for the host's IP.
//!
//! ```text
//!    store::NicRules ── elements (pure) ──▶ add · remove ──▶ one transaction
//!                                              ▲
//!                             rules (the same for all VMs)
//! ```
//! The tables are there as long as any VM is. A VM is nothing but elements of their sets, which name its taps: a
//! packet costs the same, and a VM costs the same, however many VMs there are. Elements outlive a tap that goes and
//! comes again, so a VM is never on a wire without them.
//!
//! Several calls and supervisors do this at once, maybe with state directories of their own. Nobody waits for a lock:
//! a transaction says what it was based on, and is tried again if that has changed.

mod elements;
mod rules;

use self::elements::Members;
use super::nft::{self, Outcome, Step, Table};
use crate::error::{Error, ErrorKind, Result};
use crate::store::record::Nic;

/// How often the host's tables may change under our hands before we give up. Each time somebody got something done.
const ATTEMPTS: u32 = 64;

/// Puts the rules of `nics` in force. Should the tables be lost or another version's, they are written anew with the
/// cards of `others`: all VMs there are.
///
/// # Errors
/// [`ErrorKind::Host`] for what the kernel refused; [`ErrorKind::Conflict`] if the tables never stay as they are.
pub fn add(nics: &[Nic], others: impl Fn() -> Result<Vec<Nic>>) -> Result<()> {
    if nics.iter().all(|nic| nic.tap().is_none() || nic.rules.is_none()) {
        return Ok(());
    }
    let (bridge, inet) = (rules::bridge_table(), rules::inet_table());
    until_done(|| {
        let generation = nft::generation()?;
        if nft::holds(&bridge)? && nft::holds(&inet)? {
            let members = collect(nics);
            return nft::commit(&steps(&bridge, &inet, &members, Step::Add), None);
        }
        tracing::info!("writing the guard's tables");
        let members = collect(nics.iter().chain(&others()?));
        let mut steps = steps(&bridge, &inet, &members, Step::Add);
        steps.splice(..0, [Step::Replace(&bridge), Step::Replace(&inet)]);
        nft::commit(&steps, Some(generation))
    })
}

/// Whether `nics` have rules and the tables for them are lost, or another version's.
///
/// # Errors
/// [`ErrorKind::Host`] for what the kernel refused.
pub fn is_lost(nics: &[Nic]) -> Result<bool> {
    let ruled = nics.iter().any(|nic| nic.tap().is_some() && nic.rules.is_some());
    Ok(ruled && !(nft::holds(&rules::bridge_table())? && nft::holds(&rules::inet_table())?))
}

/// Removes everything of `nics`, and the tables with the last of all.
///
/// # Errors
/// As [`add`].
pub fn remove(nics: &[Nic]) -> Result<()> {
    let members = collect(nics);
    if members.0.is_empty() {
        return Ok(());
    }
    let (bridge, inet) = (rules::bridge_table(), rules::inet_table());
    // Gone already, with the tables.
    let _: Outcome = nft::commit(&steps(&bridge, &inet, &members, Step::Remove), None)?;
    until_done(|| {
        let generation = nft::generation()?;
        if !nft::is_empty(&inet, &rules::TAPS)? {
            return Ok(Outcome::Done);
        }
        let both = [Step::Drop(bridge.family, &bridge.name), Step::Drop(inet.family, &inet.name)];
        nft::commit(&both, Some(generation))
    })
}

fn until_done(mut attempt: impl FnMut() -> Result<Outcome>) -> Result<()> {
    for _ in 0..ATTEMPTS {
        if attempt()? == Outcome::Done {
            return Ok(());
        }
    }
    Err(Error::new(ErrorKind::Conflict, "the tables 'bosh-qemu-guard' keep being changed by somebody else"))
}

type Both = (Vec<Members>, Vec<Members>);

/// The elements of all cards, in one list for each set.
fn collect<'a>(nics: impl IntoIterator<Item = &'a Nic>) -> Both {
    let mut all = Both::default();
    for nic in nics {
        let (bridge, inet) = elements::of_nic(nic);
        merge(&mut all.0, bridge);
        merge(&mut all.1, inet);
    }
    all
}

fn merge(all: &mut Vec<Members>, more: Vec<Members>) {
    for members in more {
        match all.iter_mut().find(|known| known.set.name == members.set.name) {
            Some(known) => known.elements.extend(members.elements),
            None => all.push(members),
        }
    }
}

fn steps<'a>(
    bridge: &'a Table,
    inet: &'a Table,
    members: &'a Both,
    step: fn(&'a Table, &'a nft::Set, &'a [nft::Element]) -> Step<'a>,
) -> Vec<Step<'a>> {
    let of = |table, members: &'a [Members]| members.iter().map(move |m| step(table, &m.set, &m.elements));
    of(bridge, &members.0).chain(of(inet, &members.1)).collect()
}
