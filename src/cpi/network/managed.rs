//! Managed networks: those that the Director creates for `managed: true`.
//!
//! Its record holds a managed network as the configuration would describe it. The bridge is named
//! after the cid, and pinned: it stays without VMs until delete_network.

use serde_json::Value;

use crate::cid::{Cid, NetworkCid};
use crate::config;
use crate::cpi::context::Context;
use crate::cpi::creation::acknowledgement;
use crate::error::{Error, ErrorKind, Result};
use crate::net::plan;
use crate::net::profile::{Profile, Wiring};
use crate::schema::Property;
use crate::store::record::{NetworkRecord, Segment};

/// The managed network, as the configuration would describe it.
///
/// # Errors
/// [`ErrorKind::NetworkNotFound`].
pub(super) fn find(cx: &Context, cid: &NetworkCid) -> Result<config::Network> {
    settings(&cx.ready::<NetworkRecord>(cid)?.ok_or_else(|| not_found(cid))?)
}

/// Ensures that managed networks still exist once a VM has reserved addresses on them.
/// delete_network writes the phase `deleting` before it looks for reservations, so one of the two
/// calls sees the other.
pub(in crate::cpi) fn ensure_exist<'a>(
    cx: &Context,
    mut networks: impl Iterator<Item = &'a NetworkCid>,
) -> Result<()> {
    networks.try_for_each(|cid| {
        find(cx, cid)?;
        acknowledgement::acknowledge::<NetworkRecord>(cx, cid);
        Ok(())
    })
}

/// Whether the host network `name` is a managed one, which only delete_network removes.
pub(crate) fn is_managed(cx: &Context, name: &str) -> Result<bool> {
    let Ok(cid) = NetworkCid::parse(name) else { return Ok(false) };
    Ok(cx.store.read::<NetworkRecord>(&cid)?.is_some())
}

/// The configuration in a record.
pub(super) fn settings(record: &NetworkRecord) -> Result<config::Network> {
    config::Network::from_json(&Value::Object(record.settings.clone())).map_err(|e| {
        Error::new(ErrorKind::Corrupt, format!("the record of network '{}'", record.cid)).because(e)
    })
}

/// The bridge and addresses of the network.
///
/// # Errors
/// [`ErrorKind::BadRequest`] for a profile whose networks have no bridge of this host's own.
pub(super) fn segment(cx: &Context, record: &NetworkRecord) -> Result<Segment> {
    let network = settings(record)?;
    let profile = Profile::load(&network.profile, cx.config.network_profiles_dir.as_deref())
        .map_err(|e| e.with_kind(ErrorKind::BadRequest))?;
    if profile.wire != Wiring::OwnBridge {
        let message = format!("a managed network cannot have the profile '{}'", network.profile);
        return Err(Error::new(ErrorKind::BadRequest, message)
            .hint("use a profile that makes a bridge: nat, routed or isolated"));
    }
    plan::configured_segment(record.cid.as_str(), &network, &profile)?
        .ok_or_else(|| Error::new(ErrorKind::Internal, "a managed network without a bridge"))
}

pub(super) fn not_found(cid: &NetworkCid) -> Error {
    Error::new(ErrorKind::NetworkNotFound, format!("there is no network '{cid}'"))
}
