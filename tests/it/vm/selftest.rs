//! `selftest` on a host that works, and on one that lacks what its configuration names.

use serde_json::{Value, json};

use crate::support::host::Host;

#[test]
fn selftest_on_sound_host_passes() {
    let Some(host) = Host::new() else { return };
    let output = host.namespace().run(|| host.cpi().args(["selftest", "--json"]).output().unwrap());
    let report: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"));
    assert!(output.status.success() && report["passed"] == true, "{report:#}");
    let checks = report["checks"].as_array().unwrap();
    assert!(checks.iter().all(|check| check["passed"] == true), "{report:#}");
    let names: Vec<_> = checks.iter().map(|check| check["check"].as_str().unwrap()).collect();
    assert_eq!(
        names,
        [
            "pools",
            "networks",
            "accelerator",
            "qemu-img",
            "stemcell",
            "create VM",
            "boot",
            "hardening",
            "tap",
            "create disk",
            "attach disk",
            "detach disk",
            "reset",
            "power button",
            "clean-up",
        ]
    );
}

#[test]
fn selftest_without_qemu_img_bridge_uplink_or_pool_fails_and_names_it() {
    let Some(host) = Host::new() else { return };
    let mut sound = Value::Null;
    host.reconfigure(|config| sound = config.clone());
    for (change, check, cause) in [
        (json!({"qemu": {"img_binary": "/nonexistent/qemu-img"}}), "qemu-img", "/nonexistent"),
        (
            json!({"networks": {"lan": {"profile": "bridge", "bridge": "br9"}}}),
            "networks",
            "host network 'lan': this host has no link 'br9', the network's bridge",
        ),
        (
            json!({"networks": {"v": {"profile": "vlan", "uplink": "up9", "vlan": 5}}}),
            "networks",
            "host network 'v': this host has no link 'up9', the network's uplink",
        ),
        (json!({"pools": {"fast": {"path": "/nonexistent/pool"}}}), "pools", "/nonexistent/pool"),
    ] {
        host.reconfigure(|config| {
            *config = sound.clone();
            for (key, value) in change.as_object().unwrap() {
                for (name, value) in value.as_object().unwrap() {
                    config[key][name] = value.clone();
                }
            }
        });
        let run = || host.cpi().args(["selftest", "--json"]).output().unwrap();
        let output = host.namespace().run(run);
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(!output.status.success() && report["passed"] == false, "{report:#}");
        let checks = report["checks"].as_array().unwrap();
        let failed: Vec<_> = checks.iter().filter(|c| c["passed"] == false).collect();
        assert_eq!((failed.len(), &failed[0]["check"]), (1, &json!(check)), "{report:#}");
        assert!(failed[0]["remark"].as_str().unwrap().contains(cause), "{report:#}");
    }
}
