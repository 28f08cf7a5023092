//! The limits of remote callers: the key starts one command, and the command executes one request.

use std::fs;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use super::Pair;
use crate::support::host::{request, vm_cid};

impl Pair {
    /// Runs ssh with the caller's key and other `words` than the program uses.
    fn ssh(&self, words: &[&str]) -> Output {
        let known = self.director.path("known");
        fs::write(&known, format!("{} {}", self.sshd.address(), self.sshd.read("host.pub")))
            .unwrap();
        let mut command = Command::new("ssh");
        command
            .args(["-F", "none", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-i"])
            .arg(self.sshd.key());
        command.args(["-o", &format!("UserKnownHostsFile={}", known.display())]).args(words);
        self.director.namespace().run(|| command.stdin(Stdio::null()).output().unwrap())
    }

    /// The messages of `host serve` after it has read `lines`, without a transport.
    fn serve(&self, lines: &[Value]) -> Vec<Value> {
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        let mut command = self.host.cpi();
        command.args(["host", "serve"]);
        let output =
            self.host.namespace().run(|| crate::support::answer::run(command, text.as_bytes()));
        String::from_utf8(output.stdout)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// The CPI response to the request `call`.
    fn answer(&self, call: &Value) -> Value {
        let words = self.serve(&[json!({"call": call}), json!(true)]);
        let answer =
            words.last().unwrap()["answer"]["text"].as_str().unwrap_or_else(|| panic!("{words:?}"));
        serde_json::from_str(answer).unwrap()
    }
}

#[test]
fn connect_with_the_key_runs_only_host_serve() {
    let Some(pair) = Pair::new() else { return };
    let host = format!("root@{}", pair.sshd.address());
    for words in [&[&*host, "id"][..], &["-t", &host, "bash"], &["-s", &host, "sftp"]] {
        let output = pair.ssh(words);
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(said.starts_with("{\"greeting\":"), "{words:?}: {output:?}");
        assert!(!said.contains("uid="), "{words:?}: {said}");
    }
    let forward =
        pair.ssh(&["-o", "ExitOnForwardFailure=yes", "-N", "-R", "2000:127.0.0.1:22", &host]);
    assert!(!forward.status.success(), "a port of the host was given away");
}

#[test]
fn call_with_privileged_context_keys_ignores_them() {
    let Some(pair) = Pair::new() else { return };
    let context = json!({
        "director_uuid": "d", "state_dir": "/tmp/elsewhere", "qemu": {"binary": "/bin/false"},
        "hardening": "off", "transport": {"kind": "unix", "socket": "/nowhere"},
        "hosts": [{"name": "h", "transport": {}}], "remote_callers": {"image_dirs": ["/"]},
        "pools": {"p": {"path": "/"}}, "key_file": "/etc/shadow",
    });
    let request =
        json!({"method": "create_disk", "arguments": [1, {}], "context": context}).to_string();
    let answer = pair.answer(&json!({"request": request}));
    let disk = answer["result"].as_str().unwrap();
    assert!(
        pair.host.path("state").join("disks").join(disk).join("disk.json").exists(),
        "{answer}"
    );
    pair.host.ok("delete_disk", &json!([disk]));
}

#[test]
fn create_stemcell_from_file_of_the_host_is_refused() {
    let Some(pair) = Pair::new() else { return };
    let secret = pair.host.path("secret");
    let mut disk = vec![7; 4096];
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    fs::write(&secret, disk).unwrap();
    // The path of an image to import is a path on the caller's machine.
    let create = |properties: &Value| request("create_stemcell", &json!([secret, properties]));
    let refused = pair.answer(&json!({"request": create(&json!({}))}));
    assert!(refused["error"]["message"].as_str().unwrap().contains("sends no image"), "{refused}");
    // A light stemcell's image must be in a directory that the operator opens to callers.
    let digest = bosh_qemu_cpi::digest::Digest::of_file(&secret).unwrap().to_string();
    let light = json!({"image_path": secret, "sha256": digest});
    let ask = |properties: &Value| pair.answer(&json!({"request": create(properties), "image": 0}));
    let refused = ask(&light);
    let message = refused["error"]["message"].as_str().unwrap();
    assert!(
        message.contains("cloud_properties.image_path")
            && message.contains("remote_callers.image_dirs"),
        "{message}"
    );
    let shared = pair.host.path("shared");
    fs::create_dir(&shared).unwrap();
    pair.host.reconfigure(|config| config["remote_callers"] = json!({"image_dirs": [shared]}));
    let outside = shared.join("link");
    std::os::unix::fs::symlink(&secret, &outside).unwrap();
    let refused = ask(&json!({"image_path": outside, "sha256": digest}));
    assert_eq!(refused["error"]["type"], "Bosh::Clouds::CpiError", "{refused}");
    let refused = ask(&json!({"image_path": shared.join("../secret"), "sha256": digest}));
    assert_eq!(refused["error"]["type"], "Bosh::Clouds::CpiError", "{refused}");
    let inside = shared.join("image");
    fs::copy(&secret, &inside).unwrap();
    let taken = ask(&json!({"image_path": inside, "sha256": digest}));
    assert!(taken["result"].is_string(), "{taken}");
    pair.host.ok("delete_stemcell", &json!([taken["result"]]));
}

#[test]
fn create_with_invalid_or_used_cid_is_refused() {
    let Some(pair) = Pair::new() else { return };
    let create = |cid: &str| {
        pair.answer(&json!({"request": request("create_disk", &json!([1, {}])), "cid": cid}))
    };
    let disk = "disk-aaaaaaaaaaaaaaa";
    assert_eq!(create(disk)["result"], disk);
    let taken = create(disk);
    assert!(taken["error"]["message"].as_str().unwrap().contains("already"), "{taken}");
    for bad in [
        "",
        "disk-a",
        "vm-aaaaaaaaaaaaaaa",
        "disk-aaaaaaaaaaaaaa.",
        "disk-aaaaaaaaaaaaaaa/..",
        "../x",
    ] {
        assert_eq!(create(bad)["error"]["type"], "Bosh::Clouds::CpiError", "{bad}");
    }
    pair.host.ok("delete_disk", &json!([disk]));
}

#[test]
fn create_after_its_undo_is_cancelled() {
    let Some(pair) = Pair::new() else { return };
    let stemcell = pair.host.stemcell();
    for (create, arguments, delete, cid) in [
        ("create_disk", json!([1, {}]), "delete_disk", "disk-aaaaaaaaaaaaaaa"),
        ("create_vm", pair.host.vm_arguments(&stemcell), "delete_vm", "vm-aaaaaaaaaaaaaaa"),
        ("create_network", json!([{"type": "manual"}]), "delete_network", "net-aaaaaaaaaaaaaaa"),
    ] {
        let undo = pair.answer(&json!({"request": request(delete, &json!([cid])), "undoes": true}));
        assert!(
            undo["error"].is_null() || undo["error"]["type"] == "Bosh::Clouds::NetworkNotFound",
            "{undo}"
        );
        let late = pair.answer(&json!({"request": request(create, &arguments), "cid": cid}));
        let message = late["error"]["message"].as_str().unwrap_or_else(|| panic!("{late}"));
        assert!(message.contains(&format!("cancelled the creation of '{cid}'")), "{message}");
    }
    for dir in ["vms", "disks", "pending", "uids"] {
        let left: Vec<_> = fs::read_dir(pair.host.path("state").join(dir)).unwrap().collect();
        assert!(left.is_empty(), "{dir}: {left:?}");
    }
    // A plain delete of an unknown cid does not cancel its create.
    let disk = "disk-bbbbbbbbbbbbbbb";
    pair.answer(&json!({"request": request("delete_disk", &json!([disk]))}));
    let made =
        pair.answer(&json!({"request": request("create_disk", &json!([1, {}])), "cid": disk}));
    assert_eq!(made["result"], disk);
    // A cancellation after the create removes the object.
    let undo =
        pair.answer(&json!({"request": request("delete_disk", &json!([disk])), "undoes": true}));
    assert!(undo["error"].is_null(), "{undo}");
    assert_eq!(pair.host.ok("has_disk", &json!([disk])), false);
}

#[test]
fn create_vm_beside_more_of_its_group_is_refused() {
    let Some(pair) = Pair::new() else { return };
    let stemcell = pair.host.stemcell();
    let create = |alike: usize| {
        let mut arguments = pair.host.vm_arguments(&stemcell);
        arguments[5] = json!({"bosh": {"group": "d-dep-db"}});
        let call = json!({"request": request("create_vm", &arguments), "alike": alike});
        pair.serve(&[json!({"call": call}), json!(true)]).pop().unwrap()["answer"].take()
    };
    let result =
        |answer: &Value| serde_json::from_str::<Value>(answer["text"].as_str().unwrap()).unwrap();
    let first = vm_cid(&result(&create(0))["result"]);
    pair.host.track_vms(&first.to_string());
    let refused = create(0);
    assert_eq!(refused["crowded"], true, "{refused}");
    assert!(
        result(&refused)["error"]["message"].as_str().unwrap().contains("group is 1, not 0"),
        "{refused}"
    );
    assert_eq!(fs::read_dir(pair.host.path("state/vms")).unwrap().count(), 1);
    let second = vm_cid(&result(&create(1))["result"]);
    pair.host.track_vms(&second.to_string());
    [first, second].iter().for_each(|vm| drop(pair.host.ok("delete_vm", &json!([vm]))));
}

#[test]
fn create_stemcell_for_several_hosts_in_shared_pool_is_refused() {
    let Some(pair) = Pair::new() else { return };
    pair.host.reconfigure(|config| {
        config["pools"] = json!({"nfs": {"path": "/nowhere", "shared": true}});
        config["stemcell_pool"] = json!("nfs");
    });
    let create = request("create_stemcell", &json!(["/image", {}]));
    let refused = pair.answer(&json!({"request": create, "image": 1, "everywhere": true}));
    let message = refused["error"]["message"].as_str().unwrap();
    assert!(message.contains("stemcell_pool: pool 'nfs' is shared"), "{message}");
    pair.host.reconfigure(|config| {
        ["pools", "stemcell_pool"]
            .iter()
            .for_each(|key| drop(config.as_object_mut().unwrap().remove(*key)));
    });
}

#[test]
fn create_without_acknowledgement_logs_how_to_undo_it() {
    let Some(pair) = Pair::new() else { return };
    let words =
        pair.serve(&[json!({"call": {"request": request("create_disk", &json!([1, {}]))}})]);
    let answer = words.iter().find_map(|word| word["answer"]["text"].as_str()).unwrap();
    let disk = serde_json::from_str::<Value>(answer).unwrap()["result"].clone();
    let logged = words.last().unwrap()["log"].as_str().unwrap_or_else(|| panic!("{words:?}"));
    assert!(
        logged.contains(&format!("delete_disk '{}' removes the object", disk.as_str().unwrap())),
        "{logged}"
    );
    pair.host.ok("delete_disk", &json!([disk]));
}

#[test]
fn serve_unknown_request_answers_an_error() {
    let Some(pair) = Pair::new() else { return };
    let many: Vec<_> = (0..1001).map(|n| format!("vm-{n}")).collect();
    let words = pair.serve(&[json!({"find": many})]);
    let answer = words.last().unwrap()["answer"]["text"].as_str().unwrap();
    assert!(answer.contains("1001 objects, more than 1000"), "{answer}");
    for question in
        [json!(1), json!({"moon": {}}), json!({"call": {}}), json!({"call": {"request": 7}})]
    {
        let words = pair.serve(std::slice::from_ref(&question));
        assert!(
            words.last().unwrap()["answer"]["text"].as_str().unwrap().contains("CpiError"),
            "{question}: {words:?}"
        );
    }
    let words = pair.serve(&[]);
    assert_eq!(words[0]["greeting"]["program"], "bosh-qemu-cpi");
}

#[test]
fn serve_on_machine_with_transport_is_refused() {
    let Some(pair) = Pair::new() else { return };
    pair.host.reconfigure(|config| config["transport"] = json!({"kind": "unix"}));
    let refused = pair.director.call("has_vm", &json!(["vm-1"]));
    assert!(refused.failure().message.contains("this machine is not a host"), "{refused:?}");
    // Operator commands must not report success either: the VMs are on another machine.
    for words in [
        &["vm", "list"][..],
        &["audit"],
        &["gc"],
        &["pool", "list"],
        &["network", "plan"],
        &["host", "start"],
    ] {
        let output = pair.host.cpi().args(words).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && said.contains("this machine is not a host"),
            "{words:?}: {output:?}"
        );
    }
    pair.host.reconfigure(|config| drop(config.as_object_mut().unwrap().remove("transport")));
}
