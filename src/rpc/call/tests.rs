use super::*;
use crate::rpc::fake::{Calls, Fake};

fn request(method: &str, arguments: &str) -> Request {
    Request::parse(&format!(r#"{{"method":"{method}","arguments":{arguments}}}"#)).unwrap()
}

/// The calls that the fake received, and the result.
fn run(method: &str, arguments: &str) -> (Vec<String>, String) {
    let calls = Calls::default();
    assert!(crate::config::METHODS.contains(&method), "{method}");
    let call = Call::parse(&request(method, arguments)).unwrap();
    let result = call.run(&Fake::new(calls.clone())).unwrap().result;
    (calls.take(), result.get().to_owned())
}

fn refusal(method: &str, arguments: &str) -> String {
    let error = Call::parse(&request(method, arguments)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadRequest, "{error}");
    error.report()
}

#[test]
fn every_method_runs_and_its_result_has_the_contracts_shape() {
    for (method, arguments, call, result) in [
        ("create_stemcell", r#"["/i",{}]"#, "create_stemcell /i", r#""stemcell-new""#),
        ("delete_stemcell", r#"["sc-1"]"#, "delete_stemcell sc-1", "null"),
        (
            "create_vm",
            r#"["a","sc-1",{},{"n":{"type":"dynamic"}},["d-1"],{}]"#,
            "create_vm a",
            r#"["vm-new",{"n":{"type":"dynamic"}}]"#,
        ),
        ("delete_vm", r#"["vm-1"]"#, "delete_vm vm-1", "null"),
        ("has_vm", r#"["vm-1"]"#, "has_vm vm-1", "true"),
        ("reboot_vm", r#"["vm-1"]"#, "reboot_vm vm-1", "null"),
        (
            "set_vm_metadata",
            r#"["vm-1",{"index":"0"}]"#,
            r#"set_vm_metadata vm-1 {"index":"0"}"#,
            "null",
        ),
        (
            "calculate_vm_cloud_properties",
            r#"[{"ram":512,"cpu":2,"ephemeral_disk_size":1024}]"#,
            "calculate_vm_cloud_properties 512 MiB",
            r#"{"cpu":2}"#,
        ),
        ("create_disk", r#"[1024,{},"vm-1"]"#, "create_disk 1 GiB near vm-1", r#""disk-new""#),
        ("delete_disk", r#"["d-1"]"#, "delete_disk d-1", "null"),
        ("has_disk", r#"["d-1"]"#, "has_disk d-1", "false"),
        (
            "attach_disk",
            r#"["vm-1","d-1"]"#,
            "attach_disk vm-1 d-1",
            r#"{"path":"/dev/disk/by-id/virtio-d-1"}"#,
        ),
        ("detach_disk", r#"["vm-1","d-1"]"#, "detach_disk vm-1 d-1", "null"),
        ("get_disks", r#"["vm-1"]"#, "get_disks vm-1", r#"["disk-new"]"#),
        ("set_disk_metadata", r#"["d-1",{"a":1}]"#, r#"set_disk_metadata d-1 {"a":1}"#, "null"),
    ] {
        assert_eq!(run(method, arguments), (vec![call.to_owned()], result.to_owned()));
    }
}

#[test]
fn optional_arguments_may_be_null_or_missing() {
    for (method, arguments, call) in [
        ("create_stemcell", r#"["/i",null]"#, "create_stemcell /i"),
        ("create_stemcell", r#"["/i"]"#, "create_stemcell /i"),
        ("create_stemcell", r#"["/i",{},{"tags":{}}]"#, "create_stemcell /i"),
        (
            "create_stemcell",
            r#"["/i",null,{"tags":{"a":"b"},"new":1}]"#,
            r#"create_stemcell /i {"a": String("b")}"#,
        ),
        ("create_disk", r#"[1,{},null]"#, "create_disk 1 MiB"),
        ("create_disk", r#"[1,null]"#, "create_disk 1 MiB"),
        ("create_vm", r#"["a","sc-1",null,{},[],{}]"#, "create_vm a"),
    ] {
        assert_eq!(run(method, arguments).0, [call]);
    }
}

#[test]
fn a_refused_argument_is_named_by_position_and_name() {
    for (method, arguments, expected) in [
        ("has_vm", "[]", "argument 1, vm_cid: missing; expected a cid"),
        ("has_vm", "[null]", "argument 1, vm_cid: expected a cid, got null"),
        ("has_vm", r#"["vm-1","secret"]"#, "2 arguments given, 1 expected"),
        ("has_vm", r#"[{"a":"secret"}]"#, "argument 1, vm_cid: expected a cid, got an object"),
        ("has_vm", r#"[""]"#, "argument 1, vm_cid: must have 1 to 128 characters, has 0"),
        ("attach_disk", r#"["vm-1"]"#, "argument 2, disk_cid: missing; expected a cid"),
        (
            "create_disk",
            "[0,{}]",
            "argument 1, size: expected a whole number of MiB from 1 to 67108864, got 0",
        ),
        (
            "create_disk",
            "[-1,{}]",
            "argument 1, size: expected a whole number of MiB from 1 to 67108864, got -1",
        ),
        (
            "create_disk",
            "[1.5,{}]",
            "argument 1, size: expected a whole number of MiB from 1 to 67108864, got 1.5",
        ),
        (
            "create_disk",
            "[67108865,{}]",
            "argument 1, size: expected a whole number of MiB from 1 to 67108864, got 67108865",
        ),
        (
            "create_disk",
            r#"["1",{}]"#,
            "argument 1, size: expected a whole number of MiB from 1 to 67108864, got \"1\"",
        ),
        (
            "create_disk",
            r#"[1,"secret"]"#,
            "argument 2, cloud_properties: expected an object, got a string",
        ),
        ("create_disk", "[1,{},7]", "argument 3, vm_cid: expected a cid, got 7"),
        (
            "create_stemcell",
            r#"["image",{}]"#,
            "argument 1, image_path: expected an absolute path, got a string",
        ),
        (
            "create_stemcell",
            r#"["/i",{},[]]"#,
            "argument 3, extra: expected an object, got an array",
        ),
        (
            "create_vm",
            r#"["a b","s",{},{},[],{}]"#,
            "argument 1, agent_id: expected 1 to 128 letters, digits, '-', '_' and '.', \
             got a string",
        ),
        (
            "create_vm",
            r#"["a","s",{},[],[],{}]"#,
            "argument 4, networks: expected an object, got an array",
        ),
        (
            "create_vm",
            r#"["a","s",{},{"n":{"type":"vip"}},[],{}]"#,
            "argument 4, networks.n.ip: missing; expected an IP address of a host",
        ),
        (
            "create_vm",
            r#"["a","s",{},{},null,{}]"#,
            "argument 5, disk_cids: expected an array of cids, got null",
        ),
        (
            "create_vm",
            r#"["a","s",{},{},["d",7],{}]"#,
            "argument 5, disk_cids.1: expected a cid, got 7",
        ),
        (
            "create_vm",
            r#"["a","s",{},{},[],"secret"]"#,
            "argument 6, env: expected an object, got a string",
        ),
        ("create_vm", r#"["a","s",{},{},[]]"#, "argument 6, env: missing; expected an object"),
        ("set_vm_metadata", r#"["vm-1"]"#, "argument 2, metadata: missing; expected an object"),
        (
            "set_vm_metadata",
            r#"["vm-1",null]"#,
            "argument 2, metadata: expected an object, got null",
        ),
        (
            "calculate_vm_cloud_properties",
            r#"[{"ram":1,"cpu":1}]"#,
            "argument 1, vm_resources.ephemeral_disk_size: missing; \
             expected a whole number of MiB from 1 to 67108864",
        ),
    ] {
        assert_eq!(refusal(method, arguments), expected);
    }
}

#[test]
fn missing_methods_fail_with_the_kinds_that_callers_act_on() {
    let kind = |method: &str, arguments: &str| {
        let run = |call: Call| call.run(&Fake::new(Calls::default()));
        Call::parse(&request(method, arguments)).and_then(run).unwrap_err().kind()
    };
    for method in ["ping", "current_vm_id", "configure_networks", "no_such_method", ""] {
        assert_eq!(kind(method, "[]"), ErrorKind::NotImplemented, "{method}");
    }
    for (method, arguments) in [
        ("snapshot_disk", r#"["d-1",{"index":0}]"#),
        ("delete_snapshot", r#"["snap-1"]"#),
        ("create_network", r#"[{"type":"manual"}]"#),
        ("delete_network", r#"["net-1"]"#),
    ] {
        assert_eq!(kind(method, arguments), ErrorKind::NotImplemented, "{method}");
    }
    assert_eq!(kind("resize_disk", r#"["d-1",2048]"#), ErrorKind::NotSupported);
    assert_eq!(kind("update_disk", r#"["d-1",2048,{}]"#), ErrorKind::NotSupported);
}

#[test]
fn the_methods_of_the_configuration_are_those_of_the_contract() {
    // `info` has no arguments and is no Call.
    for method in crate::config::METHODS.iter().filter(|method| **method != "info") {
        let refused = Call::parse(&request(method, "[]")).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::BadRequest, "{method}");
    }
}

#[test]
fn an_argument_over_its_bound_is_refused_with_the_bound() {
    let list =
        |count, item: &dyn Fn(usize) -> String| (0..count).map(item).collect::<Vec<_>>().join(",");
    let tags = |count| list(count, &|n| format!(r#""t{n}":"x""#));
    let networks = |count| list(count, &|n| format!(r#""n{n}":{{"type":"dynamic"}}"#));
    let disks = |count| list(count, &|n| format!(r#""disk-{n}""#));
    let long = |bytes| format!(r#"{{"a":"{}"}}"#, "x".repeat(bytes));
    let create_vm = |properties: &str, networks: &str, disks: &str, env: &str| {
        let networks = format!("{{{networks}}}");
        format!(r#"["a","s-1",{properties},{networks},[{disks}],{env}]"#)
    };
    let kib_65 = long(65 << 10);
    let mib_5 = long(5 << 20);
    let with_long = format!(r#""n":{{"type":"dynamic","x":{mib_5}}}"#);
    for (method, arguments, expected) in [
        (
            "set_vm_metadata",
            format!(r#"["vm-1",{kib_65}]"#),
            "argument 2, metadata: has 66568 bytes, the limit is 65536",
        ),
        (
            "set_disk_metadata",
            format!(r#"["d-1",{{{}}}]"#, tags(1001)),
            "argument 2, metadata: has 1001 entries, the limit is 1000",
        ),
        (
            "snapshot_disk",
            format!(r#"["d-1",{{{}}}]"#, tags(1001)),
            "argument 2, metadata: has 1001 entries, the limit is 1000",
        ),
        (
            "create_disk",
            format!("[1,{kib_65}]"),
            "argument 2, cloud_properties: has 66568 bytes, the limit is 65536",
        ),
        (
            "create_stemcell",
            format!(r#"["/i",{{}},{{"tags":{kib_65}}}]"#),
            "argument 3, extra: has 66577 bytes, the limit is 65536",
        ),
        (
            "create_network",
            format!("[{kib_65}]"),
            "argument 1, subnet: has 66568 bytes, the limit is 65536",
        ),
        (
            "create_vm",
            create_vm(&kib_65, "", "", "{}"),
            "argument 3, cloud_properties: has 66568 bytes, the limit is 65536",
        ),
        (
            "create_vm",
            create_vm("{}", &networks(65), "", "{}"),
            "argument 4, networks: has 65 entries, the limit is 64",
        ),
        (
            "create_vm",
            create_vm("{}", &with_long, "", "{}"),
            "argument 4, networks: has 5242917 bytes, the limit is 4194304",
        ),
        (
            "create_vm",
            create_vm("{}", "", &disks(257), "{}"),
            "argument 5, disk_cids: has 257 entries, the limit is 256",
        ),
        (
            "create_vm",
            create_vm("{}", "", "", &mib_5),
            "argument 6, env: has 5242888 bytes, the limit is 4194304",
        ),
    ] {
        assert_eq!(refusal(method, &arguments), expected);
    }
    for (method, arguments) in [
        ("set_disk_metadata", format!(r#"["d-1",{{{}}}]"#, tags(1000))),
        ("create_vm", create_vm("{}", &networks(64), &disks(256), &long(1 << 19))),
    ] {
        assert!(Call::parse(&request(method, &arguments)).is_ok(), "{method}");
    }
}

#[test]
fn a_hostile_method_name_is_cut_and_escaped() {
    let error = Call::parse(&request(&("\\u001b\\n".to_owned() + &"x".repeat(9000)), "[]"))
        .unwrap_err()
        .report();
    assert!(error.starts_with(r"unknown method '\u{1b}\nxxx") && error.len() < 150, "{error}");
}
