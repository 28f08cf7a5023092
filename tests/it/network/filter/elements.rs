//! Tables and elements of the filter: added with a VM and removed with it.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use bosh_qemu_cpi::net::filter;
use bosh_qemu_cpi::store::nic_rules::{Forward, NicRules};
use bosh_qemu_cpi::store::record::Nic;

use super::{Bridge, GUARD, Guest, IP4, TCP, UDP, admits, filtered, mac, nic, no_others};
use crate::support::frames::{BROADCAST, ethernet, ip4, udp};
use crate::support::nftables;

#[test]
fn remove_last_vm_removes_the_tables() {
    let Some(bridge) = Bridge::new(false) else { return };
    let tables = || bridge.host.run(nftables::tables);
    let guest = bridge.guest(1, filtered(&["10.0.0.1"]));
    let other = bridge.guest(2, filtered(&["10.0.0.2"]));
    let add = |guest: &Guest| {
        bridge.host.run(|| filter::add(std::slice::from_ref(&guest.nic), no_others)).unwrap();
    };
    let remove = |guest: &Guest| {
        bridge.host.run(|| filter::remove(std::slice::from_ref(&guest.nic))).unwrap();
    };
    assert_eq!(tables(), [GUARD, GUARD]);
    add(&guest);
    remove(&guest);
    remove(&guest);
    let spoofed = ethernet(BROADCAST, mac(9), IP4, &ip4("10.0.0.9", "10.0.0.2", UDP, &udp(1, 53)));
    bridge.assert_passes(&guest, &other, &spoofed);
    let back = ethernet(BROADCAST, mac(9), IP4, &ip4("10.0.0.9", "10.0.0.1", UDP, &udp(1, 53)));
    bridge.assert_dropped(&other, &guest, "MAC", &back);
    remove(&other);
    assert_eq!(tables(), Vec::<String>::new());
    remove(&other);

    // After a flush, the next VM restores the elements of all VMs.
    add(&guest);
    bridge.host.run(|| nftables::write_table(GUARD, false));
    bridge
        .host
        .run(|| {
            filter::add(std::slice::from_ref(&guest.nic), || {
                Ok(vec![guest.nic.clone(), other.nic.clone()])
            })
        })
        .unwrap();
    bridge.assert_dropped(&guest, &other, "MAC", &spoofed);
    bridge.assert_dropped(&other, &guest, "MAC", &back);
}

/// The removal of the VM ran before the tables existed.
#[test]
fn remove_vm_during_rebuild_leaves_no_elements() {
    let Some(bridge) = Bridge::new(false) else { return };
    let [stays, goes] =
        [1, 2].map(|n| nic(&format!("bqvm{n}"), n, filtered(&[&format!("10.0.0.{n}")])));
    let asked = AtomicU32::new(0);
    let others = || {
        let first = asked.fetch_add(1, Relaxed) == 0;
        // A changed record of the VM does not remove its elements.
        let again = NicRules { anti_spoof: false, ..stays.rules.clone().unwrap() };
        Ok(if first {
            vec![stays.clone(), goes.clone()]
        } else {
            vec![Nic { rules: Some(again), ..stays.clone() }]
        })
    };
    bridge.host.run(|| filter::remove(std::slice::from_ref(&goes))).unwrap();
    let added = bridge.host.run(|| filter::add(std::slice::from_ref(&stays), others));
    assert!(added.is_ok() && asked.load(Relaxed) == 2, "{added:?}");
    let lost = |nic| bridge.host.run(|| filter::is_missing(std::slice::from_ref(nic))).unwrap();
    assert_eq!((lost(&goes), lost(&stays)), (true, false));
    bridge.host.run(|| filter::remove(std::slice::from_ref(&stays))).unwrap();
    assert_eq!(bridge.host.run(nftables::tables), Vec::<String>::new());
}

/// The number of rules and the cost of a packet do not depend on the number of VMs. This test shows
/// that 200 VMs fit and are removed completely.
#[test]
fn add_and_remove_two_hundred_vms_leaves_nothing() {
    let Some(bridge) = Bridge::new(false) else { return };
    let rules = |n: u8| NicRules {
        allowed: vec!["10.244.0.0/16".parse().unwrap()],
        forwards: vec![Forward {
            address: None,
            protocol: TCP,
            host: 2000 + u16::from(n) * 10,
            to: std::net::IpAddr::from([10, 0, 0, n]),
            guest: 80,
            count: 3,
        }],
        ..admits(&[("0.0.0.0/0", TCP, Some((80, 90))), ("fd00::/64", UDP, Some((53, 53)))])
    };
    let vms: Vec<_> = (1..=200).map(|n| nic(&format!("bqvm{n}"), n, rules(n))).collect();
    let elements = || bridge.host.run(|| nftables::elements(GUARD));
    let mut least = 0;
    for vm in &vms {
        bridge.host.run(|| filter::add(std::slice::from_ref(vm), no_others)).unwrap();
        let now = elements();
        assert!(now > least, "{now}");
        least = now;
    }
    // For each VM: the tap twice, the MAC, three addresses, a block, two admissions, three ports,
    // and the elements that mark it as filtered and grouped.
    assert_eq!(least, 200 * 14);
    for vm in &vms {
        bridge.host.run(|| filter::remove(std::slice::from_ref(vm))).unwrap();
    }
    assert_eq!(bridge.host.run(nftables::tables), Vec::<String>::new());
}

/// All elements are added in one transaction, which exceeds the default size of a socket buffer.
#[test]
fn add_vm_after_flush_restores_two_thousand_vms() {
    let Some(bridge) = Bridge::new(false) else { return };
    let vms: Vec<_> = (0..2000u16)
        .map(|n| {
            nic(
                &format!("bqvm{n}"),
                n as u8,
                filtered(&[&format!("10.0.{}.{}", n / 250, n % 250 + 1)]),
            )
        })
        .collect();
    bridge.host.run(|| filter::add(&vms[..1], || Ok(vms.clone()))).unwrap();
    assert!(!bridge.host.run(|| filter::is_missing(&vms)).unwrap());
    bridge.host.run(|| filter::remove(&vms)).unwrap();
    assert_eq!(bridge.host.run(nftables::tables), Vec::<String>::new());
}
