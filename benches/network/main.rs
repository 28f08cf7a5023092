//! What a VM's network costs: bridge, tap and rules made and removed, alone and among many.
//!
//! The floor of a tap is a tap: `TUNSETIFF` and nothing else. That of the rest is the same thing on a host without other
//! VMs: it must not grow with them. Everything is in a network namespace of its own, so it needs root, and the kernel
//! takes it away with the process. Most of each time is the kernel waiting for a pause of every CPU (RCU).
//!
//! `cargo bench --bench network -- 30` takes 30 rounds instead of 10.
#![allow(clippy::print_stdout)]

#[path = "../floors/table.rs"]
mod table;

use std::fs::File;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use bosh_qemu_cpi::config::Network;
use bosh_qemu_cpi::link_name::LinkName;
use bosh_qemu_cpi::net::apply::{self, Plug};
use bosh_qemu_cpi::net::coexist;
use bosh_qemu_cpi::net::plan::{Place, Requested, Segment, place};
use bosh_qemu_cpi::net::profile::Profile;
use bosh_qemu_cpi::sys::tun;
use nix::sched::{CloneFlags, unshare};

use table::{Table, Target};

/// VMs that are there already.
const CROWD: usize = 500;

fn main() {
    let rounds = std::env::args().find_map(|word| word.parse().ok()).unwrap_or(10);
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace of its own: run it as root");
    let segment = segment();
    let mut table = Table::default();
    let alone: Vec<_> = (0..rounds).map(|_| from_nothing(&segment, &mut table)).collect();
    let crowd: Vec<_> = (0..CROWD).map(|n| plug(&format!("bqcrowd{n}"), &segment)).collect();
    for few in alone {
        let many = one_more(&segment);
        let rows = [
            ("tap among 500", Target::Ratio(1.5)),
            ("nothing to do among 500", Target::Ratio(1.5)),
            ("other firewalls looked for among 500", Target::Above(1.0)),
        ];
        for (((name, target), many), few) in rows.into_iter().zip(many).zip(few) {
            table.add(name, target, many, few);
        }
    }
    drop(crowd);
    println!("\n{rounds} rounds, medians, milliseconds\n\n{table}");
}

/// The first VM of a network, and its end.
fn from_nothing(segment: &Segment, table: &mut Table) -> [Duration; 3] {
    let (tap, device) = timed(|| {
        let device = File::options().read(true).write(true).open("/dev/net/tun").expect("/dev/net/tun");
        tun::create_tap(device.as_fd(), "floor0", false).expect("a tap");
        device
    });
    drop(device);
    // What the kernel still does after a tap went is not the next one's time.
    assert!(apply::release(segment).expect("nothing there"));
    let (first, plugged) = timed(|| plug("bqfirstn0", segment));
    table.add("bridge, rules and tap", Target::AtMost(10.0), first, tap);
    let more = one_more(segment);
    table.add("tap", Target::AtMost(10.0), more[0], tap);
    let (unplugged, ()) = timed(|| drop(plugged));
    table.add("tap removed by the kernel", Target::AtMost(40.0), unplugged, tap);
    let (released, gone) = timed(|| apply::release(segment).expect("release"));
    assert!(gone);
    table.add("bridge and rules removed", Target::AtMost(60.0), released, tap);
    more
}

/// A VM more; a call that finds all as it must be; a look for what else is in the way.
fn one_more(segment: &Segment) -> [Duration; 3] {
    let (plugged, tap) = timed(|| plug("bqmoren0", segment));
    let (nothing, ()) = timed(|| apply::ensure(segment, &[]).expect("ensure"));
    let (looked, findings) =
        timed(|| coexist::findings(segment, &[], &coexist::observe(&[segment], &[]).expect("observe")));
    assert_eq!(findings, []);
    drop(tap);
    [plugged, nothing, looked]
}

fn plug(tap: &str, segment: &Segment) -> Plug {
    let port = LinkName::parse(tap).expect("a name").into();
    apply::plug(&port, segment, 1, || Ok((segment.clone(), Vec::new()))).expect("plug")
}

fn segment() -> Segment {
    let address = |text: &str| text.parse().ok();
    let requested =
        Requested { netmask: address("255.255.255.0"), gateway: address("10.0.0.1"), ..Requested::default() };
    let profile = Profile::load("nat", None).expect("built in");
    match place("bench", &Network::nat(), &profile, &requested).expect("a place") {
        Place::Bridge(segment) => segment,
        Place::User(user) => panic!("{user:?}"),
    }
}

/// How long `job` took, and its result.
fn timed<T>(job: impl FnOnce() -> T) -> (Duration, T) {
    let began = Instant::now();
    let result = job();
    (began.elapsed(), result)
}
