//! VMs from create_vm to delete_vm, in every state between them.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use bosh_qemu_cpi::cid::VmCid;
use bosh_qemu_cpi::store::{Phase, VmRecord};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::host::{
    Host, command_line, eventually, json_options, request, text, timeout, vm_cid, wait_for_exit,
};

#[test]
fn create_recreate_and_delete_vm_leaves_nothing() {
    let Some(host) = Host::new() else { return };
    let info = host.ok("info", &json!([]));
    assert_eq!(info["api_version"], 3);
    let stemcell = host.stemcell();
    let vm = host.vm(&stemcell);
    assert_eq!(host.ok("has_vm", &json!([vm])), true);
    assert_eq!(host.ok("set_vm_metadata", &json!([vm, {"name": "bosh/0"}])), Value::Null);
    let disk = host.disk();
    let hint = host.ok("attach_disk", &json!([vm, disk]));
    assert_eq!(hint, json!({"path": format!("/dev/disk/by-id/virtio-{disk}")}));
    assert_eq!(host.ok("set_disk_metadata", &json!([disk, {"owner": "bosh"}])), Value::Null);
    host.wait_for_console(&vm, "\nU", 1);

    assert_eq!(host.ok("delete_vm", &json!([vm])), Value::Null);
    assert_eq!(host.ok("has_vm", &json!([vm])), false);
    let again = host.vm(&stemcell);
    assert_ne!(again, vm);
    assert_eq!(host.ok("attach_disk", &json!([again, disk])), hint);
    assert_eq!(host.ok("get_disks", &json!([again])), json!([disk]));
    host.wait_for_console(&again, "BOOTSECTOR-OK", 1);
    host.ok("detach_disk", &json!([again, disk]));
    host.ok("delete_disk", &json!([disk]));
    assert_eq!(host.ok("has_disk", &json!([disk])), false);
    host.ok("delete_vm", &json!([again]));
    host.ok("delete_stemcell", &json!([stemcell]));
    host.assert_no_leaks();
    for (method, cid) in [
        ("delete_vm", vm.to_string()),
        ("delete_disk", disk.to_string()),
        ("delete_stemcell", stemcell),
    ] {
        assert_eq!(host.ok(method, &json!([cid])), Value::Null, "{method} of a deleted object");
    }
}

#[test]
fn attach_disk_during_hot_swap_moves_it_to_the_new_vm() {
    let Some(host) = Host::new() else { return };
    let stemcell = host.stemcell();
    let old = host.vm(&stemcell);
    let disk = host.disk();
    let hint = host.ok("attach_disk", &json!([old, disk]));
    let snapshot = host.ok("snapshot_disk", &json!([disk, {}]));
    let mut arguments = host.vm_arguments(&stemcell);
    arguments[4] = json!([disk]);
    let new = vm_cid(&host.ok("create_vm", &arguments));
    assert_eq!(host.ok("get_disks", &json!([old])), json!([disk]), "a locality hint moves no disk");
    host.ok("detach_disk", &json!([old, disk]));
    host.wait_for_console(&old, "\nD", 1);
    assert_eq!(host.ok("attach_disk", &json!([new, disk])), hint);
    host.ok("delete_vm", &json!([old]));
    host.ok("delete_snapshot", &json!([snapshot]));
    assert!(host.qemu(&new).is_some());
    // The stemcell can be deleted while a VM uses it, and the VM can be rebooted.
    host.ok("delete_stemcell", &json!([stemcell]));
    host.wait_for_console(&new, "BOOTSECTOR-OK", 1);
    host.ok("reboot_vm", &json!([new]));
    host.wait_for_console(&new, "BOOTSECTOR-OK", 2);
    assert_eq!(host.ok("get_disks", &json!([new])), json!([disk]));
}

/// Content of the file `path` on the config drive.
fn on_config_drive(image: &Path, path: &str) -> String {
    let drive = fatfs::FileSystem::new(
        fs::File::options().read(true).write(true).open(image).unwrap(),
        fatfs::FsOptions::new(),
    );
    let drive = drive.unwrap();
    assert_eq!(drive.volume_label(), "CONFIG-2");
    let mut found = String::new();
    drive.root_dir().open_file(path).unwrap().read_to_string(&mut found).unwrap();
    found
}

#[test]
fn create_vm_writes_agent_settings_byte_for_byte() {
    let Some(host) =
        Host::with(json!({"agent": {"mbus": "nats://10.9.0.1:4222", "ntp": ["t1", "t2"]}}))
    else {
        return;
    };
    let stemcell = host.stemcell();
    // Text that the CPI's serializer would not produce.
    let env = |size: usize| {
        let certificate = "-----BEGIN CERTIFICATE-----\\nZHVt\\/".repeat(size / 36);
        let bosh =
            format!(r#"{{"password":"*","x":null,"é":"\u00e9\u2028","ca":"{certificate}"}}"#);
        format!(r#"{{ "z":1.50,"bosh" :{bosh},"a":1e3}}"#)
    };
    let networks = concat!(
        r#"{"zeta":{"type":"manual","ip":"10.9.0.7","prefix":"32","#,
        r#""netmask":"255.255.255.0","cloud_properties":{},"default":["dns","gateway"],"#,
        r#""dns":["8.8.8.8"],"gateway":"10.9.0.1","unknown":[1.0]},"#,
        r#""alpha":{"type":"dynamic","cloud_properties":{"bridge":"br0"},"#,
        r#""dns":["1.1.1.1"]}}"#,
    );
    host.bridge("br0");
    for env in [env(6 << 10), env(3 << 20)] {
        let arguments = format!(
            r#"["agent-7","{stemcell}",{{"ram":64,"ephemeral_disk":16}},{networks},[],{env}]"#
        );
        let request = request("create_vm", &Value::Null)
            .replace(r#""arguments":null"#, &format!(r#""arguments":{arguments}"#));
        let answer = host.ask(&request);
        let vm = vm_cid(answer.result());
        let image = host.paths(&vm).config_drive();
        assert_eq!(image.metadata().unwrap().permissions().mode() & 0o7777, 0o600);
        assert_eq!(on_config_drive(&image, "ec2/latest/meta-data.json"), "{}");
        let written = on_config_drive(&image, "ec2/latest/user-data");
        assert!(written.contains(&format!(r#""env":{env}"#)), "env was rewritten");
        let settings: Value = serde_json::from_str(&written).unwrap();
        assert_eq!(settings["agent_id"], "agent-7");
        assert_eq!(settings["vm"], json!({"name": vm, "id": vm}));
        assert_eq!(
            (&settings["mbus"], &settings["ntp"]),
            (&"nats://10.9.0.1:4222".into(), &json!(["t1", "t2"]))
        );
        let record = host.record(&vm);
        let serial = &record.ephemeral.as_ref().unwrap().serial;
        assert_eq!(
            settings["disks"]["ephemeral"]["path"],
            format!("/dev/disk/by-id/virtio-{serial}")
        );
        assert_eq!(settings["disks"]["persistent"], json!({}));

        // The networks are unchanged and in order, with the MACs of the NICs, in settings and
        // answer.
        let mut wanted: Value = serde_json::from_str(networks).unwrap();
        for nic in &record.nics {
            wanted[&nic.network]["mac"] = nic.mac.to_string().into();
            assert_eq!(nic.mac.to_string(), nic.mac.to_string().to_lowercase());
        }
        assert_eq!((&settings["networks"], &answer.result()[1]), (&wanted, &wanted));
        for text in [&written, &answer.stdout] {
            assert!(
                text.find(r#""zeta":{"#).unwrap() < text.find(r#""alpha":{"#).unwrap(),
                "order is lost"
            );
        }
        host.ok("delete_vm", &json!([vm]));
    }
}

#[test]
fn create_vm_with_several_networks_orders_nics_by_manifest() {
    let Some(host) = Host::new() else { return };
    for bridge in ["br0", "br1"] {
        host.bridge(bridge);
    }
    let mut arguments = host.vm_arguments(&host.stemcell()).to_string();
    let marker = arguments.find(r#"{"net":"#).unwrap();
    let end = arguments[marker..].find("}},").unwrap() + marker + 2;
    arguments.replace_range(
        marker..end,
        r#"{"zeta":{"type":"dynamic","cloud_properties":{"bridge":"br1"}},
            "vip":{"type":"vip","ip":"198.51.100.7","cloud_properties":{}},
            "nat":{"type":"manual","ip":"10.9.0.7","netmask":"255.255.255.0","gateway":"10.9.0.1"},
            "alpha":{"type":"dynamic","cloud_properties":{"bridge":"br0"}}}"#,
    );
    let request = request("create_vm", &Value::Null)
        .replace(r#""arguments":null"#, &format!(r#""arguments":{arguments}"#));
    let answer = host.ask(&request);
    let networks = &answer.result()[1];
    let vm = vm_cid(answer.result());
    let words = command_line(&host.qemu(&vm).unwrap());
    let nics: Vec<_> = json_options(&words, "-device")
        .into_iter()
        .filter(|d| d["driver"] == "virtio-net-pci")
        .collect();
    let addresses: Vec<_> = nics
        .iter()
        .map(|card| u32::from_str_radix(&text(&card["addr"])[2..], 16).unwrap())
        .collect();
    assert!(addresses.is_sorted(), "{addresses:?}");
    let macs: Vec<_> = nics.iter().map(|nic| &nic["mac"]).collect();
    assert_eq!(macs, ["zeta", "nat", "alpha"].map(|name| &networks[name]["mac"]));
    assert_eq!(networks["vip"].get("mac"), None);
    let record = host.record(&vm);
    let controllers = record
        .nics
        .iter()
        .map(|nic| text(&host.namespace().link(nic.tap().unwrap().0.as_str()).unwrap()["master"]));
    assert_eq!(controllers.collect::<Vec<_>>(), ["br1", "bosh-nat0", "br0"]);
    host.ok("delete_vm", &json!([vm]));
    assert!(
        host.namespace().link("br0").is_some() && host.namespace().link("br1").is_some(),
        "bridges of the operator stay"
    );
}

/// Brings a VM into a state. It must exist, and reboot_vm and delete_vm must succeed.
fn assert_reboot_and_delete(host: &Host, bring: impl Fn(&VmCid)) {
    let vm = host.booted_vm();
    let before = host.record(&vm);
    bring(&vm);
    assert_eq!(host.ok("has_vm", &json!([vm])), true);
    host.ok("reboot_vm", &json!([vm]));
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 2);
    let after = host.record(&vm);
    assert_eq!(
        (&after.nics, after.uid, &after.machine),
        (&before.nics, before.uid, &before.machine)
    );
    assert!(host.supervisor(&vm).is_some());
    bring(&vm);
    host.ok("delete_vm", &json!([vm]));
    assert_eq!(host.ok("has_vm", &json!([vm])), false);
    assert_eq!(host.call("reboot_vm", &json!([vm])).failure().kind, "VMNotFound");
    host.delete_everything();
    host.assert_no_leaks();
}

#[test]
fn reboot_and_delete_running_vm_succeed() {
    let Some(host) = Host::new() else { return };
    assert_reboot_and_delete(&host, |_| {});
}

#[test]
fn reboot_and_delete_powered_off_vm_succeed() {
    let Some(host) = Host::new() else { return };
    assert_reboot_and_delete(&host, |vm| host.power_off(vm));
}

#[test]
fn reboot_and_delete_crashed_vm_succeed() {
    let Some(host) = Host::with(json!({"restart": "never"})) else { return };
    assert_reboot_and_delete(&host, |vm| {
        let supervisor = host.supervisor(vm).unwrap();
        host.kill_qemu(vm);
        wait_for_exit(&supervisor);
        assert!(host.qemu(vm).is_none());
    });
}

#[test]
fn reboot_and_delete_restarting_vm_succeed() {
    let Some(host) = Host::new() else { return };
    assert_reboot_and_delete(&host, |vm| {
        let exits = fs::read_to_string(host.paths(vm).events())
            .unwrap()
            .matches("\"event\":\"restarting\"")
            .count();
        host.kill_qemu(vm);
        host.wait_for_event(vm, "restarting", exits + 1);
    });
}

#[test]
fn reboot_and_delete_hung_vm_succeed() {
    let Some(host) = Host::new() else { return };
    assert_reboot_and_delete(&host, |vm| host.qemu(vm).unwrap().signal(Signal::SIGSTOP).unwrap());
}

#[test]
fn reboot_and_delete_paused_vm_succeed() {
    let Some(host) = Host::with(json!({"deadlines": {"reboot_vm": 8}})) else { return };
    assert_reboot_and_delete(&host, |vm| {
        host.qmp(vm, "stop", &json!({})).unwrap();
    });
}

#[test]
fn delete_vm_after_killed_create_vm_leaves_nothing() {
    let Some(host) = Host::new() else { return };
    let stemcell = host.stemcell();
    let began = Instant::now();
    let whole = host.vm(&stemcell);
    let duration = began.elapsed();
    host.ok("delete_vm", &json!([whole]));
    for step in 1..=12 {
        let mut call = host.start("create_vm", &host.vm_arguments(&stemcell));
        std::thread::sleep(duration * step / 12);
        call.kill().unwrap();
        call.wait().unwrap();
        for vm in host.store().list::<VmRecord>().unwrap() {
            let phase = host.store().read::<VmRecord>(&vm).unwrap().map(|record| record.phase);
            let is_ready = phase == Some(Phase::Ready);
            assert_eq!(host.ok("has_vm", &json!([vm])), is_ready, "in phase {phase:?}");
            host.ok("delete_vm", &json!([vm]));
            assert_eq!(host.ok("has_vm", &json!([vm])), false);
        }
    }
    host.delete_everything();
    host.assert_no_leaks();
}

#[test]
fn delete_vm_with_hung_launch_succeeds() {
    let Some(host) = Host::new() else { return };
    let stemcell = host.stemcell();
    host.replace_qemu("exec sleep 1000");
    let mut call = host.start("create_vm", &host.vm_arguments(&stemcell));
    let vm = eventually("a QEMU", || {
        let vms = host.store().list::<VmRecord>().unwrap();
        vms.into_iter().find(|vm| host.qemu(vm).is_some())
    });
    call.kill().unwrap();
    call.wait().unwrap();
    assert_eq!(host.record(&vm).phase, Phase::Creating);
    assert_eq!(host.ok("has_vm", &json!([vm])), false);
    assert_eq!(host.call("reboot_vm", &json!([vm])).failure().kind, "VMNotFound");
    host.ok("delete_vm", &json!([vm]));
    host.delete_everything();
    host.assert_no_leaks();
}

#[test]
fn create_vm_with_hung_launch_fails_at_its_deadline() {
    let Some(host) = Host::with(json!({"deadlines": {"create_vm": 2}})) else { return };
    let stemcell = host.stemcell();
    host.replace_qemu("exec sleep 1000");
    let began = Instant::now();
    let answer = host.call("create_vm", &host.vm_arguments(&stemcell));
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    assert_eq!(answer.failure().kind, "VMCreationFailed", "{answer:?}");
    assert!(answer.failure().ok_to_retry, "a busy host may do better");
    host.ok("delete_stemcell", &json!([stemcell]));
    host.assert_no_leaks();
}

#[test]
fn create_vm_with_invalid_arguments_names_them_and_leaves_nothing() {
    let Some(host) = Host::new() else { return };
    let stemcell = host.stemcell();
    let fails = |pointer: &str, value: Value, kind: &str, says: &str| {
        let mut arguments = host.vm_arguments(&stemcell);
        *arguments.pointer_mut(pointer).unwrap() = value;
        let answer = host.call("create_vm", &arguments);
        assert_eq!(answer.failure().kind, kind, "{answer:?}");
        assert!(answer.failure().message.contains(says), "{says:?} in {answer:?}");
        let left: Vec<_> =
            host.leaks_after_exits().into_iter().filter(|left| !left.contains(&stemcell)).collect();
        assert!(left.is_empty(), "{says:?} left behind: {left:#?}");
    };
    fails(
        "/1",
        json!("stemcell-aaaaaaaaaaaaaaa"),
        "CloudError",
        "there is no stemcell 'stemcell-aaaaaaaaaaaaaaa'",
    );
    fails(
        "/2",
        json!({"rams": 64}),
        "CpiError",
        "cloud_properties.rams: unknown key; did you mean 'ram'?",
    );
    fails("/2", json!({"machine": "q53"}), "CpiError", "there is no machine template 'q53'");
    fails("/3/net/cloud_properties", json!({"name": "dmz"}), "CpiError", "no network 'dmz'");
    fails(
        "/3/net/cloud_properties",
        json!({"bridge": "br7"}),
        "NetworkNotFound",
        "bridge 'br7' does not exist",
    );
    fails("/3/net/gateway", json!("10.8.0.1"), "CpiError", "10.8.0.0");
    // With this CPU model QEMU exits at once, so its stderr must be in the message.
    fails(
        "/2",
        json!({"ram": 64, "cpu_model": "nonsense"}),
        "VMCreationFailed",
        "unable to find CPU model 'nonsense'",
    );
    host.replace_qemu("echo first words; echo 'last words' >&2; exit 3");
    fails("/2", json!({"ram": 64}), "VMCreationFailed", "first words; last words");
    host.reconfigure(|config| config["qemu"]["binary"] = json!("/nonexistent/qemu"));
    fails("/2", json!({"ram": 64}), "VMCreationFailed", "/nonexistent/qemu");
    host.reconfigure(|config| {
        config["qemu"].as_object_mut().unwrap().remove("binary");
    });
    let vm = host.vm(&stemcell);
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 1);
}

#[test]
fn create_in_unwritable_state_directory_names_it() {
    let Some(host) = Host::new() else { return };
    let stemcell = host.stemcell();
    host.reconfigure(|config| config["state_dir"] = json!("/proc/state"));
    for (method, arguments) in [
        ("create_stemcell", json!([host.path("image"), {}])),
        ("create_vm", host.vm_arguments(&stemcell)),
        ("create_disk", json!([8, {}, null])),
    ] {
        let answer = host.call(method, &arguments);
        let shown = &answer.failure().message;
        assert!(
            shown.contains("/proc/state") || shown.contains("there is no stemcell"),
            "{method}: {shown}"
        );
    }
    host.reconfigure(|config| config["state_dir"] = json!(host.path("state")));
}

#[test]
fn create_on_full_filesystem_fails_and_delete_succeeds() {
    let Some(host) = Host::on_tmpfs(8) else { return };
    let stemcell = host.stemcell();
    let vm = host.vm(&stemcell);
    let disk = host.disk();
    let filler = host.path("state/filler");
    let written = fs::write(&filler, vec![1; 16 << 20]).unwrap_err();
    assert_eq!(written.kind(), std::io::ErrorKind::StorageFull);
    let before = host.leaks();
    for (method, arguments) in
        [("create_vm", host.vm_arguments(&stemcell)), ("create_disk", json!([8, {}, null]))]
    {
        let answer = host.call(method, &arguments);
        assert_eq!(answer.failure().kind, "NoDiskSpace", "{answer:?}");
        assert_eq!(host.leaks(), before, "{method}");
    }
    // Deletes work, because they free space.
    host.ok("delete_vm", &json!([vm]));
    host.ok("delete_disk", &json!([disk]));
    host.ok("delete_stemcell", &json!([stemcell]));
    fs::remove_file(filler).unwrap();
    host.assert_no_leaks();
}

#[test]
fn create_vm_detaches_its_processes_from_the_caller() {
    let Some(host) = Host::new() else { return };
    let stemcell = host.stemcell();
    let mut call = host.start("create_vm", &host.vm_arguments(&stemcell));
    let (sender, ends) = std::sync::mpsc::channel();
    let (mut stdout, mut stderr) = (call.stdout.take().unwrap(), call.stderr.take().unwrap());
    let log = sender.clone();
    std::thread::spawn(move || sender.send(std::io::read_to_string(&mut stdout)));
    std::thread::spawn(move || log.send(std::io::read_to_string(&mut stderr)));
    let deadline = Instant::now() + timeout();
    let mut outputs = Vec::new();
    for _ in 0..2 {
        outputs.push(
            ends.recv_timeout(deadline.saturating_duration_since(Instant::now()))
                .expect("an end")
                .unwrap(),
        );
    }
    assert_eq!(call.wait().unwrap().code(), Some(0));
    let answer: Value =
        outputs.iter().find_map(|text| serde_json::from_str(text).ok()).expect("an answer");
    let vm = vm_cid(&answer["result"]);
    let (qemu, supervisor) =
        (host.qemu(&vm).expect("a running VM"), host.supervisor(&vm).expect("a supervisor"));
    let session = |pid: i32| nix::unistd::getsid(Some(nix::unistd::Pid::from_raw(pid))).unwrap();
    assert_ne!(session(supervisor.pid()), session(0));
    assert_ne!(session(qemu.pid()), session(0));
    let uid = fs::metadata(format!("/proc/{}", qemu.pid())).unwrap().uid();
    assert_eq!(uid, host.record(&vm).uid);
}

#[test]
fn create_vm_after_killed_create_vm_undoes_it() {
    let Some(host) = Host::new() else { return };
    let stemcell = host.stemcell();
    host.replace_qemu("exec sleep 1000");
    let mut call = host.start("create_vm", &host.vm_arguments(&stemcell));
    let killed = eventually("a record", || host.store().list::<VmRecord>().unwrap().pop());
    let qemu = eventually("a launch", || host.qemu(&killed));
    let supervisor = host.supervisor(&killed).expect("a supervisor");
    call.kill().unwrap();
    call.wait().unwrap();
    qemu.signal(Signal::SIGKILL).unwrap();
    wait_for_exit(&supervisor);
    assert_eq!(host.ok("has_vm", &json!([killed])), false, "the create was not acknowledged");
    assert!(host.paths(&killed).dir.exists());

    host.reconfigure(|config| config["qemu"]["binary"] = json!("/usr/bin/qemu-system-x86_64"));
    let vm = host.vm(&stemcell);
    assert_eq!(host.store().list::<VmRecord>().unwrap(), [vm]);
    assert!(!host.paths(&killed).dir.exists() && !host.paths(&killed).run.exists());
}
