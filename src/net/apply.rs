//! Makes the host what a [`Segment`] says, and plugs taps into it.
//!
//! ```text
//!            no bridge ──ensure──▶ bridge, rules ──plug──▶ … with a tap
//!                ▲                  │      ▲                   │
//!                └─────release──────┘      └─ the tap's fd is closed
//! ```
//! `ensure` looks at the kernel, has `diff` say what is missing, and does that; where nothing is, it costs a
//! few messages. Nothing else of the host changes, but `net.ipv4.ip_forward`, which is switched on and stays on: others may have
//! come to need it.
//!
//! Callers hold the network's lock from `ensure` or `plug` until the VM's record says so, and over `release`: the
//! kernel can not remove a bridge only if it has no port. All that happens without the lock (an operator, another
//! installation) is settled: what exists already or has gone already is looked at again.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use super::change::{Change, Port, Rules};
use super::diff::{self, Seen, diff, is_ours};
use super::link::{Link, Links};
use super::plan::{Keeper, Segment};
use super::{firewall, kept, nft, sysctl, tap};
use crate::crash;
use crate::error::{Error, ErrorKind, Result};
use crate::link_name::LinkName;

/// How often a bridge may change under our hands before we give up: once for each step of making it, and again.
const ATTEMPTS: u32 = 8;

/// A tap on its bridge.
#[derive(Debug)]
pub struct Plug {
    /// The tap, once for each queue: it is gone from the host when these and every copy of them are closed.
    pub queues: Vec<OwnedFd>,
    /// `/dev/vhost-net`, once for each queue; none where the host has no such device.
    pub vhost: Vec<OwnedFd>,
    /// Largest packet that the network carries, bytes; the guest must be told if it is not 1500.
    pub mtu: u32,
}

/// What the host lacks for the segment and for those of `ports` that exist, in order. Changes nothing.
///
/// # Errors
/// As [`ensure`].
pub fn missing(segment: &Segment, ports: &[Port]) -> Result<Vec<Change>> {
    diff(segment, &look(&Links::open()?, segment, ports)?)
}

/// Makes the segment's bridge work, if it does not, with those of `ports` plugged in that exist. Twice is once.
///
/// What it made before a failure stays: [`release`] removes it.
///
/// # Errors
/// [`ErrorKind::Conflict`] if the bridge or its subnet is somebody else's, with nothing changed;
/// [`ErrorKind::NetworkNotFound`] if the operator's bridge or the uplink is not there; [`ErrorKind::Host`] for what the
/// kernel refused.
pub fn ensure(segment: &Segment, ports: &[Port]) -> Result<()> {
    settle(segment, |links| settled(links, segment, look(links, segment, ports)?)).map(drop)
}

/// Makes the tap `port` with so many queues and plugs it into the segment's bridge, which is [`ensure`]d first. If the
/// bridge or its rules are to be made, `everybody` says what all VMs on it want of it together, and who they are: a
/// bridge that somebody removed leaves its taps behind, and one VM's rules are not all.
///
/// # Errors
/// As [`ensure`]; [`ErrorKind::Conflict`] if a link of that name exists.
pub fn plug(
    port: &Port,
    segment: &Segment,
    queues: usize,
    everybody: impl Fn() -> Result<(Segment, Vec<Port>)>,
) -> Result<Plug> {
    settle(segment, |links| {
        let seen = look(links, segment, &[])?;
        let settled = if seen.bridge.is_some() && seen.rules_hold {
            settled(links, segment, seen)?
        } else {
            let (all, ports) = everybody()?;
            settled(links, &all, look(links, &all, &ports)?)?
        };
        let Some((seen, bridge)) = settled else { return Ok(None) };
        let name = &port.link;
        let taps = tap::create(name, queues)?;
        crash::point!("tap made");
        // The host has no business on this wire: no address of its own, no router discovery towards the guest.
        sysctl::ensure(&format!("ipv6/conf/{name}/disable_ipv6"), "1")?;
        for change in diff::plug(segment, &seen, port, Some(tap::host_mac(name)), bridge.mtu) {
            if !links.make(&change)? {
                return Ok(None);
            }
        }
        crash::point!("tap on its bridge");
        Ok(Some(Plug {
            vhost: tap::vhost(queues)?,
            queues: taps,
            mtu: segment.mtu.unwrap_or(bridge.mtu),
        }))
    })
}

/// Removes the segment's bridge and rules if they are ours, no VM's port is left and nobody keeps it. Whether they are gone.
///
/// # Errors
/// [`ErrorKind::Host`] for what the kernel refused.
pub fn release(segment: &Segment) -> Result<bool> {
    let Keeper::Cpi { uplink, .. } = &segment.keeper else { return Ok(true) };
    let links = Links::open()?;
    let tagged = uplink.as_ref().map(diff::vlan_name);
    let tagged = tagged
        .map(|name| Ok::<_, Error>(links.find(&name)?.map(|link| (name, link))))
        .transpose()?
        .flatten();
    remove(&links, &segment.bridge, tagged.as_ref())
}

/// Whether [`release_stray`] would find anything to remove.
///
/// # Errors
/// As [`release`].
pub fn is_stray(bridge: &LinkName) -> Result<bool> {
    let links = Links::open()?;
    let Some(link) = links.find(bridge)?.filter(|link| is_ours(link, bridge)) else {
        return Ok(false);
    };
    Ok(!kept::is_kept(&link) && links.ports(link.index)?.iter().all(diff::is_our_vlan))
}

/// As [`release`], for a bridge whose segment is in no record any more.
///
/// # Errors
/// As there.
pub fn release_stray(bridge: &LinkName) -> Result<bool> {
    let links = Links::open()?;
    let Some(link) = links.find(bridge)?.filter(|link| is_ours(link, bridge)) else {
        return Ok(true);
    };
    let tagged = links.ports(link.index)?.into_iter().find(diff::is_our_vlan);
    let tagged = tagged.and_then(|link| Some((LinkName::parse(&link.name).ok()?, link)));
    remove(&links, bridge, tagged.as_ref())
}

fn remove(links: &Links, bridge: &LinkName, tagged: Option<&(LinkName, Link)>) -> Result<bool> {
    let found = links.find(bridge)?.filter(|link| is_ours(link, bridge));
    if let Some(link) = &found {
        let is_tagged = |port: &Link| tagged.is_some_and(|(_, tagged)| tagged == port);
        if kept::is_kept(link) || !links.ports(link.index)?.iter().all(is_tagged) {
            return Ok(false);
        }
    }
    // The kernel waits for pauses of every CPU (RCU), 40 ms for the bridge and 12 for the table; so both at once.
    std::thread::scope(|threads| {
        let rules = threads.spawn(|| firewall::drop_all(bridge));
        let removed =
            found.iter().map(|link| (bridge, link)).chain(tagged.iter().map(|(n, l)| (n, l)));
        for (name, link) in removed {
            tracing::info!(link = %name, "removing a link that no VM needs");
            links.delete(name, link.index)?;
            crash::point!("link removed");
        }
        rules.join().expect("no panic")
    })?;
    crash::point!("rules removed");
    Ok(true)
}

/// Which of these links are there.
///
/// # Errors
/// As [`release`].
pub fn present(names: &[LinkName]) -> Result<Vec<LinkName>> {
    let links = Links::open()?;
    let found = names.iter().map(|name| Ok(links.find(name)?.map(|_| name.clone())));
    found.filter_map(Result::transpose).collect()
}

/// Removes a tap that something keeps alive after its VM, if it is there.
///
/// # Errors
/// [`ErrorKind::Conflict`] if the link of that name is no tap.
pub fn remove_tap(name: &LinkName) -> Result<()> {
    let links = Links::open()?;
    let Some(link) = links.find(name)? else { return Ok(()) };
    if link.kind.as_deref() != Some("tun") {
        return Err(Error::new(ErrorKind::Conflict, format!("link '{name}' is not a tap")));
    }
    links.delete(name, link.index).map(drop)
}

/// Repeats `attempt`, on one socket, while it finds the host changing.
fn settle<T>(segment: &Segment, mut attempt: impl FnMut(&Links) -> Result<Option<T>>) -> Result<T> {
    let links = Links::open()?;
    for _ in 0..ATTEMPTS {
        if let Some(done) = attempt(&links)? {
            return Ok(done);
        }
        links.forget();
    }
    Err(Error::new(
        ErrorKind::Conflict,
        format!("bridge '{}' keeps being removed by somebody else", segment.bridge),
    ))
}

/// Does what is missing of what was seen. What was seen before, and the bridge as it works now; or `None` if it must be looked at again.
fn settled(links: &Links, segment: &Segment, seen: Seen) -> Result<Option<(Seen, Link)>> {
    let changes = match diff(segment, &seen) {
        Ok(changes) => changes,
        // It may be about the bridge itself, made by somebody else between two looks at it.
        Err(error) => {
            let now = links.find(&segment.bridge)?.map(|link| link.index);
            return if now == seen.bridge.map(|link| link.index) { Err(error) } else { Ok(None) };
        }
    };
    for change in &changes {
        let done = match change {
            Change::Write { key, value } => sysctl::ensure(key, value).map(|()| true),
            Change::Rules(Rules(table)) => nft::replace(table).map(|()| true),
            change => {
                tracing::debug!(%change, "changing the host's network");
                links.make(change)
            }
        };
        if !done? {
            return Ok(None);
        }
        crash::point!("network changed");
    }
    let bridge = match &seen.bridge {
        Some(bridge) if changes.is_empty() => Some(bridge.clone()),
        _ => links.find(&segment.bridge)?,
    };
    Ok(bridge.map(|bridge| (seen, bridge)))
}

/// All that `diff` wants to know.
fn look(links: &Links, segment: &Segment, ports: &[Port]) -> Result<Seen> {
    let mut seen = Seen {
        bridge: links.find(&segment.bridge)?,
        ports: existing(links, ports)?,
        ..Seen::default()
    };
    let Keeper::Cpi { addresses, uplink, .. } = &segment.keeper else {
        return Ok(Seen { rules_hold: true, ..seen });
    };
    let index = seen.bridge.as_ref().map(|link| link.index);
    for (at, address) in links.addresses()? {
        if Some(at) == index { seen.own.push(address) } else { seen.foreign.push(address) }
    }
    if let Some(index) = index {
        let families =
            [addresses.iter().find(|a| a.is_ipv4()), addresses.iter().find(|a| a.is_ipv6())];
        for like in families.into_iter().flatten() {
            seen.routes.extend(links.routes_to(index, like.ip())?);
        }
    }
    match uplink {
        Some(uplink) => {
            seen.world = links.find(&uplink.link)?;
            seen.tagged = links.find(&diff::vlan_name(uplink))?;
        }
        None if segment.mtu.is_none() && seen.bridge.is_none() => {
            seen.world = links.to_the_world()?
        }
        None => {}
    }
    seen.settings = settings(&segment.bridge)?;
    seen.rules_hold =
        firewall::table(segment, &seen.own).map_or(Ok(true), |table| nft::holds(&table))?;
    Ok(seen)
}

fn existing(links: &Links, ports: &[Port]) -> Result<Vec<(Port, Link)>> {
    let found =
        ports.iter().map(|port| Ok(links.find(&port.link)?.map(|link| (port.clone(), link))));
    found.filter_map(Result::transpose).collect()
}

fn settings(bridge: &LinkName) -> Result<BTreeMap<String, String>> {
    let of_bridge =
        ["accept_ra", "disable_ipv6", "accept_dad"].map(|key| format!("ipv6/conf/{bridge}/{key}"));
    let keys = diff::SWITCHES.map(str::to_owned).into_iter().chain(of_bridge);
    keys.filter_map(|key| Some(sysctl::read(&key).transpose()?.map(|value| (key, value)))).collect()
}
