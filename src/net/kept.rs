//! Which state directories keep a bridge of ours without VMs.
//!
//! Several may use one bridge, and none sees the others' pins. So those that keep it are in its alias, where everybody sees
//! them: `bosh-qemu-cpi:<network> kept by <owner>,<owner>`. Whoever removes the last port leaves such a bridge.

use super::change::{Change, Settings};
use super::diff::is_ours;
use super::link::{Link, Links};
use crate::error::Result;
use crate::link_name::LinkName;
use crate::store::StateDirId;

const KEPT: &str = " kept by ";

/// Writes `owner` on the bridge, if that is there and ours.
///
/// # Errors
/// [`ErrorKind::Host`](crate::error::ErrorKind::Host) for what the kernel refused.
pub fn keep(bridge: &LinkName, owner: &StateDirId) -> Result<()> {
    write(bridge, |owners| {
        if !owners.iter().any(|known| known == owner.as_str()) {
            owners.push(owner.to_string());
        }
    })
}

/// Takes `owner` off the bridge again.
///
/// # Errors
/// As [`keep`].
pub fn let_go(bridge: &LinkName, owner: &StateDirId) -> Result<()> {
    write(bridge, |owners| owners.retain(|known| known != owner.as_str()))
}

/// The bridges that `owner` keeps.
///
/// # Errors
/// As [`keep`].
pub fn by(owner: &StateDirId) -> Result<Vec<LinkName>> {
    let mut links = Links::open()?.all()?;
    links.retain(|link| keepers(link).any(|keeper| keeper == owner.as_str()));
    let names =
        links.iter().filter_map(|link| LinkName::parse(&link.name).ok().map(|name| (name, link)));
    Ok(names.filter(|(name, link)| is_ours(link, name)).map(|(name, _)| name).collect())
}

/// Whether anybody keeps it.
pub(super) fn is_kept(link: &Link) -> bool {
    keepers(link).next().is_some()
}

fn keepers(link: &Link) -> impl Iterator<Item = &str> {
    let owners =
        link.alias.as_deref().and_then(|alias| alias.rsplit_once(KEPT)).map(|(_, owners)| owners);
    owners.into_iter().flat_map(|owners| owners.split(','))
}

fn write(bridge: &LinkName, change: impl FnOnce(&mut Vec<String>)) -> Result<()> {
    let links = Links::open()?;
    let Some(link) = links.find(bridge)?.filter(|link| is_ours(link, bridge)) else {
        return Ok(());
    };
    let before: Vec<_> = keepers(&link).map(str::to_owned).collect();
    let mut owners = before.clone();
    change(&mut owners);
    if owners != before {
        let alias = link.alias.as_deref().unwrap_or(super::MARK);
        let network = alias.rsplit_once(KEPT).map_or(alias, |(network, _)| network);
        let kept =
            if owners.is_empty() { String::new() } else { format!("{KEPT}{}", owners.join(",")) };
        let to = Settings { alias: Some(format!("{network}{kept}")), ..Settings::default() };
        links.make(&Change::Set { link: bridge.clone(), to })?;
    }
    Ok(())
}
