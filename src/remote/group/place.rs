//! Which host a new VM is put on. Pure: offers in, an order out.
//!
//! Hosts are left out that can not be asked, are draining, have not the stemcell, the pool or the memory. Of the others one
//! comes first on which an earlier try left a VM with the same address, that nobody was told of: there it makes way, elsewhere
//! both would have the address. Then come those that have the fewest VMs of the same group, then those with the most memory
//! left. A VM whose disks are on a host that alone reaches them is put there, or nowhere; one whose disks are in a shared
//! pool, on any host that has the pool.

use std::cmp::Reverse;

use crate::cpi::offer::Offer;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{Bytes, MiB};

/// A host that could have it.
pub struct Candidate<'a> {
    /// Its name.
    pub name: &'a str,
    /// Whether it is to have no new VMs.
    pub draining: bool,
    /// What it has, or why it can not be asked.
    pub offer: Result<Offer, String>,
}

/// What a VM needs of its host.
#[derive(Debug, Clone)]
pub struct Need {
    /// The guest's memory.
    pub ram: MiB,
    /// The pool of its disks; the empty word: the state directory.
    pub pool: String,
    /// What it is made of.
    pub stemcell: String,
    /// Persistent disks that it will probably have.
    pub disks: Vec<String>,
}

/// The hosts that can have the VM, the best first, by their place in `candidates`.
///
/// # Errors
/// [`ErrorKind::VmCreationFailed`] saying of each host why it can not.
pub fn order(candidates: &[Candidate<'_>], need: &Need) -> Result<Vec<usize>> {
    if let Some(home) = home(candidates, need)? {
        let candidate = &candidates[home];
        let objection = objection(candidate, need, true);
        return objection
            .map_or_else(|| Ok(vec![home]), |why| Err(nowhere(&[(candidate.name, why)])));
    }
    let far = |candidate: &Candidate<'_>| {
        let offer = candidate.offer.as_ref().ok()?;
        let disk = roaming(candidates, need).find(|disk| !offer.shared.contains(disk))?;
        Some(format!("it has no shared pool with disk '{disk}'"))
    };
    let judge = |candidate| objection(candidate, need, false).or_else(|| far(candidate));
    let judged: Vec<_> = candidates.iter().map(judge).collect();
    let mut good: Vec<_> = (0..candidates.len()).filter(|at| judged[*at].is_none()).collect();
    good.sort_by_key(|at| {
        let candidate = &candidates[*at];
        let offer = candidate.offer.as_ref().expect("no objection");
        let space = offer.space.get(&need.pool).copied().unwrap_or_default();
        (!offer.forgotten, offer.alike, Reverse(offer.memory), Reverse(space), candidate.name)
    });
    if good.is_empty() {
        let reasons =
            candidates.iter().zip(judged).filter_map(|(host, why)| Some((host.name, why?)));
        return Err(nowhere(&reasons.collect::<Vec<_>>()));
    }
    Ok(good)
}

/// The host that has the VM's disks and alone reaches them. Of several, the one with the most.
fn home(candidates: &[Candidate<'_>], need: &Need) -> Result<Option<usize>> {
    let here = |offer: &Offer, disk: &String| offer.has.contains(disk);
    let offers = || candidates.iter().filter_map(|candidate| candidate.offer.as_ref().ok());
    let lost = need.disks.iter().find(|disk| !offers().any(|offer| here(offer, disk)));
    let silent =
        candidates.iter().find_map(|host| host.offer.as_ref().err().map(|why| (host.name, why)));
    if let (Some(disk), Some((name, why))) = (lost, silent) {
        let message = format!(
            "disk '{disk}' is on none of the hosts that answer, and '{name}' does not: {why}"
        );
        return Err(Error::new(ErrorKind::VmCreationFailed { retry: false }, message).hint(
            "the VM must be where its disk is: bring that host back, or take it out of 'hosts' if it is gone for good",
        ));
    }
    let own = |candidate: &Candidate<'_>| {
        let disks = |offer: &Offer| {
            need.disks.iter().filter(|d| here(offer, d) && !offer.shared.contains(d)).count()
        };
        candidate.offer.as_ref().map_or(0, disks)
    };
    let best = (0..candidates.len()).max_by_key(|at| (own(&candidates[*at]), Reverse(*at)));
    Ok(best.filter(|at| own(&candidates[*at]) > 0))
}

/// The VM's disks that can change hosts: whoever has them has them in a shared pool.
fn roaming<'a>(
    candidates: &'a [Candidate<'_>],
    need: &'a Need,
) -> impl Iterator<Item = &'a String> {
    let offers = || candidates.iter().filter_map(|candidate| candidate.offer.as_ref().ok());
    need.disks.iter().filter(move |disk| {
        offers().any(|offer| offer.has.contains(disk) && offer.shared.contains(disk))
    })
}

/// Why a host can not have the VM. Where its disks are `at_home`, draining is no reason.
fn objection(candidate: &Candidate<'_>, need: &Need, at_home: bool) -> Option<String> {
    let offer = match &candidate.offer {
        Err(why) => return Some(why.clone()),
        Ok(_) if candidate.draining && !at_home => return Some("it is draining".to_owned()),
        Ok(offer) => offer,
    };
    if !offer.has.contains(&need.stemcell) {
        return Some(format!("it has no stemcell '{}'", need.stemcell));
    }
    if !offer.space.contains_key(&need.pool) {
        return Some(format!("it has no pool '{}'", need.pool));
    }
    let mib = |bytes: Bytes| format!("{} MiB", bytes.get() >> 20);
    let short = offer.memory < need.ram.bytes();
    short.then(|| format!("it has memory for a VM of {}, not of {}", mib(offer.memory), need.ram))
}

fn nowhere(reasons: &[(&str, String)]) -> Error {
    let reasons: Vec<_> = reasons.iter().map(|(name, why)| format!("{name}: {why}")).collect();
    let message = format!("no host can have the VM: {}", reasons.join("; "));
    Error::new(ErrorKind::VmCreationFailed { retry: false }, message)
        .hint("a host that was added later gets the stemcell by `bosh upload-stemcell --fix`")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(memory_mib: u64, alike: usize, has: &[&str]) -> Offer {
        Offer {
            memory: Bytes(memory_mib << 20),
            alike,
            has: has.iter().map(|cid| (*cid).to_owned()).collect(),
            space: [(String::new(), Bytes(1 << 40))].into(),
            ..Offer::default()
        }
    }

    fn host(name: &str, offer: Offer) -> Candidate<'_> {
        Candidate { name, draining: false, offer: Ok(offer) }
    }

    fn silent(name: &str) -> Candidate<'_> {
        Candidate { name, draining: false, offer: Err("connection refused".into()) }
    }

    fn need(disks: &[&str]) -> Need {
        let disks = disks.iter().map(|disk| (*disk).to_owned()).collect();
        Need { ram: MiB::new(1024).unwrap(), pool: String::new(), stemcell: "sc".into(), disks }
    }

    fn names(candidates: &[Candidate<'_>], need: &Need) -> Vec<String> {
        order(candidates, need)
            .unwrap()
            .into_iter()
            .map(|at| candidates[at].name.to_owned())
            .collect()
    }

    fn refusal(candidates: &[Candidate<'_>], need: &Need) -> String {
        order(candidates, need).unwrap_err().report()
    }

    #[test]
    fn vms_of_a_group_are_spread_and_then_memory_counts() {
        let hosts = [
            host("a", offer(9000, 1, &["sc"])),
            host("b", offer(2000, 0, &["sc"])),
            host("c", offer(4000, 0, &["sc"])),
            silent("d"),
        ];
        assert_eq!(names(&hosts, &need(&[])), ["c", "b", "a"]);
    }

    #[test]
    fn a_vm_is_put_where_one_that_nobody_knows_has_its_address() {
        let hosts = [
            host("a", offer(9000, 0, &["sc"])),
            host("b", Offer { forgotten: true, ..offer(2000, 3, &["sc"]) }),
            host("c", Offer { forgotten: true, ..offer(9000, 0, &[]) }),
        ];
        assert_eq!(names(&hosts, &need(&[])), ["b", "a"]);
    }

    #[test]
    fn who_is_draining_or_lacks_something_is_left_out_and_says_why() {
        let hosts = [
            Candidate { draining: true, ..host("a", offer(9000, 0, &["sc"])) },
            host("b", offer(1023, 0, &["sc"])),
            host("c", offer(9000, 0, &[])),
            host("d", Offer { space: [].into(), ..offer(9000, 0, &["sc"]) }),
            silent("e"),
        ];
        assert_eq!(
            refusal(&hosts, &need(&[])),
            "no host can have the VM: a: it is draining; b: it has memory for a VM of 1023 MiB, not of 1 GiB; c: it has \
             no stemcell 'sc'; d: it has no pool ''; e: connection refused\nHint: a host that was added later gets the \
             stemcell by `bosh upload-stemcell --fix`"
        );
    }

    #[test]
    fn a_vm_is_put_where_its_disk_is_or_nowhere() {
        let on_b = |memory, draining| {
            [
                host("a", offer(9000, 0, &["sc"])),
                Candidate { draining, ..host("b", offer(memory, 3, &["sc", "disk"])) },
            ]
        };
        assert_eq!(names(&on_b(2000, true), &need(&["disk"])), ["b"], "draining or not");
        assert!(
            refusal(&on_b(10, false), &need(&["disk"]))
                .starts_with("no host can have the VM: b: it has memory")
        );
        let mut shared = on_b(2000, true);
        shared[1].offer.as_mut().unwrap().shared = vec!["disk".into()];
        assert_eq!(
            refusal(&shared, &need(&["disk"])).lines().next().unwrap(),
            "no host can have the VM: a: it has no shared pool with disk 'disk'; b: it is draining"
        );
        shared[0].offer.as_mut().unwrap().shared = vec!["disk".into()];
        assert_eq!(names(&shared, &need(&["disk"])), ["a"], "it reaches the disk, too");
    }

    #[test]
    fn a_disk_that_may_be_on_a_silent_host_holds_its_vm_back() {
        let hosts = [host("a", offer(9000, 0, &["sc"])), silent("b")];
        assert!(
            refusal(&hosts, &need(&["disk"]))
                .starts_with("disk 'disk' is on none of the hosts that answer, and 'b'")
        );
        assert_eq!(
            names(&hosts[..1], &need(&["disk"])),
            ["a"],
            "a disk that nobody knows is no reason"
        );
    }
}
