//! The checks of what the configuration expects of this host.

use crate::config::Config;
use crate::cpi::context::Context;
use crate::error::{Error, ErrorKind, Result};
use crate::link_name::LinkName;
use crate::net::plan;
use crate::net::profile::Profile;
use crate::store::record::Keeper;

/// Checks that each configured pool is there, and is the directory that was used before.
pub(super) fn ensure_pools(config: &Config) -> Result<((), String)> {
    let pools = Context::new(config.clone(), None).store.pools().clone();
    for name in config.pools.keys() {
        pools.dir(name)?;
    }
    Ok(((), format!("{} configured", config.pools.len())))
}

/// Checks that the host has the links that the configured networks do not make themselves.
pub(super) fn ensure_links(config: &Config) -> Result<((), String)> {
    for (name, network) in &config.networks {
        let explain = |e: Error| e.during(format!("host network '{name}'"));
        let profile = Profile::load(&network.profile, config.network_profiles_dir.as_deref())
            .map_err(explain)?;
        let Some(segment) = plan::configured_segment(name, network, &profile)? else { continue };
        match &segment.keeper {
            Keeper::Operator => ensure_link("bridge", &segment.bridge).map_err(explain)?,
            Keeper::Cpi { uplink: Some(uplink), .. } => {
                ensure_link("uplink", &uplink.link).map_err(explain)?;
            }
            Keeper::Cpi { .. } => {}
        }
    }
    Ok(((), format!("{} configured", config.networks.len())))
}

fn ensure_link(role: &str, link: &LinkName) -> Result<()> {
    nix::net::if_::if_nametoindex(link.as_str()).map(drop).map_err(|_| {
        let message = format!("this host has no link '{link}', the network's {role}");
        Error::new(ErrorKind::Host, message).hint("create it, or correct the configuration")
    })
}
