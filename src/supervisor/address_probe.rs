//! Address probes: whether another machine on the network has an address of a new VM. They run
//! while QEMU starts.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use tokio::task::{JoinHandle, spawn_blocking};

use super::VmContext;
use crate::error::{Error, ErrorKind, Result};
use crate::link_name::LinkName;
use crate::mac::MacAddress;
use crate::net::probe;
use crate::store::Phase;
use crate::store::record::{Nic, VmRecord};

/// The running probes, one for each NIC, with the name of its network.
pub(super) struct AddressProbes(Vec<(String, JoinHandle<ProbeResult>)>);

/// The address that another machine has, with the MAC of that machine; `None` if all are free.
type ProbeResult = Result<Option<(IpAddr, MacAddress)>>;

/// Starts the probes of a new VM's NICs, where their network wants it. A VM that had its addresses
/// before is not probed: it starts even if another machine has taken one.
pub(super) fn start(vm: &VmRecord) -> AddressProbes {
    let probe_nic = |nic: &Nic| {
        let (_, segment) = nic.tap()?;
        // The host's own frames reach only the bridge's own VLAN, so a NIC on another VLAN cannot
        // be probed.
        let rules = nic.rules.as_ref().filter(|rules| rules.probe && segment.vlan.is_none())?;
        let single = |block: &IpNetwork| block.prefix() == if block.is_ipv4() { 32 } else { 128 };
        let addresses: Vec<_> =
            rules.addresses.iter().filter(|block| single(block)).map(IpNetwork::ip).collect();
        let (bridge, mac): (LinkName, _) = (segment.bridge.clone(), nic.mac);
        let run = move || probe::find_holder(&bridge, &addresses, mac);
        Some((nic.network.clone(), spawn_blocking(run)))
    };
    let nics = if vm.phase == Phase::Creating { vm.nics.as_slice() } else { &[] };
    AddressProbes(nics.iter().filter_map(probe_nic).collect())
}

impl AddressProbes {
    /// Waits for the results. A probe that fails is logged and does not stop the launch.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] naming the address and the MAC of the machine that has it.
    pub(super) async fn finish(self, context: &VmContext) -> Result<()> {
        for (network, probe) in self.0 {
            match probe.await.expect("no panic") {
                Ok(None) => {}
                Ok(Some((ip, _))) if is_floating_address(context, ip)? => {}
                Ok(Some((ip, mac))) => {
                    let problem = format!(
                        "network '{network}': {ip} is held by another machine, with the MAC {mac}"
                    );
                    return Err(Error::new(ErrorKind::Conflict, problem).hint(
                        "if both may use it, as with a floating address, \
                         set `conflict_probe: false` for that network",
                    ));
                }
                Err(error) => tracing::warn!(
                    network,
                    error = error.report(),
                    "could not probe the network for address conflicts"
                ),
            }
        }
        Ok(())
    }
}

/// Returns whether another VM of this host is allowed to use the address, as a floating address.
fn is_floating_address(context: &VmContext, ip: IpAddr) -> Result<bool> {
    let others =
        context.store.list_readable::<VmRecord>()?.into_iter().filter(|vm| vm.cid != context.cid);
    let rules = others.flat_map(|vm| vm.nics).filter_map(|nic| nic.rules);
    Ok(rules.flat_map(|rules| rules.allowed).any(|subnet| subnet.contains(ip)))
}
