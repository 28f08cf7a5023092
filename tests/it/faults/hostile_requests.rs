//! Hostile requests: no value reaches QEMU's command line or the host's paths, and no secret is
//! exposed.

use std::fs;

use bosh_qemu_cpi::cid::VmCid;
use bosh_qemu_cpi::schema::is_control;
use serde_json::{Value, json};

use crate::support::answer::Answer;
use crate::support::host::{Host, command_line, vm_cid};

/// A value that would end an option, a string, a path or a line early.
const HOSTILE: &str = "x,id=y,readonly=off\",\"a\":{} -device z\n$(id)'\\ \u{202e}é/../%s";

/// The same for a name, which may not have control characters.
const HOSTILE_NAME: &str = "x,id=y,readonly=off\",\"a\":{} -device z$(id)'\\ é/../%s";

fn assert_refused(answer: &Answer, says: &str) {
    assert_eq!(answer.failure().kind, "CpiError", "{says}: {answer:?}");
}

/// Builds the arguments of a method with a cid in them.
type Arguments = fn(&str) -> Value;

#[test]
fn call_with_hostile_cid_is_refused() {
    let Some(host) = Host::new() else { return };
    let long = "a".repeat(300);
    let cids = [
        "",
        ".",
        "..",
        "../vms",
        "/etc/passwd",
        "-drive",
        "a/b",
        "a,b",
        "a\"b",
        "a b",
        "a\nb",
        "a\0b",
        "é",
        HOSTILE,
        &long,
    ];
    let methods: [(&str, Arguments); 12] = [
        ("delete_stemcell", |cid| json!([cid])),
        ("delete_vm", |cid| json!([cid])),
        ("has_vm", |cid| json!([cid])),
        ("reboot_vm", |cid| json!([cid])),
        ("get_disks", |cid| json!([cid])),
        ("set_vm_metadata", |cid| json!([cid, {}])),
        ("delete_disk", |cid| json!([cid])),
        ("has_disk", |cid| json!([cid])),
        ("attach_disk", |cid| json!(["vm-1", cid])),
        ("detach_disk", |cid| json!([cid, "disk-1"])),
        ("set_disk_metadata", |cid| json!([cid, {}])),
        ("create_vm", |cid| json!(["a", cid, {}, {}, [], {}])),
    ];
    for (index, cid) in cids.iter().enumerate() {
        // Each method gets a third of the cids, each cid a third of the methods.
        for (method, arguments) in methods.iter().skip(index % 3).step_by(3) {
            assert_refused(&host.call(method, &arguments(cid)), &format!("{method} {cid:?}"));
        }
    }
    for cid in [json!(null), json!(1), json!(["vm-1"]), json!({"cid": "vm-1"})] {
        assert_refused(&host.call("delete_vm", &json!([cid])), "no string");
    }
    assert!(!host.path("state").exists(), "a refused call writes nothing");
}

#[test]
fn create_with_invalid_size_is_refused() {
    let Some(host) = Host::new() else { return };
    for size in [
        "0",
        "-1",
        "1.5",
        "\"1024\"",
        "null",
        "1e30",
        "9223372036854775808",
        "67108865",
        "[1]",
        "true",
    ] {
        let size: Value = serde_json::from_str(size).unwrap();
        assert_refused(&host.call("create_disk", &json!([size, {}, null])), &format!("{size} MiB"));
        for key in ["ram", "cpu", "ephemeral_disk", "root_disk", "extra_disks_slots"] {
            // `null` means the default, and 0 further slots is valid.
            if size.is_null() || (key == "extra_disks_slots" && size == 0) {
                continue;
            }
            let mut arguments = host.vm_arguments("stemcell-1");
            arguments[2] = json!({key: size});
            assert_refused(&host.call("create_vm", &arguments), &format!("{key}: {size}"));
        }
    }
    assert!(!host.path("state/vms").exists() || host.leaks().is_empty());
}

/// QEMU's command line without the values that differ between two VMs.
fn options(host: &Host, vm: &VmCid) -> Vec<String> {
    let record = host.record(vm);
    let mut words = command_line(&host.qemu(vm).unwrap());
    let own = [vm.to_string(), record.machine.uuid]
        .into_iter()
        .chain(record.nics.iter().map(|nic| nic.mac.to_string()));
    for own in own {
        words.iter_mut().for_each(|word| *word = word.replace(&own, "…"));
    }
    words.iter().map(|word| without_descriptors(word)).collect()
}

/// Removes the numbers of descriptors, which differ between launches.
fn without_descriptors(word: &str) -> String {
    let mut left = word.to_owned();
    for before in [",fd=", "\"fd\":\"", "fd="] {
        if let Some(at) = left.find(before).map(|at| at + before.len()) {
            let digits = left[at..].chars().take_while(char::is_ascii_digit).count();
            left.replace_range(at..at + digits, "");
        }
    }
    left
}

#[test]
fn create_vm_with_hostile_values_adds_no_qemu_option() {
    let Some(host) = Host::new() else { return };
    let stemcell = host.stemcell();
    let honest = host.vm(&stemcell);
    let mut arguments = host.vm_arguments(&stemcell);
    let mut network = arguments[3]["net"].take();
    network[HOSTILE_NAME] = HOSTILE.into();
    network["dns"] = json!([]);
    network["default"] = json!([HOSTILE]);
    arguments[2]["zone"] = HOSTILE.into();
    arguments[3] = json!({HOSTILE_NAME: network});
    arguments[5] = json!({HOSTILE: HOSTILE, "bosh": {"password": HOSTILE, "group": HOSTILE}});
    let result = host.ok("create_vm", &arguments);
    assert_eq!(result[1][HOSTILE_NAME][HOSTILE_NAME], HOSTILE, "the answer repeats the network");
    let vm = vm_cid(&result);
    host.ok("set_vm_metadata", &json!([vm, {HOSTILE_NAME: HOSTILE, "name": HOSTILE}]));
    let disk = host.disk();
    host.ok("set_disk_metadata", &json!([disk, {HOSTILE_NAME: HOSTILE}]));
    assert_eq!(options(&host, &vm), options(&host, &honest));
    host.ok("attach_disk", &json!([vm, disk]));
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 1);
    host.ok("reboot_vm", &json!([vm]));
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 2);
    host.ok("delete_vm", &json!([vm]));

    // Values that would become a name, a path or an option are refused.
    let fails = |pointer: &str, value: Value| {
        let mut arguments = host.vm_arguments(&stemcell);
        *arguments.pointer_mut(pointer).unwrap() = value;
        assert_refused(&host.call("create_vm", &arguments), pointer);
    };
    fails("/0", HOSTILE.into());
    fails("/2", json!({"machine": HOSTILE}));
    fails("/2", json!({"machine": "../../../etc/passwd"}));
    fails("/2", json!({"machine": "q35,accel=kvm"}));
    fails("/2", json!({"cpu_model": "max -device x"}));
    fails("/2", json!({"cpu_model": "max\",x"}));
    fails("/2", json!({"accel": "tcg,thread=multi"}));
    fails("/2", json!({HOSTILE: 1}));
    fails("/3/net/cloud_properties", json!({"bridge": HOSTILE}));
    fails("/3/net/cloud_properties", json!({"bridge": "../br0"}));
    fails("/3/net/cloud_properties", json!({"name": HOSTILE}));
    fails("/3/net/type", HOSTILE.into());
    fails("/3/net/ip", HOSTILE.into());
    fails("/3/net/netmask", "255.0.255.0".into());
    fails("/4", json!([HOSTILE]));
    assert_refused(&host.call("create_disk", &json!([8, {"format": HOSTILE}, null])), "format");
    assert_refused(&host.call("create_disk", &json!([8, {HOSTILE: 1}, null])), "disk's key");
}

#[test]
fn call_with_control_characters_in_a_name_is_refused_and_shows_none() {
    let Some(host) = Host::new() else { return };
    let refused = |method: &str, arguments: &Value| {
        let answer = host.call(method, arguments);
        assert_refused(&answer, method);
        let message = &answer.failure().message;
        assert!(message.contains("a name without control characters"), "{message}");
        let lines = answer.stderr.lines().chain(message.lines());
        assert!(!lines.clone().any(|line| line.contains(is_control)), "{answer:?}");
    };
    for character in ['\u{1b}', '\n', '\u{7f}', '\u{9b}', '\u{202e}', '\u{2067}'] {
        let name = format!("a{character}[2Jb");
        let network = host.vm_arguments("stemcell-1")[3]["net"].take();
        let create_vm = |networks: Value| {
            let mut arguments = host.vm_arguments("stemcell-1");
            arguments[3] = networks;
            refused("create_vm", &arguments);
        };
        create_vm(json!({&name: network}));
        let mut with_key = network.clone();
        with_key[&name] = json!(1);
        create_vm(json!({"net": with_key}));
        refused("set_vm_metadata", &json!(["vm-1", {&name: "x"}]));
        refused("set_disk_metadata", &json!(["disk-1", {&name: "x"}]));
        refused("snapshot_disk", &json!(["disk-1", {&name: "x"}]));
        refused("create_disk", &json!([8, {&name: 1}, null]));
        refused("create_network", &json!([{&name: 1}]));
    }
    assert!(!host.path("state").exists(), "a refused call writes nothing");
}

#[test]
fn create_stemcell_from_hostile_path_takes_it_literally() {
    let Some(host) = Host::new() else { return };
    host.stemcell();
    // A file name cannot contain `/`.
    let image = host.path(&HOSTILE.replace('/', "⁄"));
    fs::copy(host.path("image"), &image).unwrap();
    let digest = std::process::Command::new("sha256sum").arg(host.path("image")).output().unwrap();
    let digest = String::from_utf8(digest.stdout).unwrap()[..64].to_owned();
    let light = json!(["/nonexistent", {"image_path": image, "sha256": digest}]);
    let stemcell = host.ok("create_stemcell", &light);
    let vm = host.vm(stemcell.as_str().unwrap());
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 1);
    assert!(!command_line(&host.qemu(&vm).unwrap()).concat().contains("readonly=off\""));
    host.ok("delete_vm", &json!([vm]));
    host.ok("delete_stemcell", &json!([stemcell]));
    assert!(image.exists(), "the image of a light stemcell stays");
}

#[test]
fn call_with_directories_in_context_ignores_them() {
    let Some(host) = Host::new() else { return };
    let elsewhere = host.path("elsewhere");
    let context = json!({
        "director_uuid": "x", "state_dir": elsewhere, "run_dir": elsewhere, "hardening": "off",
        "qemu": {"binary": "/bin/false"}, "networks": {},
    });
    let request = json!({
        "method": "create_disk", "arguments": [8, {}, null], "context": context, "api_version": 2,
    });
    let disk = host.ask(&request.to_string());
    assert!(host.path("state/disks").join(disk.result().as_str().unwrap()).exists());
    assert!(!elsewhere.exists());
}

/// Put into every place of a request that may hold a secret.
const SECRET: &str = "hunter2-canary";

/// Everything about a VM that other users or a log reader could see, except the memory of
/// processes.
fn exposed(host: &Host, vm: &VmCid) -> Vec<(String, Vec<u8>)> {
    let mut exposed = Vec::new();
    for process in [host.qemu(vm), host.supervisor(vm)].into_iter().flatten() {
        for file in ["cmdline", "environ", "comm"] {
            let path = format!("/proc/{}/{file}", process.pid());
            exposed.push((path.clone(), fs::read(path).unwrap()));
        }
    }
    for entry in fs::read_dir(&host.paths(vm).dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if !["config.img", "base.raw", "root.qcow2"].contains(&name.as_str()) {
            exposed.push((name, fs::read(path).unwrap()));
        }
    }
    exposed
}

#[test]
fn create_vm_with_secrets_keeps_them_on_the_config_drive() {
    let config = json!({
        "log": {"level": "trace"},
        "agent": {
            "mbus": format!("nats://u:{SECRET}@10.9.0.1"),
            "blobstore": {"options": {"password": SECRET}},
        },
    });
    let Some(host) = Host::with(config) else { return };
    let stemcell = host.stemcell();
    let env = json!({
        "bosh": {"password": SECRET, "mbus": {"cert": {"private_key": SECRET}}}, SECRET: SECRET,
    });
    let mut arguments = host.vm_arguments(&stemcell);
    arguments[5] = env;
    let agent = json!({"mbus": format!("https://u:{SECRET}@0.0.0.0")});
    let context = json!({"director_uuid": "x", "secret": SECRET, "agent": agent});
    let ask = |method: &str, arguments: &Value| {
        let request =
            json!({"method": method, "arguments": arguments, "context": context, "api_version": 2});
        let answer = host.ask(&request.to_string());
        assert!(!answer.stderr.is_empty() || answer.outcome.is_err(), "{method}: the log is on");
        assert!(
            !answer.stderr.contains(SECRET) && !answer.stdout.contains(SECRET),
            "{method}: {answer:?}"
        );
        answer
    };
    let vm = vm_cid(ask("create_vm", &arguments).result());
    let disk = host.disk();
    ask("attach_disk", &json!([vm, disk])).result();
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 1);
    ask("detach_disk", &json!([vm, disk])).result();
    ask("reboot_vm", &json!([vm])).result();
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 2);
    let drive = fs::read(host.paths(&vm).config_drive()).unwrap();
    let has = |bytes: &[u8]| bytes.windows(SECRET.len()).any(|window| window == SECRET.as_bytes());
    assert!(has(&drive), "the secret is not on the config drive, so this test would prove nothing");
    let exposed = exposed(&host, &vm);
    for file in ["supervisor.log", "events.jsonl", "qemu.log", "console.log", "vm.json"] {
        assert!(exposed.iter().any(|(name, _)| name == file), "{file} is not checked");
    }
    for (name, bytes) in exposed {
        assert!(!has(&bytes), "{name}: {}", String::from_utf8_lossy(&bytes));
    }

    // Errors do not quote the secret, either.
    for (pointer, value) in [
        ("/2", json!({"ram": SECRET})),
        ("/2", json!({"cpu_model": format!("{SECRET};")})),
        ("/2", json!({"ram": 64, "cpu_model": "nonsense"})),
        ("/3", json!(SECRET)),
        ("/3/net/ip", json!(SECRET)),
        ("/5", json!(SECRET)),
    ] {
        let mut arguments = arguments.clone();
        *arguments.pointer_mut(pointer).unwrap() = value;
        ask("create_vm", &arguments).failure();
    }
    let torn = host.ask(&format!(r#"{{"method":"create_vm","arguments":["{SECRET}""#));
    assert!(!torn.stdout.contains(SECRET) && !torn.stderr.contains(SECRET), "{torn:?}");
}
