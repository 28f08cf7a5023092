//! What the packet filter costs: throughput between a guest and the host over a bridge, both ways,
//! with a VM's rules and without. A veth pair stands for the tap. Run with `cargo bench --bench
//! filter`; needs root and `ip`.
#![allow(clippy::print_stdout, clippy::print_stderr)]

// The bench uses only a part of the module.
#[allow(dead_code)]
#[path = "../../tests/it/support/netns.rs"]
mod netns;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use bosh_qemu_cpi::net::filter;
use bosh_qemu_cpi::store::record::Nic;
use netns::Namespace;
use serde_json::json;

/// How long each measurement of throughput sends.
const SEND_INTERVAL: Duration = Duration::from_secs(1);
const ROUNDS: usize = 5;

fn skip(reason: &str) {
    eprintln!("SKIP filter: {reason}");
}

fn nic(tap: &str, last: u8) -> Nic {
    let segment = json!({"network": "bench", "bridge": "br-bench", "keeper": "operator"});
    let admits = json!([{"source": "10.0.0.0/24", "protocols": [6, 6], "ports": [1, 65535]}]);
    let addresses = json!([format!("10.0.0.{last}/32")]);
    let rules = json!({"anti_spoof": true, "addresses": addresses, "admits": admits});
    let mac = format!("02:00:00:00:00:{last:02x}");
    let nic =
        json!({"network": "bench", "mac": mac, "tap": tap, "segment": segment, "rules": rules});
    serde_json::from_value(nic).expect("a NIC")
}

/// Bytes per second from one namespace to the other, which has the address `at`.
fn throughput(from: &Namespace, to: &Namespace, at: &str) -> f64 {
    let listener = to.run(|| TcpListener::bind((at, 0)).expect("listen"));
    let address = listener.local_addr().expect("an address");
    let mut stream = from.run(|| TcpStream::connect(address).expect("connect"));
    let (mut served, _) = listener.accept().expect("accept");
    let reader = std::thread::spawn(move || {
        let mut buffer = vec![0; 1 << 20];
        let mut total = 0;
        while let Ok(length @ 1..) = served.read(&mut buffer) {
            total += length;
        }
        total
    });
    let (start, chunk) = (Instant::now(), vec![0; 1 << 18]);
    while start.elapsed() < SEND_INTERVAL {
        stream.write_all(&chunk).expect("write");
    }
    drop(stream);
    reader.join().expect("no panic") as f64 / start.elapsed().as_secs_f64()
}

fn median(rates: impl Iterator<Item = f64>) -> f64 {
    let mut rates: Vec<_> = rates.collect();
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

fn main() {
    let (Some(host), Some(guest)) = (Namespace::new(), Namespace::new()) else { return };
    host.ip("link add br-bench type bridge");
    host.ip("address add 10.0.0.254/24 dev br-bench");
    host.ip("link set br-bench up");
    host.cable("bqbench", &guest, "eth0");
    host.ip("link set bqbench master br-bench");
    guest.ip("link set eth0 address 02:00:00:00:00:01");
    guest.ip("address add 10.0.0.1/24 dev eth0");
    let own = [nic("bqbench", 1)];
    let others: Vec<_> = (2..=250).map(|n| nic(&format!("bqother{n}"), n)).collect();
    let add = |nics: &[Nic]| host.run(|| filter::add(nics, || Ok(Vec::new()))).expect("rules");
    let both_ways =
        || [throughput(&guest, &host, "10.0.0.254"), throughput(&host, &guest, "10.0.0.1")];
    let mut rates = [const { Vec::new() }; 3];
    for _ in 0..ROUNDS {
        rates[0].push(both_ways());
        add(&own);
        rates[1].push(both_ways());
        add(&others);
        rates[2].push(both_ways());
        host.run(|| filter::remove(&others).and_then(|()| filter::remove(&own))).expect("removed");
    }
    for (way, name) in ["guest to host", "host to guest"].into_iter().enumerate() {
        let [without, with, among] =
            rates.each_ref().map(|rates| median(rates.iter().map(|both| both[way])));
        println!("{name} without rules        {:8.0} MB/s", without / 1e6);
        println!(
            "{name} with rules           {:8.0} MB/s   {:.2} of that",
            with / 1e6,
            with / without
        );
        println!(
            "the same among 249 other VMs       {:8.0} MB/s   {:.2} of that",
            among / 1e6,
            among / without
        );
    }
    add(&own);
    for (present, nics) in [(1, &others[..0]), (250, &others[..])] {
        if !nics.is_empty() {
            add(nics);
        }
        let one = [nic("bqone", 251)];
        let start = Instant::now();
        for _ in 0..20 {
            add(&one);
            host.run(|| filter::remove(&one)).expect("removed");
        }
        println!(
            "one VM's rules in and out with {present:3} VMs {:8.2} ms",
            start.elapsed().as_secs_f64() * 1000.0 / 20.0
        );
    }
}
