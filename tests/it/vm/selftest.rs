//! `selftest` on a host that works.

use serde_json::Value;

use crate::support::host::Host;

#[test]
fn selftest_on_sound_host_passes() {
    let Some(host) = Host::new() else { return };
    let output = host.namespace().run(|| host.cpi().args(["selftest", "--json"]).output().unwrap());
    let report: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"));
    assert!(output.status.success() && report["passed"] == true, "{report:#}");
    let checks = report["checks"].as_array().unwrap();
    assert!(checks.len() > 10 && checks.iter().all(|check| check["passed"] == true), "{report:#}");
}
