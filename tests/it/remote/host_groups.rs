//! A group of hosts behind one Director.

use std::io::{BufRead, BufReader, Read};
use std::time::{Duration, Instant};

use bosh_qemu_cpi::cid::{Cid, DiskCid, VmCid, is_from_host};
use bosh_qemu_cpi::store::{DiskRecord, Rank, StemcellRecord, Store, VmRecord};
use bosh_qemu_cpi::sys::pidfd::Process;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::answer::Answer;
use crate::support::host::{Host, eventually, text, vm_cid};
use crate::support::remote::{Director, Sshd};

/// A group of two hosts, `kvm-0` and `kvm-1`.
pub struct Group {
    sshds: [Sshd; 2],
    pub director: Director,
    pub hosts: [Host; 2],
}

impl Group {
    fn new() -> Option<Self> {
        Self::with(&json!({}))
    }

    /// A group of hosts with this configuration.
    pub fn with(config: &Value) -> Option<Self> {
        let (hosts, director) =
            ([Host::with(config.clone())?, Host::with(config.clone())?], Director::new()?);
        let sshds =
            [Sshd::start(&director, &hosts[0], 0, "")?, Sshd::start(&director, &hosts[1], 1, "")?];
        let group = Self { sshds, director, hosts };
        group.configure(|_| {});
        Some(group)
    }

    /// Writes the caller's configuration after `change`.
    pub fn configure(&self, change: impl FnOnce(&mut Value)) {
        let host =
            |n: usize| json!({"name": format!("kvm-{n}"), "transport": self.sshds[n].transport()});
        let mut config = json!({"hosts": [host(0), host(1)]});
        change(&mut config);
        self.director.configure(&config);
    }

    /// An image on the caller's machine.
    fn image(&self) -> std::path::PathBuf {
        let image = self.director.path("image");
        let mut disk = vec![0; 1 << 20];
        disk[..crate::support::host::GUEST.len()].copy_from_slice(crate::support::host::GUEST);
        std::fs::write(&image, disk).unwrap();
        image
    }

    pub fn stemcell(&self) -> String {
        text(&self.director.ok("create_stemcell", &json!([self.image(), {}])))
    }

    /// Creates a VM with these disks and `env`, and returns it with the index of its host.
    pub fn vm(&self, stemcell: &str, disks: &[DiskCid], env: &Value) -> (VmCid, usize) {
        let mut arguments = self.hosts[0].vm_arguments(stemcell);
        (arguments[4], arguments[5]) = (json!(disks), env.clone());
        let vm = vm_cid(&self.director.ok("create_vm", &arguments));
        self.hosts.iter().for_each(|host| host.track_vms(&vm.to_string()));
        let at = self.vms().iter().position(|vms| vms.contains(&vm)).unwrap();
        (vm, at)
    }

    fn vms(&self) -> [Vec<VmCid>; 2] {
        [0, 1].map(|n| self.hosts[n].store().list::<VmRecord>().unwrap())
    }

    pub fn disk(&self, near: Option<&VmCid>) -> (DiskCid, usize) {
        let disk: DiskCid =
            text(&self.director.ok("create_disk", &json!([8, {}, near]))).parse().unwrap();
        let at = [0, 1].into_iter().position(|n: usize| {
            self.hosts[n].store().list::<DiskRecord>().unwrap().contains(&disk)
        });
        (disk, at.unwrap())
    }

    pub fn delete(&self, vms: &[&VmCid], disks: &[&DiskCid], stemcell: &str) {
        vms.iter().for_each(|vm| drop(self.director.ok("delete_vm", &json!([vm]))));
        disks.iter().for_each(|disk| drop(self.director.ok("delete_disk", &json!([disk]))));
        self.director.ok("delete_stemcell", &json!([stemcell]));
    }
}

fn env(group: &str) -> Value {
    json!({"bosh": {"group": group}})
}

#[test]
fn create_stemcell_replicates_it_to_every_host() {
    let Some(group) = Group::new() else { return };
    let stemcell = group.stemcell();
    for host in &group.hosts {
        let there: Vec<_> = host.store().list::<StemcellRecord>().unwrap();
        assert!(there.len() == 1 && there[0].to_string() == stemcell, "{there:?}");
    }
    group.director.ok("delete_stemcell", &json!([stemcell]));
    group.director.ok("delete_stemcell", &json!([stemcell]));
    // If one host refuses the stemcell, no host keeps it.
    group.hosts[1].reconfigure(|config| config["stemcell_pool"] = json!("nowhere"));
    let refused = group.director.call("create_stemcell", &json!([group.image(), {}]));
    assert!(refused.failure().message.contains("stemcell_pool"), "{refused:?}");
    for host in &group.hosts {
        host.reconfigure(|config| drop(config.as_object_mut().unwrap().remove("stemcell_pool")));
        assert_eq!(host.store().list::<StemcellRecord>().unwrap(), []);
    }
}

#[test]
fn create_vms_of_one_group_spreads_them() {
    let Some(group) = Group::new() else { return };
    let stemcell = group.stemcell();
    let (one, at_one) = group.vm(&stemcell, &[], &env("d-dep-db"));
    let (two, at_two) = group.vm(&stemcell, &[], &env("d-dep-db"));
    assert_ne!(at_one, at_two);
    assert!(
        one.is_from_host(&format!("kvm-{at_one}")) && two.is_from_host(&format!("kvm-{at_two}"))
    );
    for (vm, at) in [(&one, at_one), (&two, at_two)] {
        assert_eq!(group.director.ok("has_vm", &json!([vm])), true);
        group.director.ok("set_vm_metadata", &json!([vm, {"index": "0"}]));
        assert_eq!(group.hosts[at].record(vm).metadata["index"], "0");
        // The disk is created on the host of its VM.
        let (disk, disk_at) = group.disk(Some(vm));
        assert_eq!(disk_at, at);
        let hint = group.director.ok("attach_disk", &json!([vm, disk]));
        assert!(hint["path"].as_str().unwrap().ends_with(&disk.to_string()));
        assert_eq!(group.director.ok("get_disks", &json!([vm])), json!([disk]));
        let snapshot = group.director.ok("snapshot_disk", &json!([disk, {}]));
        assert!(is_from_host(snapshot.as_str().unwrap(), &format!("kvm-{at}")));
        group.director.ok("delete_snapshot", &json!([snapshot]));
        group.director.ok("detach_disk", &json!([vm, disk]));
        group.director.ok("resize_disk", &json!([disk, 16]));
        group.director.ok("delete_disk", &json!([disk]));
        assert_eq!(group.director.ok("has_disk", &json!([disk])), false);
    }
    let resources = json!([{"ram": 512, "cpu": 1, "ephemeral_disk_size": 1024}]);
    assert_eq!(group.director.ok("calculate_vm_cloud_properties", &resources)["ram"], 512);
    assert_eq!(
        group.director.call("create_network", &json!([{"type": "manual"}])).failure().kind,
        "NotSupported"
    );
    group.delete(&[&one, &two], &[], &stemcell);
    assert_eq!(group.director.ok("has_vm", &json!([one])), false);
    assert_eq!(group.director.call("reboot_vm", &json!([one])).failure().kind, "VMNotFound");
}

#[test]
fn create_vm_with_existing_disk_uses_its_host() {
    let Some(group) = Group::new() else { return };
    let stemcell = group.stemcell();
    let (old, at) = group.vm(&stemcell, &[], &env("d-dep-db"));
    let (disk, _) = group.disk(Some(&old));
    group.director.ok("attach_disk", &json!([old, disk]));
    group.director.ok("delete_vm", &json!([old]));
    // That host has more VMs of the group and is draining, but only it reaches the disk.
    let (neighbour, _) = group.vm(&stemcell, std::slice::from_ref(&disk), &env("d-dep-db"));
    group.configure(|config| config["hosts"][at]["draining"] = json!(true));
    let (new, new_at) = group.vm(&stemcell, std::slice::from_ref(&disk), &env("d-dep-db"));
    assert_eq!(new_at, at);
    group.director.ok("attach_disk", &json!([new, disk]));
    // A VM without the disk is placed on the other host, and the disk cannot follow.
    let (stray, stray_at) = group.vm(&stemcell, &[], &env("d-dep-web"));
    assert_ne!(stray_at, at);
    group.director.ok("detach_disk", &json!([new, disk]));
    let refused = group.director.call("attach_disk", &json!([stray, disk]));
    let message = &refused.failure().message;
    let apart =
        format!("is on host 'kvm-{at}', the VM on 'kvm-{stray_at}', which has no shared pool");
    assert!(message.contains(&apart) && message.contains("recreate the VM"), "{message}");
    group.delete(&[&new, &neighbour, &stray], &[&disk], &stemcell);
}

#[test]
fn call_about_object_of_unreachable_host_is_refused() {
    let Some(group) = Group::new() else { return };
    let stemcell = group.stemcell();
    let (vm, at) = group.vm(&stemcell, &[], &env("g"));
    let (disk, _) = group.disk(Some(&vm));
    let cut = |state: &str| {
        let name = format!("kvm-{at}");
        group.configure(|config| {
            if state == "down" {
                config["hosts"][at]["transport"]["port"] = json!(2);
            }
        });
        name
    };
    let name = cut("down");
    for (method, arguments) in [
        ("has_vm", json!([vm])),
        ("has_disk", json!([disk])),
        ("delete_vm", json!([vm])),
        ("delete_disk", json!([disk])),
        // This cid bears no trace of a host.
        ("has_vm", json!(["vm-aaaaaaaaaaaaaaa"])),
        ("delete_stemcell", json!([stemcell])),
    ] {
        let refused = group.director.call(method, &arguments);
        let message = &refused.failure().message;
        assert!(
            message.contains(&format!("host '{name}'")) && message.contains("refused"),
            "{method}: {message}"
        );
    }
    // New VMs are placed on the other host, except a VM whose disk is on the silent one.
    let (other, other_at) = group.vm(&stemcell, &[], &env("g"));
    assert_ne!(other_at, at);
    let mut arguments = group.hosts[0].vm_arguments(&stemcell);
    arguments[4] = json!([disk]);
    let refused = group.director.call("create_vm", &arguments);
    assert_eq!(refused.failure().kind, "VMCreationFailed");
    assert!(refused.failure().message.contains(&format!("'{name}' does not")), "{refused:?}");
    cut("up");
    group.delete(&[&vm, &other], &[&disk], &stemcell);
}

#[test]
fn create_vms_concurrently_spreads_them() {
    let Some(group) = Group::new() else { return };
    let stemcell = group.stemcell();
    let start = |_| {
        let mut arguments = group.hosts[0].vm_arguments(&stemcell);
        arguments[5] = env("d-dep-db");
        group.director.start("create_vm", &arguments)
    };
    // All calls see the same counts, and one host has more memory.
    group.hosts[0].reconfigure(|config| config["limits"] = json!({"memory_reserve_mib": 1000}));
    let stores = [0, 1].map(|n| group.hosts[n].store());
    let until = Instant::now() + Duration::from_secs(60);
    let held = stores.each_ref().map(|store| store.short_lock(Rank::Space, "all", until).unwrap());
    let calls: Vec<_> = (0..6).map(start).collect();
    let begun = |store: &Store| std::fs::read_dir(store.pending_dir()).unwrap().count();
    eventually("all have chosen", || (stores.iter().map(begun).sum::<usize>() == 6).then_some(()));
    drop(held);
    let answers = calls.into_iter().map(|call| Answer::of(&call.wait_with_output().unwrap()));
    let created: Vec<_> = answers.map(|answer| vm_cid(answer.result())).collect();
    created
        .iter()
        .for_each(|vm| group.hosts.iter().for_each(|host| host.track_vms(&vm.to_string())));
    assert_eq!(group.vms().map(|vms| vms.len()), [3, 3]);
    group.delete(&created.iter().collect::<Vec<_>>(), &[], &stemcell);
}

#[test]
fn create_vm_with_one_hung_host_uses_another() {
    let Some(group) = Group::new() else { return };
    let stemcell = group.stemcell();
    // The host greets and sends nothing more.
    group.director.close_connections();
    group.sshds[0].authorize(&format!(
        "echo '{}'; sleep 600",
        super::stemcell_upload::GREETING.replace('"', "\\\"")
    ));
    group.configure(|config| config["deadlines"] = json!({"create_vm": 60, "create_disk": 5}));
    let began = Instant::now();
    let (vm, at) = group.vm(&stemcell, &[], &env("g"));
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
    let (disk, disk_at) = group.disk(None);
    assert_eq!((at, disk_at), (1, 1));
    group.director.close_connections();
    group.sshds[0].authorize(&group.hosts[0].serve_command());
    group.configure(|_| {});
    group.delete(&[&vm], &[&disk], &stemcell);
}

#[test]
fn create_stemcell_that_fails_on_one_host_is_undone_on_the_others() {
    let Some(group) = Group::new() else { return };
    group.director.close_connections();
    let (script, go) = (group.director.path("script"), group.director.path("go"));
    let error = json!({"type": "Bosh::Clouds::CloudError", "message": "no", "ok_to_retry": false});
    let response = json!({"result": null, "error": error, "log": ""}).to_string();
    let refusal = json!({"answer": {"text": response}});
    let greeting = r#"{"greeting":{"program":"bosh-qemu-cpi","version":"0.1.0","protocol":1}}"#;
    let wait = format!("until test -e {}; do sleep 0.1; done", go.display());
    std::fs::write(
        &script,
        format!("echo '{greeting}'\nread question\n{wait}\ncat <<'E'\n{refusal}\nE\n"),
    )
    .unwrap();
    group.sshds[1].authorize(&format!("sh {}", script.display()));
    let mut call = group.director.start("create_stemcell", &json!([group.image(), {}]));
    let mut log = BufReader::new(call.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains(": done") {
        line.clear();
        assert!(log.read_line(&mut line).unwrap() > 0, "it ended");
    }
    // The host waits 30 s for the report about the delivery; another host may take longer. It waits
    // if it sleeps for 200 ms and is not scheduled meanwhile.
    let config = group.hosts[0].path("cpi.json").display().to_string();
    let mut asleep: Option<(String, Instant)> = None;
    let waits = || {
        let mut processes = std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
        let process = processes.find(|process| {
            let line = std::fs::read(process.join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).into_owned();
            line.contains("host\0serve") && line.contains(&config)
        })?;
        let status = std::fs::read_to_string(process.join("status")).ok()?;
        let since = match asleep.take() {
            Some((seen, since)) if seen == status && status.contains("(sleeping)") => since,
            _ => Instant::now(),
        };
        asleep = Some((status, since));
        let pid = process.file_name().unwrap().to_str().unwrap().parse().unwrap();
        (since.elapsed() >= Duration::from_millis(200)).then_some(pid)
    };
    Process::open(eventually("one host has it", waits)).unwrap().signal(Signal::SIGKILL).unwrap();
    std::fs::write(go, "").unwrap();
    std::thread::spawn(move || log.read_to_end(&mut Vec::new()));
    let answer = Answer::of(&call.wait_with_output().unwrap());
    assert_eq!(answer.failure().message, "no");
    assert_eq!(group.hosts[0].store().list::<StemcellRecord>().unwrap(), []);
}

#[test]
fn create_vm_replaces_an_unacknowledged_vm_on_its_host() {
    let Some(group) = Group::new() else { return };
    let stemcell = group.stemcell();
    let (vm, at) = group.vm(&stemcell, &[], &env("g"));
    // Its create_vm ended before the caller received the answer.
    std::fs::write(group.hosts[at].paths(&vm).dir.join("untold"), "").unwrap();
    let mut arguments = group.hosts[0].vm_arguments(&stemcell);
    let nic = group.hosts[at].record(&vm).nics.remove(0);
    arguments[3]["net"]["ip"] = json!(nic.rules.unwrap().addresses[0].ip());
    arguments[5] = env("g");
    let new = vm_cid(&group.director.ok("create_vm", &arguments));
    group.hosts.iter().for_each(|host| host.track_vms(&new.to_string()));
    // The other host has fewer VMs of the group.
    let mut expected = [vec![], vec![]];
    expected[at] = vec![new.clone()];
    assert_eq!(group.vms(), expected);
    group.delete(&[&new], &[], &stemcell);
}

#[test]
fn create_vm_with_one_full_host_uses_another() {
    let Some(group) = Group::new() else { return };
    let stemcell = group.stemcell();
    // The host reports its memory and then lacks it, as after concurrent creates.
    group.hosts[0]
        .reconfigure(|config| config["limits"] = json!({"memory_reserve_mib": 1_000_000}));
    for n in 0..2 {
        let (vm, at) = group.vm(&stemcell, &[], &env("g"));
        assert_eq!(at, 1, "VM {n}");
        group.director.ok("delete_vm", &json!([vm]));
    }
    group.hosts[1]
        .reconfigure(|config| config["limits"] = json!({"memory_reserve_mib": 1_000_000}));
    let refused = group.director.call("create_vm", &group.hosts[0].vm_arguments(&stemcell));
    let message = &refused.failure().message;
    assert!(
        message.contains("kvm-0: it has memory") && message.contains("kvm-1: it has memory"),
        "{message}"
    );
    group.delete(&[], &[], &stemcell);
}
