//! Findings about networks, about remnants of VMs in the kernel, and with a second state directory
//! on the host.

use std::fs;
use std::path::Path;

use bosh_qemu_cpi::cid::{Cid, VmCid};
use bosh_qemu_cpi::host::cgroup::Cgroup;
use bosh_qemu_cpi::store::Phase;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::host::{Host, vm_cid, wait_for_exit};
use crate::support::{nftables, skip};

const GUARD: &str = "bosh-qemu-guard";

/// Whether the command reported no open finding, and kind, subject, reason and cure of each
/// finding.
fn findings(host: &Host, command: &str) -> (bool, Vec<[String; 4]>) {
    let (passed, printed) = host.command(&[command, "--json"]);
    let finding =
        |f: &Value| ["kind", "what", "why", "cure"].map(|key| f[key].to_string().replace('"', ""));
    (passed, printed["findings"].as_array().unwrap().iter().map(finding).collect())
}

/// Asserts that there is one finding, that `audit` changes nothing and that `gc` repairs it.
/// Returns its reason.
fn assert_repaired(host: &Host, kind: &str, what: &impl ToString) -> String {
    let (clean, found) = findings(host, "audit");
    assert!(!clean && found.len() == 1, "{found:#?}");
    let [its_kind, its_what, why, cure] = &found[0];
    assert_eq!([its_kind.as_str(), its_what, cure], [kind, &what.to_string(), "gc"], "{why}");
    assert_eq!(findings(host, "audit").1, found, "audit changes nothing");
    let (clean, repaired) = findings(host, "gc");
    assert!(clean && repaired.len() == 1, "{repaired:#?}");
    assert_eq!(findings(host, "audit"), (true, vec![]));
    why.clone()
}

/// A host with a security group `admin`.
fn host_with_a_group() -> Option<Host> {
    let rules = json!([{"protocol": "tcp", "ports": 22, "source": "192.0.2.0/24"}]);
    Host::with(json!({"security_groups": {"admin": rules}}))
}

/// A VM in the group `admin` with a forwarded port of the host.
fn forwarded_vm(host: &Host, stemcell: &str, port: u16) -> VmCid {
    let mut arguments = host.vm_arguments(stemcell);
    arguments[2]["ports"] = json!([{"host": port, "guest": 22}]);
    arguments[2]["security_groups"] = json!(["admin"]);
    vm_cid(&host.ok("create_vm", &arguments))
}

fn tap(host: &Host, vm: &VmCid) -> String {
    host.record(vm).nics[0].tap().unwrap().0.to_string()
}

/// Moves the directory of a VM to `aside`, as if an operator had removed it.
fn lose_directory(host: &Host, vm: &VmCid) {
    fs::rename(host.paths(vm).dir, host.path("aside")).unwrap();
}

#[test]
fn gc_with_orphaned_vm_removes_only_what_is_named_after_it() {
    let Some(host) = host_with_a_group() else { return };
    let stemcell = host.stemcell();
    let (stays, goes) =
        (forwarded_vm(&host, &stemcell, 2201), forwarded_vm(&host, &stemcell, 2202));
    host.wait_for_console(&goes, "BOOTSECTOR-OK", 1);
    host.ok("delete_vm", &json!([stays]));
    let before = host.namespace().run(|| nftables::elements(GUARD));
    let stays = forwarded_vm(&host, &stemcell, 2201);
    let of_one = host.namespace().run(|| nftables::elements(GUARD)) - before;
    let qemu = host.qemu(&goes).unwrap();
    let link = tap(&host, &goes);
    lose_directory(&host, &goes);
    let why = assert_repaired(&host, "orphan", &goes);
    for word in [
        "QEMU, process",
        "elements in table",
        "reservation ip,",
        "reservation port,tcp,2202,any",
        "uid 19",
        "lock",
        &link,
    ] {
        assert!(why.contains(word), "{word} in {why}");
    }
    wait_for_exit(&qemu);
    assert!(host.namespace().link(&link).is_none());
    assert_eq!(
        host.namespace().run(|| nftables::elements(GUARD)),
        of_one,
        "the elements of the other VM"
    );
    assert!(host.qemu(&stays).is_some() && host.namespace().link(&tap(&host, &stays)).is_some());
    // The bridge goes with the last VM.
    host.ok("delete_vm", &json!([stays]));
    let last = host.vm(&stemcell);
    fs::remove_dir_all(host.path("aside")).unwrap();
    lose_directory(&host, &last);
    assert!(host.namespace().link("bosh-nat0").is_some());
    assert_repaired(&host, "orphan", &last);
    host.ok("delete_stemcell", &json!([stemcell]));
    host.assert_no_leaks();
}

#[test]
fn delete_vm_without_directory_removes_everything_of_it() {
    let Some(host) = host_with_a_group() else { return };
    let stemcell = host.stemcell();
    let vm = forwarded_vm(&host, &stemcell, 2203);
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 1);
    let qemu = host.qemu(&vm).unwrap();
    lose_directory(&host, &vm);
    host.ok("delete_vm", &json!([vm]));
    wait_for_exit(&qemu);
    fs::remove_dir_all(host.path("aside")).unwrap();
    host.ok("delete_stemcell", &json!([stemcell]));
    host.assert_no_leaks();
}

#[test]
fn gc_with_orphaned_lock_or_reservation_removes_it() {
    let Some(host) = Host::new() else { return };
    host.disk();
    let state = host.path("state");
    fs::create_dir_all(state.join("claims")).unwrap();
    for claim in ["ip,bosh-nat0,10.9.0.7,32", "port,udp,53,any"] {
        std::os::unix::fs::symlink("vm-aaaaaaaaaaaaaaa", state.join("claims").join(claim)).unwrap();
        let why = assert_repaired(&host, "orphan", &"vm-aaaaaaaaaaaaaaa");
        assert_eq!(why, format!("the VM does not exist; this is left of it: reservation {claim}"));
    }
    fs::write(state.join("locks/vm.vm-bbbbbbbbbbbbbbb"), "").unwrap();
    assert_repaired(&host, "orphan", &"vm-bbbbbbbbbbbbbbb");
    assert_eq!(state.join("claims").read_dir().unwrap().count(), 0);
}

#[test]
fn gc_with_damaged_network_of_running_vm_restores_it() {
    let Some(host) = Host::new() else { return };
    let vm = host.vm(&host.stemcell());
    let before = host.namespace().run(|| nftables::elements(GUARD));
    host.namespace().run(nftables::flush);
    let why = assert_repaired(&host, "network", &"bosh-nat0");
    assert!(why.contains(GUARD) && why.contains("table inet bosh-qemu-bosh-nat0"), "{why}");
    assert_eq!(host.namespace().run(|| nftables::elements(GUARD)), before);

    host.namespace().ip("link delete bosh-nat0");
    assert_repaired(&host, "network", &"bosh-nat0");
    assert_eq!(host.namespace().link(&tap(&host, &vm)).unwrap()["master"], "bosh-nat0");
    // A single element is missing.
    host.namespace().run(|| nftables::remove_element(GUARD, "taps", &tap(&host, &vm)));
    assert_repaired(&host, "network", &"bosh-nat0");
    assert_eq!(host.namespace().run(|| nftables::elements(GUARD)), before);

    let link = tap(&host, &vm);
    host.namespace().ip(&format!("link delete {link}"));
    let (clean, found) = findings(&host, "gc");
    assert!(
        !clean && found[0][2].contains(&link) && found[0][3].contains("reboot_vm"),
        "{found:#?}"
    );
    host.ok("reboot_vm", &json!([vm]));
    assert_eq!(findings(&host, "audit"), (true, vec![]));
}

#[test]
fn gc_with_stopped_vm_restores_no_network() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    host.power_off(&vm);
    host.namespace().run(nftables::flush);
    host.namespace().ip("link delete bosh-nat0");
    assert_eq!(findings(&host, "gc"), (true, vec![]));
    assert!(host.namespace().link("bosh-nat0").is_none());
}

#[test]
fn gc_restores_kept_networks_and_removes_others() {
    let Some(host) =
        Host::with(json!({"networks": {"lab": {"subnet": "10.8.0.0/24", "bridge": "lab0"}}}))
    else {
        return;
    };
    assert!(host.command(&["network", "apply", "--json"]).0);
    assert_eq!(findings(&host, "audit"), (true, vec![]));
    host.namespace().ip("link delete lab0");
    assert_repaired(&host, "network", &"lab0");
    assert!(host.namespace().link("lab0").is_some());
    host.namespace().ip("link set lab0 alias bosh-qemu-cpi:lab");
    assert_repaired(&host, "network", &"lab0");

    fs::remove_file(host.path("state/networks/lab0.json")).unwrap();
    assert_repaired(&host, "orphan", &"lab0");
    assert!(host.namespace().link("lab0").is_none());
    host.assert_no_leaks();
}

#[test]
fn gc_after_interrupted_delete_network_finishes_or_reverts_it() {
    let Some(host) = Host::new() else { return };
    let made = host.ok("create_network", &json!([{"netmask_bits": 24}]));
    let network = made[0].as_str().unwrap();
    let record = host.path("state/networks").join(network).join("network.json");
    let cut_short = || {
        let text = fs::read_to_string(&record).unwrap();
        fs::write(&record, text.replace("\"ready\"", "\"deleting\"")).unwrap();
    };
    let mut arguments = host.vm_arguments(&host.stemcell());
    let range: ipnetwork::IpNetwork = made[1]["range"].as_str().unwrap().parse().unwrap();
    arguments[3]["net"] = json!({
        "type": "manual", "ip": range.iter().nth(9).unwrap(), "netmask": "255.255.255.0",
        "gateway": made[1]["gateway"], "cloud_properties": made[2],
    });
    let vm = vm_cid(&host.ok("create_vm", &arguments));
    cut_short();
    assert_repaired(&host, "unfinished", &network);
    assert!(record.exists() && host.qemu(&vm).is_some(), "a VM uses the network");
    host.ok("delete_vm", &json!([vm]));
    cut_short();
    assert_repaired(&host, "unfinished", &network);
    assert!(!record.exists());
}

#[test]
fn gc_with_half_made_network_removes_it() {
    let Some(host) = Host::new() else { return };
    let made = host.ok("create_network", &json!([{"netmask_bits": 24}]));
    let network = made[0].as_str().unwrap();
    let record = host.path("state/networks").join(network).join("network.json");
    let text = fs::read_to_string(&record).unwrap();
    fs::write(&record, text.replace("\"ready\"", "\"creating\"")).unwrap();
    assert!(
        assert_repaired(&host, "unfinished", &network).contains("its creation was interrupted")
    );
    assert!(!record.exists());
    host.assert_no_leaks();
}

#[test]
fn remove_unreadable_managed_network_follows_its_finding() {
    let Some(host) = Host::new() else { return };
    let made = host.ok("create_network", &json!([{"netmask_bits": 24}]));
    let network = made[0].as_str().unwrap();
    let dir = host.path("state/networks").join(network);
    fs::write(dir.join("network.json"), "{").unwrap();
    let (_, found) = findings(&host, "audit");
    let remove = format!("bosh-qemu-cpi network remove {network}");
    assert!(
        found.len() == 1 && found[0][0] == "corrupt" && found[0][3].contains(&remove),
        "{found:?}"
    );
    fs::rename(&dir, host.path("aside")).unwrap();
    host.command(&["network", "remove", network, "--json"]);
    assert_eq!(findings(&host, "audit"), (true, vec![]));
    host.assert_no_leaks();
}

/// Runs `act` with another state directory and another run directory configured.
fn with_other_directories<T>(host: &Host, run: &Path, act: impl FnOnce() -> T) -> T {
    let set = |state: &Path, run: &Path| {
        host.reconfigure(|config| {
            config["state_dir"] = json!(state);
            config["run_dir"] = json!(run);
        });
    };
    let before = host.store();
    set(&host.path("other"), run);
    let done = act();
    set(before.state_dir(), before.run_dir());
    done
}

#[test]
fn gc_with_two_state_directories_on_one_network_touches_only_its_own() {
    let networks = json!({"default": {"subnet": "10.9.0.0/24"}});
    let Some(host) = Host::with(json!({"networks": networks})) else { return };
    let run = tempfile::Builder::new().prefix("bqt-").tempdir_in("/run").unwrap();
    let clean = || assert_eq!(findings(&host, "gc"), (true, vec![]));
    let mine = host.vm(&host.stemcell());
    let before = host.namespace().run(|| nftables::elements(GUARD));
    let theirs = with_other_directories(&host, run.path(), || {
        let theirs = host.vm(&host.stemcell());
        clean();
        theirs
    });
    clean();
    // One of this state directory's VMs is lost. Everything of the other directory's VM stays.
    lose_directory(&host, &mine);
    assert_repaired(&host, "orphan", &mine);
    with_other_directories(&host, run.path(), || {
        assert!(
            host.namespace()
                .link(&tap(&host, &theirs))
                .is_some_and(|tap| tap["master"] == "bosh-nat0")
        );
        assert!(host.qemu(&theirs).is_some());
        clean();
    });
    assert_eq!(host.namespace().run(|| nftables::elements(GUARD)), before);
    // The other directory keeps the bridge, and this directory's last VM is deleted.
    with_other_directories(&host, run.path(), || {
        assert!(host.command(&["network", "apply", "--json"]).0);
        host.ok("delete_vm", &json!([theirs]));
    });
    let mine = host
        .vm(&host.store().list::<bosh_qemu_cpi::store::StemcellRecord>().unwrap()[0].to_string());
    host.ok("delete_vm", &json!([mine]));
    clean();
    assert!(host.namespace().link("bosh-nat0").is_some(), "the other state directory keeps it");
    with_other_directories(&host, run.path(), || {
        clean();
        assert!(host.command(&["network", "remove", "--json"]).0);
        assert!(host.namespace().link("bosh-nat0").is_none());
        host.delete_everything();
    });
}

#[test]
fn gc_with_foreign_processes_in_cgroup_keeps_them() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    let (qemu, supervisor) = (host.qemu(&vm).unwrap(), host.supervisor(&vm).unwrap());
    supervisor.signal(Signal::SIGKILL).unwrap();
    wait_for_exit(&supervisor);
    let link = tap(&host, &vm);
    // As in a copy of the state directory with a run directory of its own.
    let run = host.paths(&vm).run;
    let aside = host.store().run_dir().join("aside");
    fs::rename(&run, &aside).unwrap();
    lose_directory(&host, &vm);
    if Cgroup::open(vm.as_str()).processes().unwrap().is_empty() {
        skip("no control group can be made here");
    } else {
        let (clean, found) = findings(&host, "gc");
        assert!(
            !clean && found.len() == 1 && found[0][2].contains(&qemu.pid().to_string()),
            "{found:#?}"
        );
        assert!(host.namespace().link(&link).is_some());
    }
    fs::rename(&aside, &run).unwrap();
    fs::rename(host.path("aside"), host.paths(&vm).dir).unwrap();
    assert!(host.qemu(&vm).is_some());
    assert_eq!(host.record(&vm).phase, Phase::Ready);
}
