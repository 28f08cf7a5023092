//! What the program says of itself, and that it holds on this host.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::support::host::Host;

fn program(arguments: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_bosh-qemu-cpi")).args(arguments).output().unwrap()
}

#[test]
fn the_reference_pages_are_those_of_this_program() {
    for page in ["config", "cloud-properties"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("docs/{page}.md"));
        let printed = program(&["reference", page]);
        assert!(printed.status.success(), "{printed:?}");
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            String::from_utf8(printed.stdout).unwrap(),
            "make it again: bosh-qemu-cpi reference {page} > docs/{page}.md"
        );
    }
}

#[test]
fn the_selftest_passes() {
    let Some(host) = Host::new() else { return };
    let output = host.namespace().run(|| host.cpi().args(["selftest", "--json"]).output().unwrap());
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"));
    assert!(output.status.success() && report["passed"] == true, "{report:#}");
    let checks = report["checks"].as_array().unwrap();
    assert!(checks.len() > 10 && checks.iter().all(|check| check["passed"] == true), "{report:#}");
}
