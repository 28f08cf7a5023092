//! Which hosts can have a new VM, the best first. Pure: the hosts' reports in, an order out.
//!
//! A host is left out if it does not answer, is draining, or lacks the stemcell, the pool or the
//! memory. The order of the others:
//!
//! 1. Hosts with an unacknowledged VM that has the new VM's address, left by an earlier try. That
//!    VM makes way there; on another host both VMs would have the address.
//! 2. Hosts with the fewest VMs of the same group.
//! 3. Hosts with the most free memory, then the most free space.
//!
//! If a host alone reaches the VM's disks, the VM is placed there or nowhere. A VM whose disks are
//! in a shared pool can be on any host that has the pool.

use std::cmp::Reverse;

use crate::cpi::capacity::report::HostReport;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{Bytes, MiB};

/// A host that the scheduler considers.
pub struct Candidate<'a> {
    /// Its name.
    pub name: &'a str,
    /// Whether it gets no new VMs.
    pub draining: bool,
    /// Its report, or why it did not answer.
    pub report: Result<HostReport, String>,
}

/// What a VM needs of its host.
#[derive(Debug, Clone)]
pub struct Need {
    /// The guest's memory.
    pub ram: MiB,
    /// The pool of its disks; empty: the state directory.
    pub pool: String,
    /// The cid of its stemcell.
    pub stemcell: String,
    /// The cids of persistent disks that the Director will probably attach.
    pub disks: Vec<String>,
}

/// Returns the indexes in `candidates` of the hosts that can have the VM, the best first; at least
/// one.
///
/// # Errors
/// [`ErrorKind::VmCreationFailed`] with each host's reason if none can.
pub fn order(candidates: &[Candidate<'_>], need: &Need) -> Result<Vec<usize>> {
    if let Some(only) = host_of_local_disks(candidates, need)? {
        let candidate = &candidates[only];
        return match objection(candidate, need, true) {
            None => Ok(vec![only]),
            Some(reason) => Err(no_host(&[(candidate.name, reason)])),
        };
    }
    let objections: Vec<_> = candidates
        .iter()
        .map(|candidate| {
            objection(candidate, need, false)
                .or_else(|| unreachable_disk(candidates, candidate, need))
        })
        .collect();
    let mut suitable: Vec<_> =
        (0..candidates.len()).filter(|at| objections[*at].is_none()).collect();
    suitable.sort_by_key(|at| {
        let candidate = &candidates[*at];
        let report = candidate.report.as_ref().expect("no objection");
        let space = report.space.get(&need.pool).copied().unwrap_or_default();
        let most_free = (Reverse(report.memory), Reverse(space));
        (!report.unacknowledged, report.same_group, most_free, candidate.name)
    });
    if suitable.is_empty() {
        let reasons = candidates
            .iter()
            .zip(objections)
            .filter_map(|(host, objection)| Some((host.name, objection?)));
        return Err(no_host(&reasons.collect::<Vec<_>>()));
    }
    Ok(suitable)
}

/// Returns the host that alone reaches disks of the VM; of several, the one with the most of them.
///
/// # Errors
/// [`ErrorKind::VmCreationFailed`] if no host has a disk, and a host that may have it does not
/// answer.
fn host_of_local_disks(candidates: &[Candidate<'_>], need: &Need) -> Result<Option<usize>> {
    let missing =
        need.disks.iter().find(|disk| !reports(candidates).any(|host| host.has.contains(disk)));
    let silent = candidates
        .iter()
        .find_map(|host| host.report.as_ref().err().map(|reason| (host.name, reason)));
    if let (Some(disk), Some((name, reason))) = (missing, silent) {
        let message = format!(
            "disk '{disk}' is on none of the hosts that answer, and '{name}' does not: {reason}"
        );
        return Err(Error::new(ErrorKind::VmCreationFailed { retry: false }, message).hint(
            "the VM must be on the host of its disk: bring that host back, or remove it from \
             'hosts' if it is lost for good",
        ));
    }
    let local_disks = |at: usize| {
        let is_local = |host: &HostReport, disk: &String| {
            host.has.contains(disk) && !host.shared.contains(disk)
        };
        let count =
            |host: &HostReport| need.disks.iter().filter(|disk| is_local(host, disk)).count();
        candidates[at].report.as_ref().map_or(0, count)
    };
    let best = (0..candidates.len()).max_by_key(|at| (local_disks(*at), Reverse(*at)));
    Ok(best.filter(|at| local_disks(*at) > 0))
}

fn reports<'a>(candidates: &'a [Candidate<'_>]) -> impl Iterator<Item = &'a HostReport> {
    candidates.iter().filter_map(|candidate| candidate.report.as_ref().ok())
}

/// Returns why `candidate` cannot have the VM: a disk in a shared pool that it does not have.
fn unreachable_disk(
    candidates: &[Candidate<'_>],
    candidate: &Candidate<'_>,
    need: &Need,
) -> Option<String> {
    let report = candidate.report.as_ref().ok()?;
    let is_in_shared_pool = |disk: &&String| {
        reports(candidates).any(|host| host.has.contains(disk) && host.shared.contains(disk))
    };
    let disk =
        need.disks.iter().filter(is_in_shared_pool).find(|disk| !report.shared.contains(disk))?;
    Some(format!("it has no shared pool with disk '{disk}'"))
}

/// Returns why the host cannot have the VM. A draining host still gets a VM whose disks it has
/// (`has_disks`).
fn objection(candidate: &Candidate<'_>, need: &Need, has_disks: bool) -> Option<String> {
    let report = match &candidate.report {
        Err(reason) => return Some(reason.clone()),
        Ok(_) if candidate.draining && !has_disks => return Some("it is draining".to_owned()),
        Ok(report) => report,
    };
    if !report.has.contains(&need.stemcell) {
        return Some(format!("it has no stemcell '{}'", need.stemcell));
    }
    if !report.space.contains_key(&need.pool) {
        return Some(format!("it has no pool '{}'", need.pool));
    }
    let mib = |bytes: Bytes| format!("{} MiB", bytes.get() >> 20);
    let is_short = report.memory < need.ram.bytes();
    is_short
        .then(|| format!("it has memory for a VM of {}, not of {}", mib(report.memory), need.ram))
}

fn no_host(reasons: &[(&str, String)]) -> Error {
    let reasons: Vec<_> =
        reasons.iter().map(|(name, reason)| format!("{name}: {reason}")).collect();
    let message = format!("no host can have the VM: {}", reasons.join("; "));
    Error::new(ErrorKind::VmCreationFailed { retry: false }, message)
        .hint("upload the stemcell to a host that was added later: `bosh upload-stemcell --fix`")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(memory_mib: u64, same_group: usize, has: &[&str]) -> HostReport {
        HostReport {
            memory: Bytes(memory_mib << 20),
            same_group,
            has: has.iter().map(|cid| (*cid).to_owned()).collect(),
            space: [(String::new(), Bytes(1 << 40))].into(),
            ..HostReport::default()
        }
    }

    fn host(name: &str, report: HostReport) -> Candidate<'_> {
        Candidate { name, draining: false, report: Ok(report) }
    }

    fn silent(name: &str) -> Candidate<'_> {
        Candidate { name, draining: false, report: Err("connection refused".into()) }
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
            host("a", report(9000, 1, &["sc"])),
            host("b", report(2000, 0, &["sc"])),
            host("c", report(4000, 0, &["sc"])),
            silent("d"),
        ];
        assert_eq!(names(&hosts, &need(&[])), ["c", "b", "a"]);
    }

    #[test]
    fn schedule_prefers_the_host_with_an_unacknowledged_vm_at_the_address() {
        let hosts = [
            host("a", report(9000, 0, &["sc"])),
            host("b", HostReport { unacknowledged: true, ..report(2000, 3, &["sc"]) }),
            host("c", HostReport { unacknowledged: true, ..report(9000, 0, &[]) }),
        ];
        assert_eq!(names(&hosts, &need(&[])), ["b", "a"]);
    }

    #[test]
    fn who_is_draining_or_lacks_something_is_left_out_and_says_why() {
        let hosts = [
            Candidate { draining: true, ..host("a", report(9000, 0, &["sc"])) },
            host("b", report(1023, 0, &["sc"])),
            host("c", report(9000, 0, &[])),
            host("d", HostReport { space: [].into(), ..report(9000, 0, &["sc"]) }),
            silent("e"),
        ];
        assert_eq!(
            refusal(&hosts, &need(&[])),
            "no host can have the VM: a: it is draining; b: it has memory for a VM of 1023 MiB, \
             not of 1 GiB; c: it has no stemcell 'sc'; d: it has no pool ''; \
             e: connection refused\n\
             Hint: upload the stemcell to a host that was added later: \
             `bosh upload-stemcell --fix`"
        );
    }

    #[test]
    fn a_vm_is_put_where_its_disk_is_or_nowhere() {
        let on_b = |memory, draining| {
            [
                host("a", report(9000, 0, &["sc"])),
                Candidate { draining, ..host("b", report(memory, 3, &["sc", "disk"])) },
            ]
        };
        assert_eq!(names(&on_b(2000, true), &need(&["disk"])), ["b"], "also while draining");
        assert!(
            refusal(&on_b(10, false), &need(&["disk"]))
                .starts_with("no host can have the VM: b: it has memory")
        );
        let mut shared = on_b(2000, true);
        shared[1].report.as_mut().unwrap().shared = vec!["disk".into()];
        assert_eq!(
            refusal(&shared, &need(&["disk"])).lines().next().unwrap(),
            "no host can have the VM: a: it has no shared pool with disk 'disk'; b: it is draining"
        );
        shared[0].report.as_mut().unwrap().shared = vec!["disk".into()];
        assert_eq!(names(&shared, &need(&["disk"])), ["a"], "both hosts reach the disk");
    }

    #[test]
    fn a_disk_that_may_be_on_a_silent_host_holds_its_vm_back() {
        let hosts = [host("a", report(9000, 0, &["sc"])), silent("b")];
        assert!(
            refusal(&hosts, &need(&["disk"]))
                .starts_with("disk 'disk' is on none of the hosts that answer, and 'b'")
        );
        assert_eq!(
            names(&hosts[..1], &need(&["disk"])),
            ["a"],
            "all hosts answer: the disk does not exist"
        );
    }
}
