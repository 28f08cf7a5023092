//! Whether somebody else on the wire has an address of the VM, asked while QEMU starts.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use tokio::task::{JoinHandle, spawn_blocking};

use super::Scope;
use crate::error::{Error, ErrorKind, Result};
use crate::link_name::LinkName;
use crate::mac::MacAddress;
use crate::net::probe;
use crate::store::Phase;
use crate::store::record::{Nic, VmRecord};

/// The questions that are being asked, one for each card.
pub(super) struct Questions(Vec<(String, JoinHandle<Answer>)>);

/// Who has which address, if anybody has one.
type Answer = Result<Option<(IpAddr, MacAddress)>>;

/// Asks for the addresses of cards that want it, on bridges that are there, if the VM is new: one that has them already
/// starts again whoever else took one.
pub(super) fn ask(vm: &VmRecord) -> Questions {
    let question = |nic: &Nic| {
        let (_, segment) = nic.tap()?;
        // Frames that the host itself sends are on none of a bridge's VLANs but its own.
        let rules = nic.rules.as_ref().filter(|rules| rules.probe && segment.vlan.is_none())?;
        let single = |block: &IpNetwork| block.prefix() == if block.is_ipv4() { 32 } else { 128 };
        let addresses: Vec<_> =
            rules.addresses.iter().filter(|block| single(block)).map(IpNetwork::ip).collect();
        let (bridge, mac): (LinkName, _) = (segment.bridge.clone(), nic.mac);
        let asked = move || probe::holder(&bridge, &addresses, mac);
        Some((nic.network.clone(), spawn_blocking(asked)))
    };
    let nics = if vm.phase == Phase::Creating { vm.nics.as_slice() } else { &[] };
    Questions(nics.iter().filter_map(question).collect())
}

impl Questions {
    /// Waits for the answers.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] naming who has an address; what could not be asked is logged and no reason to stop.
    pub(super) async fn settle(self, scope: &Scope) -> Result<()> {
        for (network, question) in self.0 {
            match question.await.expect("no panic") {
                Ok(None) => {}
                Ok(Some((ip, _))) if wanders(scope, ip)? => {}
                Ok(Some((ip, mac))) => {
                    let problem = format!(
                        "network '{network}': {ip} is held by a machine outside, with the MAC {mac}"
                    );
                    return Err(Error::new(ErrorKind::Conflict, problem).hint(
                        "if that is right, as for an address that wanders, set conflict_probe to false for that network",
                    ));
                }
                Err(error) => tracing::warn!(
                    network,
                    error = error.report(),
                    "could not look for address conflicts"
                ),
            }
        }
        Ok(())
    }
}

/// Whether one of our VMs may hold the address for a while. Only asked if somebody does.
fn wanders(scope: &Scope, ip: IpAddr) -> Result<bool> {
    let others =
        scope.store.list_readable::<VmRecord>()?.into_iter().filter(|vm| vm.cid != scope.cid);
    let rules = others.flat_map(|vm| vm.nics).filter_map(|nic| nic.rules);
    Ok(rules.flat_map(|rules| rules.allowed).any(|subnet| subnet.contains(ip)))
}
