//! What a VM's network costs one create_vm: the check of its subnet, and its bridge, tap and rules,
//! made and removed. Alone and among many VMs.
//!
//! The floor of a tap is `TUNSETIFF` and nothing else. The floor of the rest is the same work on a
//! host without other VMs: it must not grow with them. Everything is in a network namespace of its
//! own, so the bench needs root, and the kernel removes everything with the process. Most of each
//! time is the kernel waiting for RCU grace periods of every CPU.
//!
//! `cargo bench --bench network -- 30` takes 30 rounds instead of 10.
#![allow(clippy::print_stdout)]

#[path = "../floors/table.rs"]
mod table;

use std::fs::File;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use bosh_qemu_cpi::config::Network;
use bosh_qemu_cpi::net::apply::{self, Plug};
use bosh_qemu_cpi::net::change::Port;
use bosh_qemu_cpi::net::plan::{NicPlan, Requested, Segment, plan_nic};
use bosh_qemu_cpi::net::profile::Profile;
use bosh_qemu_cpi::net::{filter, host_firewalls, subnet_conflict};
use bosh_qemu_cpi::store::record::Nic;
use bosh_qemu_cpi::sys::tun::{self, Framing};
use nix::sched::{CloneFlags, unshare};
use serde_json::json;

use table::{Table, Target};

/// Number of VMs that exist already.
const CROWD: usize = 500;

fn main() {
    let rounds = std::env::args().find_map(|word| word.parse().ok()).unwrap_or(10);
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace of its own: run it as root");
    let segment = segment();
    let mut table = Table::default();
    let alone: Vec<_> = (0..rounds).map(|_| from_nothing(&segment, &mut table)).collect();
    let crowd: Vec<_> = (0..CROWD).map(|n| nic(&format!("bqcrowd{n}"), n, &segment)).collect();
    let wires: Vec<_> = crowd.iter().map(|nic| connect(nic, &segment).0).collect();
    for few in alone {
        for ((name, target, many), (_, _, few)) in one_more(&segment).into_iter().zip(few) {
            table.add(name, target, many, few);
        }
    }
    drop(wires);
    println!("\n{rounds} rounds, medians, milliseconds\n\n{table}");
}

/// A measurement: its name, its target among many VMs, and its time.
type Measured = (&'static str, Target, Duration);

/// Measures the first VM of a network, and its removal.
fn from_nothing(segment: &Segment, table: &mut Table) -> Vec<Measured> {
    let (tap, device) = timed(|| {
        let device =
            File::options().read(true).write(true).open("/dev/net/tun").expect("/dev/net/tun");
        tun::create_tap(device.as_fd(), "floor0", Framing::Plain, false).expect("a tap");
        device
    });
    drop(device);
    // The kernel finishes removing a tap later; the next measurement must not include that.
    assert!(apply::release(segment).expect("nothing there"));
    let first = nic("bqfirstn0", FIRST, segment);
    let (wire, [checked, ruled, plugged]) = connect(&first, segment);
    table.add("first: subnet checked", Target::AtMost(2.0), checked, tap);
    table.add("first: rules, with their tables", Target::AtMost(10.0), ruled, tap);
    table.add("first: bridge and tap", Target::AtMost(10.0), plugged, tap);
    let more = one_more(segment);
    let whole = more[..3].iter().map(|(_, _, time)| *time).sum();
    table.add("one more: all of it", Target::AtMost(10.0), whole, tap);
    let (unplugged, ()) = timed(|| drop(wire));
    table.add("tap removed by the kernel", Target::AtMost(40.0), unplugged, tap);
    let (released, ()) = timed(|| {
        std::thread::scope(|threads| {
            let rules =
                threads.spawn(|| filter::remove(std::slice::from_ref(&first)).expect("remove"));
            assert!(apply::release(segment).expect("release"));
            rules.join().expect("no panic");
        });
    });
    table.add("bridge and rules removed", Target::AtMost(60.0), released, tap);
    more
}

/// Measures one more VM and its removal, a call that finds nothing missing, and the search for
/// other firewalls.
fn one_more(segment: &Segment) -> Vec<Measured> {
    let one = nic("bqmoren0", MORE, segment);
    let (wire, [checked, ruled, plugged]) = connect(&one, segment);
    let (nothing, ()) = timed(|| apply::ensure(segment, &[]).expect("ensure"));
    let own = std::slice::from_ref(&one);
    let (searched, findings) = timed(|| {
        host_firewalls::findings(
            segment,
            own,
            &host_firewalls::observe(&[segment], own).expect("observe"),
        )
    });
    assert_eq!(findings, []);
    drop(wire);
    let (removed, ()) = timed(|| filter::remove(own).expect("remove"));
    vec![
        ("among 500: subnet checked", Target::Above(1.0), checked),
        ("among 500: rules", Target::Ratio(1.5), ruled),
        ("among 500: tap", Target::Ratio(1.5), plugged),
        ("among 500: rules removed", Target::Ratio(1.5), removed),
        ("among 500: nothing to do", Target::Above(1.0), nothing),
        ("among 500: other firewalls", Target::Above(1.0), searched),
    ]
}

/// Does all that create_vm and the VM's supervisor do for its network: the check of its subnet, its
/// rules, bridge and tap.
fn connect(nic: &Nic, segment: &Segment) -> (Plug, [Duration; 3]) {
    let (port, _) = Port::of(nic).expect("a tap");
    let (checked, ()) = timed(|| subnet_conflict::ensure_free(segment).expect("free"));
    let (ruled, ()) =
        timed(|| filter::add(std::slice::from_ref(nic), || Ok(Vec::new())).expect("rules"));
    let (plugged, wire) = timed(|| {
        apply::plug(&port, segment, 1, || Ok((segment.clone(), Vec::new()))).expect("plug")
    });
    (wire, [checked, ruled, plugged])
}

/// VMs besides the crowd.
const FIRST: usize = CROWD;
const MORE: usize = CROWD + 1;

/// A NIC with `anti_spoof`, an address, a security group and a forwarded port.
fn nic(tap: &str, n: usize, segment: &Segment) -> Nic {
    let ip = format!("10.0.{}.{}", n / 250, n % 250 + 2);
    let rules = json!({
        "anti_spoof": true, "addresses": [format!("{ip}/32")],
        "admits": [{"source": "10.0.0.0/16", "protocols": [6, 6], "ports": [80, 90]}],
        "forwards": [{"protocol": 6, "host": 2000 + n, "to": ip, "guest": 22, "count": 1}],
    });
    let mac = format!("02:00:00:00:{:02x}:{:02x}", n / 256, n % 256);
    let nic =
        json!({"network": "bench", "mac": mac, "tap": tap, "segment": segment, "rules": rules});
    serde_json::from_value(nic).expect("a NIC")
}

fn segment() -> Segment {
    let address = |text: &str| text.parse().ok();
    let requested = Requested {
        netmask: address("255.255.0.0"),
        gateway: address("10.0.0.1"),
        ..Requested::default()
    };
    let profile = Profile::load("nat", None).expect("built in");
    match plan_nic("bench", &Network::nat(), &profile, &requested).expect("a plan") {
        NicPlan::Bridge(segment) => segment,
        NicPlan::User(user) => panic!("{user:?}"),
    }
}

/// Returns how long `job` took, and its result.
fn timed<T>(job: impl FnOnce() -> T) -> (Duration, T) {
    let began = Instant::now();
    let result = job();
    (began.elapsed(), result)
}
