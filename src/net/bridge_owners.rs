//! Owners of a bridge: the state directories that keep it while no VM is on it.
//!
//! Several state directories may use one bridge, and none sees the pins of another. The bridge's
//! alias therefore lists its owners: `bosh-qemu-cpi:<network> kept by <owner>,<owner>`. A bridge
//! with an owner stays when its last port goes.

use super::change::{Change, LinkSettings};
use super::diff::is_cpi_bridge;
use super::link::{Link, Links};
use crate::error::Result;
use crate::link_name::LinkName;
use crate::store::StateDirId;

/// Text in the alias between the network and the owners.
const OWNERS_SEPARATOR: &str = " kept by ";

/// Adds `owner` to the bridge's owners, if the bridge exists and the CPI made it.
///
/// # Errors
/// [`ErrorKind::Host`](crate::error::ErrorKind::Host) if the kernel refuses the change.
pub fn add_owner(bridge: &LinkName, owner: &StateDirId) -> Result<()> {
    update_owners(bridge, |owners| {
        if !owners.iter().any(|known| known == owner.as_str()) {
            owners.push(owner.to_string());
        }
    })
}

/// Removes `owner` from the bridge's owners.
///
/// # Errors
/// As [`add_owner`].
pub fn remove_owner(bridge: &LinkName, owner: &StateDirId) -> Result<()> {
    update_owners(bridge, |owners| owners.retain(|known| known != owner.as_str()))
}

/// Returns the bridges that `owner` owns.
///
/// # Errors
/// As [`add_owner`].
pub fn owned_by(owner: &StateDirId) -> Result<Vec<LinkName>> {
    let mut links = Links::open()?.all()?;
    links.retain(|link| owners_of(link).any(|known| known == owner.as_str()));
    let names =
        links.iter().filter_map(|link| LinkName::parse(&link.name).ok().map(|name| (name, link)));
    Ok(names.filter(|(name, link)| is_cpi_bridge(link, name)).map(|(name, _)| name).collect())
}

/// Whether the bridge has an owner.
pub(super) fn has_owner(link: &Link) -> bool {
    owners_of(link).next().is_some()
}

fn owners_of(link: &Link) -> impl Iterator<Item = &str> {
    let owners = link
        .alias
        .as_deref()
        .and_then(|alias| alias.rsplit_once(OWNERS_SEPARATOR))
        .map(|(_, owners)| owners);
    owners.into_iter().flat_map(|owners| owners.split(','))
}

fn update_owners(bridge: &LinkName, change: impl FnOnce(&mut Vec<String>)) -> Result<()> {
    let links = Links::open()?;
    let Some(link) = links.find(bridge)?.filter(|link| is_cpi_bridge(link, bridge)) else {
        return Ok(());
    };
    let before: Vec<_> = owners_of(&link).map(str::to_owned).collect();
    let mut owners = before.clone();
    change(&mut owners);
    if owners != before {
        let alias = link.alias.as_deref().unwrap_or(super::ALIAS_PREFIX);
        let network = alias.rsplit_once(OWNERS_SEPARATOR).map_or(alias, |(network, _)| network);
        let suffix = if owners.is_empty() {
            String::new()
        } else {
            format!("{OWNERS_SEPARATOR}{}", owners.join(","))
        };
        let to =
            LinkSettings { alias: Some(format!("{network}{suffix}")), ..LinkSettings::default() };
        links.apply(&Change::SetLink { link: bridge.clone(), to })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alias_lists_its_owners() {
        // Bridges keep this text over upgrades: every later version must read it.
        let owners = |alias: &str| {
            let link = Link { alias: Some(alias.to_owned()), ..Link::default() };
            owners_of(&link).map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(owners("bosh-qemu-cpi:lab kept by a1,b2"), ["a1", "b2"]);
        assert!(owners("bosh-qemu-cpi:lab").is_empty());
    }
}
