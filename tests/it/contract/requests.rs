//! The CPI contract for any request and any environment, as the Director and bosh-cli require it.

use std::fs;
use std::io::{Read, Write};
use std::process::{Command, Stdio};

use bosh_qemu_cpi::rpc::{call::Call, request::Request};
use serde_json::{Value, json};

use crate::support::answer::{Answer, run, spawn};
use crate::support::installation::{Installation, recorded_requests};

const INFO: &[u8] = br#"{"method":"info","arguments":[]}"#;

#[test]
fn parse_every_recorded_request_succeeds() {
    for (flow, request) in
        recorded_requests().into_iter().filter(|(_, request)| request["method"] != "info")
    {
        let mut bare = request.clone();
        bare["context"] = json!({"director_uuid": "u"});
        bare.as_object_mut().unwrap().remove("api_version");
        for request in [request, bare] {
            let parsed =
                Request::parse(&request.to_string()).and_then(|request| Call::parse(&request));
            assert!(parsed.is_ok(), "{flow}: {}: {:?}", request["method"], parsed.err());
        }
    }
}

#[test]
fn answer_every_recorded_request_without_cpi_error() {
    let installation = Installation::new();
    for (flow, request) in recorded_requests() {
        let answer = installation.ask(&request);
        let unusable = ["CpiError", "NotImplemented"];
        let lost = answer.outcome.as_ref().is_err_and(|e| unusable.contains(&e.kind.as_str()));
        assert!(!lost, "{flow}: {request}: {answer:?}");
    }
}

#[test]
fn info_without_state_or_configuration_succeeds() {
    let installation = Installation::new();
    let expected = json!({
        "api_version": 3,
        "stemcell_formats": ["openstack-qcow2", "openstack-raw", "qemu-light"],
    });
    assert_eq!(installation.ask_raw(INFO).result(), &expected);
    assert!(
        !installation.path("state").exists() && !installation.path("run").exists(),
        "info writes nothing"
    );
    fs::write(installation.config(), "broken").unwrap();
    assert_eq!(installation.ask_raw(INFO).result(), &expected);
    fs::remove_file(installation.config()).unwrap();
    let answer = installation.ask_raw(INFO);
    assert_eq!(answer.result(), &expected);
    assert_eq!(answer.stderr, "");
}

#[test]
fn call_with_broken_configuration_answers_cpi_error() {
    let installation = Installation::with(&json!({"qemu": {"acel": "hunter2"}}));
    let answer = installation.call("has_vm", &json!(["vm-1"]));
    let expected = format!(
        "has_vm: '{}': qemu.acel: unknown key; did you mean 'accel'?",
        installation.config().display()
    );
    assert_eq!(
        (answer.failure().kind.as_str(), &answer.failure().message),
        ("CpiError", &expected)
    );
}

#[test]
fn call_with_invalid_defaults_answers_cpi_error() {
    for (key, expected) in [
        ("vm_defaults", "vm_defaults.ramm: unknown key; did you mean 'ram'?"),
        ("disk_defaults", "disk_defaults.ramm: unknown key"),
    ] {
        let defaults = json!({key: {"ramm": 64}});
        // A method that uses no defaults finds the mistake, too.
        let answer = Installation::with(&defaults).call("has_vm", &json!(["vm-1"]));
        let message = &answer.failure().message;
        assert!(message.starts_with("has_vm: '/") && message.contains(expected), "{message}");
        let request = json!({"method": "has_vm", "arguments": ["vm-1"], "context": defaults});
        let message = Installation::new().ask(&request).failure().message.clone();
        assert_eq!(message, format!("has_vm: context.{expected}"));
    }
}

#[test]
fn call_with_wrong_context_type_names_the_key() {
    let context = json!({"director_uuid": "u", "agent": {"mbus": 7}});
    let answer = Installation::new()
        .ask(&json!({"method": "has_vm", "arguments": ["vm-1"], "context": context}));
    assert_eq!(
        answer.failure().message,
        "has_vm: context.agent.mbus: expected a non-empty string, got a number"
    );
}

#[test]
fn call_with_unusable_file_of_configuration_hints_at_the_configuration() {
    let installation = Installation::new();
    fs::write(installation.path("state"), "").unwrap();
    let message = installation.call("create_disk", &json!([1, {}])).failure().message.clone();
    assert!(message.contains("Hint: correct 'state_dir' in the configuration"), "{message}");
}

#[test]
fn log_of_call_names_its_object_and_its_result() {
    let installation = Installation::new();
    let done = |method: &str, arguments: Value, expected: &str| {
        let answer = installation.call(method, &arguments);
        let line = answer.stderr.lines().find(|line| line.contains(": done "));
        let line = line.unwrap_or_else(|| panic!("{answer:?}"));
        assert!(line.contains(expected) && line.contains("cpi-123456"), "{line}");
    };
    done("has_vm", json!(["vm-1"]), r#"done cid="vm-1" result="false" elapsed_ms="#);
    done("delete_vm", json!(["vm-1"]), r#"done cid="vm-1" elapsed_ms="#);
    let failed = installation.call("get_disks", &json!(["vm-1"]));
    assert!(failed.stderr.contains(r#"cid="vm-1""#), "{failed:?}");
}

#[test]
fn call_with_malformed_request_answers_cpi_error() {
    let installation = Installation::new();
    let deep = "[".repeat(200_000);
    for request in [
        b"".as_slice(),
        b"\n",
        b"\0",
        b"\xff\xfe",
        b"{\"method\":\"\xff\"}",
        b"[]",
        b"null",
        b"{}",
        b"{\"method\":\"info\"}{}",
        b"{\"method\":7,\"arguments\":[]}",
        deep.as_bytes(),
        format!("{{\"method\":\"create_vm\",\"arguments\":[{deep}").as_bytes(),
        "{\"a\":".repeat(200_000).as_bytes(),
    ] {
        let answer = installation.ask_raw(request);
        assert_eq!(
            answer.failure().kind,
            "CpiError",
            "{}",
            String::from_utf8_lossy(&request[..request.len().min(80)])
        );
    }
}

#[test]
fn call_unknown_method_answers_not_implemented() {
    let installation = Installation::new();
    for method in
        ["no_such_method", "ping", "current_vm_id", "configure_networks", "", "InFo", "x\ny"]
    {
        assert_eq!(
            installation.call(method, &json!([])).failure().kind,
            "NotImplemented",
            "{method}"
        );
    }
}

#[test]
fn call_with_invalid_cid_names_the_argument() {
    let installation = Installation::new();
    let long = "x".repeat(300);
    for cid in
        ["../../etc/passwd", "/", "", "a\0b", "vm-1\n", "vm-1,foo=bar", "-drive", &long, "väm"]
    {
        for (method, arguments, named) in [
            ("has_vm", json!([cid]), "argument 1, vm_cid: "),
            ("delete_vm", json!([cid]), "argument 1, vm_cid: "),
            ("delete_stemcell", json!([cid]), "argument 1, stemcell_cid: "),
            ("delete_snapshot", json!([cid]), "argument 1, snapshot_cid: "),
            ("attach_disk", json!(["vm-1", cid]), "argument 2, disk_cid: "),
            ("create_disk", json!([1, {}, cid]), "argument 3, vm_cid: "),
            ("create_vm", json!(["a", "s", {}, {}, ["d-1", cid], {}]), "argument 5, disk_cids.1: "),
        ] {
            let answer = installation.call(method, &arguments);
            let failure = answer.failure();
            assert_eq!(failure.kind, "CpiError", "{method} {cid:?}");
            assert!(
                failure.message.starts_with(&format!("{method}: {named}")),
                "{}",
                failure.message
            );
            assert!(failure.message.len() < 250, "{}", failure.message);
        }
    }
}

#[test]
fn call_with_unsupported_api_version_is_refused() {
    let installation = Installation::new();
    let asked = |method: &str, arguments: Value, context: Value, version: Value| {
        let request = json!({
            "method": method, "arguments": arguments, "context": context, "api_version": version,
        });
        installation.ask(&request)
    };
    for version in [json!(1), json!(2), json!(3), json!(99), json!(null)] {
        assert_eq!(asked("info", json!([]), json!({}), version).result()["api_version"], 3);
    }
    for version in [1, 4] {
        assert_eq!(
            asked("has_vm", json!(["vm-1"]), json!({}), json!(version)).failure().kind,
            "NotSupported"
        );
    }
    let create_vm = json!(["a", "s-1", {}, {}, [], {}]);
    let old = json!({"vm": {"stemcell": {"api_version": 1}}});
    assert_eq!(asked("create_vm", create_vm, old, json!(2)).failure().kind, "NotSupported");
}

#[test]
fn call_with_large_request_reads_stdin_to_its_end() {
    let installation = Installation::new();
    let large = json!({"bosh": {"padding": "x".repeat(10 << 20)}});
    let arguments = json!(["a", "s-1", {}, {"n": {"type": "nonsense"}}, [], large]);
    let answer = installation.call("create_vm", &arguments);
    assert!(
        answer.failure().message.starts_with("create_vm: argument 4, networks.n.type: "),
        "{answer:?}"
    );
    assert!(installation.call("no_such_method", &json!(["x".repeat(10 << 20)])).outcome.is_err());
    // No JSON, and more than the limit.
    let answer = installation.ask_raw(&vec![b'['; 20 << 20]);
    assert_eq!(answer.failure().message, "the request has 20971520 bytes, the limit is 16777216");
}

#[test]
fn call_without_stdin_answers_empty_request() {
    let installation = Installation::new();
    let mut nothing = installation.cpi();
    let output = nothing.stdin(Stdio::null()).output().unwrap();
    assert!(Answer::of(&output).failure().message.starts_with("the request is empty"));
    let output = redirected(&installation, "<&-").output().unwrap();
    assert!(Answer::of(&output).failure().message.starts_with("the request is empty"));
}

#[test]
fn call_without_stderr_still_answers() {
    let installation = Installation::with(&json!({"log": {"level": "trace"}}));
    let request = br#"{"method":"has_vm","arguments":["vm-1"]}"#;
    let answer = Answer::of(&run(redirected(&installation, "2>&-"), request));
    assert_eq!(answer.result(), &json!(false));
    let mut child = spawn(installation.cpi());
    drop(child.stderr.take());
    child.stdin.take().unwrap().write_all(request).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(Answer::of(&output).result(), &json!(false));
}

#[test]
fn call_without_stdout_exits_successfully() {
    let installation = Installation::new();
    for request in [INFO, br#"{"method":"has_vm","arguments":["vm-1"]}"#] {
        let mut child = spawn(installation.cpi());
        drop(child.stdout.take());
        child.stdin.take().unwrap().write_all(request).unwrap();
        let mut stderr = String::new();
        child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        assert!(child.wait().unwrap().success(), "{stderr}");
        assert!(!stderr.contains("panicked"), "{stderr}");
    }
    let output = run(redirected(&installation, ">&-"), INFO);
    assert!(
        output.status.success() && output.stdout.is_empty() && output.stderr.is_empty(),
        "{output:?}"
    );
}

#[test]
fn info_without_environment_or_directory_succeeds() {
    let installation = Installation::new();
    let gone = installation.path("gone");
    fs::create_dir(&gone).unwrap();
    let mut command = redirected(&installation, "");
    command.arg("rmdir").current_dir(&gone).env_clear();
    assert!(Answer::of(&run(command, INFO)).outcome.is_ok());
    assert!(!gone.exists());
}

/// The CPI started by a shell with `redirection`. The further argument `rmdir` removes the working
/// directory first.
fn redirected(installation: &Installation, redirection: &str) -> Command {
    let script = format!(
        "[ \"$3\" != rmdir ] || rmdir \"$PWD\" || exit; exec \"$1\" --config \"$2\" {redirection}"
    );
    let mut command = Command::new("/bin/sh");
    let program = env!("CARGO_BIN_EXE_bosh-qemu-cpi");
    command.args(["-c", &script, "sh", program]).arg(installation.config());
    command
}

#[test]
fn call_with_secrets_neither_logs_nor_returns_them() {
    const CANARY: &str = "hunter2";
    let installation = Installation::with(&json!({
        "log": {"level": "trace"},
        "agent": {
            "mbus": format!("nats://u:{CANARY}@10.0.0.1:4222"),
            "blobstore": {"password": CANARY},
        },
    }));
    let secret = json!({"password": CANARY});
    let network = json!({
        "type": "manual", "ip": "10.0.0.2", "netmask": "255.0.0.0", "cloud_properties": secret,
    });
    let whole = [
        json!("a"),
        json!("s-1"),
        secret.clone(),
        json!({"n": network}),
        json!([]),
        json!({"bosh": secret}),
    ];
    let mut requests = vec![
        json!({"method": "create_vm", "arguments": whole}),
        json!({"method": "create_stemcell", "arguments": ["/nowhere", secret, {"tags": secret}]}),
        json!({"method": "create_disk", "arguments": [64, {"type": CANARY}, null]}),
        json!({"method": "set_vm_metadata", "arguments": ["vm-1", secret]}),
        json!({"method": "has_vm", "arguments": ["vm-1"], "context": {"agent": CANARY}}),
        json!({
            "method": "has_vm", "arguments": ["vm-1"], "context": {"agent": {"mbus": [CANARY]}},
        }),
        json!({"method": "has_vm", "arguments": ["vm-1"], "context": CANARY}),
        json!({"method": "has_vm", "arguments": CANARY}),
        json!({"method": "has_vm", "arguments": ["vm-1"], "api_version": CANARY}),
        json!([CANARY]),
    ];
    // A secret replaces every argument, and every key of a network.
    for position in 0..whole.len() {
        for wrong in [json!(CANARY), json!([CANARY]), json!({"n": CANARY}), json!({"n": [CANARY]})]
        {
            let mut arguments = whole.clone();
            arguments[position] = wrong;
            requests.push(json!({"method": "create_vm", "arguments": arguments}));
        }
    }
    for key in [
        "type",
        "ip",
        "netmask",
        "gateway",
        "prefix",
        "dns",
        "default",
        "nic_group",
        "cloud_properties",
    ] {
        for wrong in [json!(CANARY), json!([CANARY]), json!({"x": CANARY})] {
            let mut arguments = whole.clone();
            arguments[3]["n"][key] = wrong;
            requests.push(json!({"method": "create_vm", "arguments": arguments}));
        }
    }
    for mut request in requests {
        if let Some(request) = request.as_object_mut() {
            request
                .entry("context")
                .or_insert_with(|| json!({"director_uuid": CANARY, "password": CANARY}));
        }
        let answer = installation.ask(&request);
        assert!(!answer.stderr.contains(CANARY), "{request}: {}", answer.stderr);
        if let Err(failure) = &answer.outcome {
            assert!(!failure.message.contains(CANARY), "{request}: {}", failure.message);
        }
    }
    // Truncated requests.
    let text = json!({"method": "create_vm", "arguments": whole}).to_string();
    for end in (1..text.len()).step_by(7) {
        let answer = installation.ask_raw(&text.as_bytes()[..end]);
        assert!(!answer.failure().message.contains(CANARY), "{}", answer.failure().message);
    }
}
