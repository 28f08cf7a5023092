//! SIGKILL at every step of every mutating call: the same call again succeeds, what is left over is reaped, and calls on
//! other things go on.

use std::fs;

use bosh_qemu_cpi::cid::DiskCid;
use bosh_qemu_cpi::store::DiskRecord;
use serde_json::{Value, json};

use crate::support::crash::{Crash, Outcomes, for_each_crash_point};
use crate::support::host::{Host, text};
use crate::support::skip;

/// A host, where the program under test has crash points.
fn host() -> Option<Host> {
    if !cfg!(debug_assertions) {
        skip("crash points are for builds with debug assertions");
        return None;
    }
    Host::new()
}

#[allow(clippy::print_stdout)]
fn print(method: &str, outcomes: &Outcomes) {
    let width = outcomes.iter().map(|(point, _)| point.len()).max().unwrap_or_default();
    println!("{method}: killed at each of {} points", outcomes.len());
    for (point, outcome) in outcomes {
        println!("  {point:width$}  {outcome}");
    }
}

#[test]
fn a_release_build_knows_no_crash_point() {
    if cfg!(debug_assertions) {
        return skip("a release build is looked at: cargo test --release");
    }
    let binary = fs::read(env!("CARGO_BIN_EXE_bosh-qemu-cpi")).unwrap();
    for word in ["BOSH_QEMU_CPI_CRASH", "pending noted", "new one written"] {
        assert!(!binary.windows(word.len()).any(|window| window == word.as_bytes()), "{word}");
    }
}

/// `method` again, as the Director repeats it.
fn again(host: &Host, method: &str, crash: &Crash<'_>) -> Value {
    if let Some(answer) = &crash.answer {
        assert!(answer.outcome.is_ok() || crash.point.starts_with("supervisor: "), "{}: {answer:?}", crash.point);
    }
    let answer = host.call(method, crash.arguments);
    answer.outcome.unwrap_or_else(|failure| panic!("{method} again after '{}': {failure:?}", crash.point))
}

#[test]
fn create_disk() {
    let Some(host) = host() else { return };
    let disks = || host.store().list::<DiskRecord>().unwrap();
    let outcomes = for_each_crash_point(
        &host,
        "create_disk",
        || json!([8, {}, null]),
        |crash| {
            let disk: DiskCid = text(&again(&host, "create_disk", crash)).parse().unwrap();
            let mut left = disks();
            left.retain(|other| *other != disk);
            host.ok("delete_disk", &json!([disk]));
            // One that was made in full is there; nobody can tell whether its answer was read.
            for other in &left {
                assert_eq!(host.ok("has_disk", &json!([other])), true, "{}", crash.point);
                host.ok("delete_disk", &json!([other]));
            }
            host.assert_nothing_left();
            if left.is_empty() { "nothing is left".into() } else { "the disk was made".into() }
        },
    );
    print("create_disk", &outcomes);
}
