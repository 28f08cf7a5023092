//! Disks in a pool that hosts share: each host can take one, and never two hosts have it.

use bosh_qemu_cpi::cid::{Cid, DiskCid};
use bosh_qemu_cpi::store::DiskRecord;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::host_groups::Group;
use crate::support::answer::run;
use crate::support::crash_points::{call_with_crash, for_each_crash_point, take_passed_points};
use crate::support::filesystem::Filesystem;
use crate::support::host::{Host, text};
use crate::support::images::{assert_pattern, write_pattern};
use crate::support::skip;

/// The file that a used pool always has.
const MARK: &str = ".bosh-qemu-cpi";

/// The configuration of a host with the shared pool.
fn config(pool: &Filesystem) -> Value {
    let pools = json!({"nfs": {"path": pool.path(), "shared": true}});
    json!({"pools": pools, "disk_defaults": {"pool": "nfs"}})
}

/// A pool, and two hosts that share it.
fn pair() -> Option<(Filesystem, [Host; 2])> {
    let pool = Filesystem::new(256)?;
    let hosts = [Host::with(config(&pool))?, Host::with(config(&pool))?];
    Some((pool, hosts))
}

/// The indexes of the hosts that have a record of the disk.
fn owners(hosts: &[Host; 2], disk: &DiskCid) -> Vec<usize> {
    (0..2).filter(|n| hosts[*n].store().list::<DiskRecord>().unwrap().contains(disk)).collect()
}

fn disk(host: &Host) -> DiskCid {
    text(&host.ok("create_disk", &json!([8, {}, null]))).parse().unwrap()
}

/// The messages of a host after a remote request.
fn asked(host: &Host, question: &Value, variables: &[(&str, &str)]) -> String {
    let mut command = host.cpi();
    command.args(["host", "serve"]);
    command
        .envs(variables.iter().map(|(name, value)| (format!("BOSH_QEMU_CPI_CRASH_{name}"), value)));
    let output = host.namespace().run(|| run(command, format!("{question}\n").as_bytes()));
    String::from_utf8(output.stdout).unwrap()
}

/// Has a host release a disk, and returns its messages.
fn give_up(host: &Host, disk: &DiskCid, variables: &[(&str, &str)]) -> String {
    asked(host, &json!({"give_up": disk}), variables)
}

/// The messages of a host that is asked whether it has the disk.
fn found(host: &Host, disk: &DiskCid) -> String {
    asked(host, &json!({"find": [disk]}), &[])
}

#[test]
fn attach_disk_on_another_host_moves_it() {
    let Some(pool) = Filesystem::new(256) else { return };
    let Some(group) = Group::with(&config(&pool)) else { return };
    let stemcell = group.stemcell();
    let (one, at_one) = group.vm(&stemcell, &[], &json!({"bosh": {"group": "g"}}));
    let (two, at_two) = group.vm(&stemcell, &[], &json!({"bosh": {"group": "g"}}));
    assert_ne!(at_one, at_two);
    let (disk, _) = group.disk(Some(&one));
    write_pattern(&group.hosts[at_one], &disk);
    group.director.ok("set_disk_metadata", &json!([disk, {"job": "db"}]));
    group.director.ok("attach_disk", &json!([one, disk]));
    let refused = group.director.call("attach_disk", &json!([two, disk]));
    let message = &refused.failure().message;
    assert!(message.contains(&format!("attached to VM '{one}'")), "{message}");
    assert_eq!(owners(&group.hosts, &disk), [at_one]);

    group.director.ok("detach_disk", &json!([one, disk]));
    for (vm, at) in [(&two, at_two), (&one, at_one), (&two, at_two)] {
        let hint = group.director.ok("attach_disk", &json!([vm, disk]));
        assert!(hint["path"].as_str().unwrap().ends_with(disk.to_string().as_str()));
        assert_eq!(owners(&group.hosts, &disk), [at]);
        assert_eq!(group.director.ok("get_disks", &json!([vm])), json!([disk]));
        assert_eq!(group.director.ok("has_disk", &json!([disk])), true);
        let record = group.hosts[at].store().read::<DiskRecord>(&disk).unwrap().unwrap();
        assert_eq!(group.hosts[at].store().disk_metadata(&record).unwrap()["job"], "db");
        group.hosts.iter().for_each(|host| assert!(host.command(&["audit", "--json"]).0));
        group.director.ok("detach_disk", &json!([vm, disk]));
        assert_pattern(&group.hosts[at], &disk);
    }
    // The new VM of a draining host is placed on the other host, and its disk follows.
    group.configure(|config| config["hosts"][at_two]["draining"] = json!(true));
    group.director.ok("delete_vm", &json!([two]));
    let (new, at_new) =
        group.vm(&stemcell, std::slice::from_ref(&disk), &json!({"bosh": {"group": "g"}}));
    assert_eq!(at_new, at_one);
    group.director.ok("attach_disk", &json!([new, disk]));
    group.director.ok("detach_disk", &json!([new, disk]));
    // A call about a disk without an owner takes it first.
    assert_eq!(give_up(&group.hosts[at_one], &disk, &[]).lines().last(), Some("\"given_up\""));
    group.director.ok("resize_disk", &json!([disk, 16]));
    let snapshot = group.director.ok("snapshot_disk", &json!([disk, {}]));
    group.director.ok("delete_snapshot", &json!([snapshot]));
    let at = owners(&group.hosts, &disk);
    assert_eq!(give_up(&group.hosts[at[0]], &disk, &[]).lines().last(), Some("\"given_up\""));
    group.delete(&[&one, &new], &[&disk], &stemcell);
    assert_eq!(pool.names(), [MARK]);
}

/// A host is killed while it releases or takes a disk. Afterwards one host has the whole disk,
/// whichever host is asked.
#[test]
fn move_disk_killed_at_any_step_leaves_it_on_one_host() {
    if !cfg!(debug_assertions) {
        return skip("crash points are for builds with debug assertions");
    }
    let Some((pool, hosts)) = pair() else { return };
    let log = hosts[0].path("crash-points");
    let log = log.to_str().unwrap();
    let made = || {
        let disk = disk(&hosts[0]);
        write_pattern(&hosts[0], &disk);
        disk
    };
    let gone = |disk: &DiskCid, host: usize| {
        hosts[host].ok("delete_disk", &json!([disk]));
        assert!(owners(&hosts, disk).is_empty());
        assert_eq!(pool.names(), [MARK]);
        hosts.iter().for_each(|host| assert!(host.command(&["gc", "--json"]).0));
    };
    let first = made();
    give_up(&hosts[0], &first, &[("LOG", log)]);
    gone(&first, 1);
    let points = take_passed_points(log.as_ref());
    assert!(points.len() > 4, "{points:?}");
    for (number, point) in points.iter().enumerate() {
        let disk = made();
        give_up(&hosts[0], &disk, &[("AT", point)]);
        // A second request releases the disk for the other host; without it the first keeps the
        // disk.
        let to = number % 2;
        if to == 1 {
            let said = give_up(&hosts[0], &disk, &[]);
            assert_eq!(said.lines().last(), Some("\"given_up\""), "after '{point}'");
        }
        hosts[to].ok("resize_disk", &json!([disk, 9]));
        assert_eq!(owners(&hosts, &disk), [to], "after '{point}'");
        assert_pattern(&hosts[to], &disk);
        gone(&disk, to);
    }
    let given_up = || {
        let disk = made();
        give_up(&hosts[0], &disk, &[]);
        json!([disk, 9])
    };
    for_each_crash_point(&hosts[1], "resize_disk", given_up, |crash| {
        let disk: DiskCid = text(&crash.arguments[0]).parse().unwrap();
        hosts[1].ok("resize_disk", crash.arguments);
        assert_eq!(owners(&hosts, &disk), [1], "after '{}'", crash.point);
        assert_pattern(&hosts[1], &disk);
        gone(&disk, 1);
        "moved".to_owned()
    });
}

/// Two hosts take a disk at the same time: one gets it, and the other fails.
#[test]
fn move_disk_to_two_hosts_concurrently_succeeds_once() {
    let Some((_pool, hosts)) = pair() else { return };
    for round in 0..10 {
        let disk = disk(&hosts[0]);
        give_up(&hosts[0], &disk, &[]);
        let answers = std::thread::scope(|threads| {
            let ask = |host: &'_ Host| host.call("resize_disk", &json!([disk, 9])).outcome.is_ok();
            let asked = [&hosts[0], &hosts[1]].map(|host| threads.spawn(move || ask(host)));
            asked.map(|answer| answer.join().unwrap())
        });
        let owners = owners(&hosts, &disk);
        assert_eq!(owners.len(), 1, "round {round}: {answers:?}");
        assert!(
            answers[owners[0]] && !answers[1 - owners[0]],
            "round {round}: {answers:?}, on {owners:?}"
        );
        hosts[owners[0]].ok("delete_disk", &json!([disk]));
    }
}

/// A host that was replaced comes back: it does not touch disks that another host has taken.
#[test]
fn use_disk_taken_by_another_host_is_refused() {
    let Some((pool, hosts)) = pair() else { return };
    let [gone, taker] = &hosts;
    let (vm, disk, spare) = (gone.booted_vm(), disk(gone), disk(gone));
    write_pattern(gone, &disk);
    gone.ok("attach_disk", &json!([vm, disk]));
    // The next host must know changes since the create.
    gone.ok("update_disk", &json!([spare, 16, {"iops": 500}]));
    let unknown = take(taker, &"disk-aaaaaaaaaaaaaaa".parse().unwrap()).unwrap_err();
    assert!(
        unknown.contains("no shared pool has") && unknown.contains("this host has ['nfs']"),
        "{unknown}"
    );
    // The first host's QEMU still has the disk open.
    let refused = take(taker, &disk).unwrap_err();
    assert!(
        refused.contains("is open in a QEMU") && refused.contains("detach the disk there"),
        "{refused}"
    );
    assert_eq!(owners(&hosts, &disk), [0]);

    let qemu = gone.qemu(&vm).unwrap();
    let supervisor = gone.supervisor(&vm).unwrap();
    for process in [&supervisor, &qemu] {
        process.signal(Signal::SIGKILL).unwrap();
        crate::support::host::wait_for_exit(process);
    }
    for cid in [&disk, &spare] {
        take(taker, cid).unwrap();
        // A second take changes nothing.
        take(taker, cid).unwrap();
    }
    let taken = taker.store().read::<DiskRecord>(&spare).unwrap().unwrap();
    assert_eq!(
        (taken.size.get(), taken.limits.iops, taken.pool.as_deref()),
        (16, Some(500), Some("nfs"))
    );
    let new = taker.booted_vm();
    taker.ok("attach_disk", &json!([new, disk]));

    let (well, started) = gone.command(&["host", "start", "--json"]);
    assert!(!well && started.to_string().contains("owned by another host now"), "{started}");
    for (method, arguments) in [
        ("attach_disk", json!([vm, disk])),
        ("resize_disk", json!([disk, 9])),
        ("snapshot_disk", json!([spare, {}])),
        ("update_disk", json!([spare, 16, {"format": "raw"}])),
        ("delete_disk", json!([spare])),
        ("set_disk_metadata", json!([spare, {}])),
    ] {
        let refused = gone.call(method, &arguments);
        assert!(
            refused.failure().message.contains("owned by another host now"),
            "{method}: {refused:?}"
        );
    }
    // A group that asks all hosts for the disk finds the other host.
    let said = found(gone, &spare);
    assert!(said.contains(r#"{"found":[]}"#), "{said}");
    let (well, found) = gone.command(&["gc", "--json"]);
    assert!(!well && found.to_string().contains(&format!("detach_disk from VM '{vm}'")), "{found}");
    assert_eq!(owners(&hosts, &spare), [1], "it has forgotten the one that no VM has");
    gone.ok("detach_disk", &json!([vm, disk]));
    gone.ok("reboot_vm", &json!([vm]));
    assert!(gone.command(&["gc", "--json"]).0);
    assert_eq!(owners(&hosts, &disk), [1]);
    // If the host denied the disk, the Director would forget it; a successful delete would be
    // false.
    for method in ["has_disk", "delete_disk", "resize_disk"] {
        let arguments = if method == "resize_disk" { json!([disk, 9]) } else { json!([disk]) };
        let refused = gone.call(method, &arguments);
        let message = &refused.failure().message;
        assert!(
            message.contains("owned by another host") && message.contains("disk take"),
            "{method}: {message}"
        );
    }

    taker.ok("detach_disk", &json!([new, disk]));
    assert_pattern(taker, &disk);
    for cid in [&disk, &spare] {
        taker.ok("delete_disk", &json!([cid]));
    }
    assert_eq!(pool.names(), [MARK]);
}

/// Has a host take a disk, or returns its refusal.
fn take(host: &Host, disk: &DiskCid) -> Result<(), String> {
    let output = host.cpi().args(["disk", "take"]).arg(disk.to_string()).output().unwrap();
    if output.status.success() { Ok(()) } else { Err(String::from_utf8(output.stderr).unwrap()) }
}

/// A host that was replaced comes back, and takes a disk back.
#[test]
fn take_disk_back_succeeds() {
    let Some((pool, hosts)) = pair() else { return };
    let [gone, taker] = &hosts;
    let disk = disk(gone);
    write_pattern(gone, &disk);
    take(taker, &disk).unwrap();
    taker.ok("resize_disk", &json!([disk, 16]));
    assert_eq!(give_up(taker, &disk, &[]).lines().last(), Some("\"given_up\""));
    // The host's own record is older than the disk.
    let said = found(gone, &disk);
    assert!(said.contains(disk.as_str()), "{said}");
    gone.ok("resize_disk", &json!([disk, 17]));
    assert_eq!(owners(&hosts, &disk), [0]);
    assert_pattern(gone, &disk);
    gone.ok("delete_disk", &json!([disk]));
    assert_eq!(pool.names(), [MARK]);
}

/// A host dies while it copies a disk out of the pool; another host takes the disk; the first comes
/// back.
#[test]
fn recover_copy_of_taken_disk_changes_nothing() {
    if !cfg!(debug_assertions) {
        return skip("crash points are for builds with debug assertions");
    }
    let Some((_pool, hosts)) = pair() else { return };
    let [gone, taker] = &hosts;
    // The host dies while it copies data, and after its record names the copy.
    for point in ["image converted#1", "disk.json: replaced#2"] {
        let disk = disk(gone);
        write_pattern(gone, &disk);
        let update = json!([disk, 8, {"pool": null}]);
        assert!(
            call_with_crash(gone, "update_disk", &update, [("AT", point)]).is_none(),
            "not killed at '{point}'"
        );
        take(taker, &disk).unwrap();
        // Any create recovers what killed calls left.
        let other = gone.disk();
        let refused = gone.call("update_disk", &update);
        assert!(
            refused.failure().message.contains("owned by another host now"),
            "'{point}': {refused:?}"
        );
        let (well, found) = gone.command(&["gc", "--json"]);
        if point.starts_with("disk.json") {
            // The copy had become the disk, and may have newer data.
            assert!(!well && found.to_string().contains("this host's image is newer"), "{found}");
            // The host takes the disk back neither by itself nor by request: its copy is newer.
            assert_eq!(give_up(taker, &disk, &[]).lines().last(), Some("\"given_up\""));
            let asked = gone.call("resize_disk", &json!([disk, 9]));
            for refused in [take(gone, &disk).unwrap_err(), format!("{asked:?}")] {
                assert!(refused.contains("this host's image is newer"), "{refused}");
            }
            gone.store().remove_local(&disk).unwrap();
            assert!(gone.command(&["gc", "--json"]).0);
        } else {
            assert!(well, "after '{point}': {found}");
        }
        taker.ok("resize_disk", &json!([disk, 9]));
        assert_eq!(owners(&hosts, &disk), [1], "after '{point}'");
        assert_pattern(taker, &disk);
        taker.ok("delete_disk", &json!([disk]));
        gone.ok("delete_disk", &json!([other]));
    }
}

/// A copy into a pool is interrupted, and the pool vanishes: the disk is where it was.
#[test]
fn recover_copy_into_missing_pool_keeps_the_disk() {
    if !cfg!(debug_assertions) {
        return skip("crash points are for builds with debug assertions");
    }
    let Some(pool) = Filesystem::new(256) else { return };
    let Some(host) = Host::with(json!({"pools": {"nfs": {"path": pool.path(), "shared": true}}}))
    else {
        return;
    };
    let (vm, disk) = (host.booted_vm(), host.disk());
    write_pattern(&host, &disk);
    let update = json!([disk, 8, {"pool": "nfs"}]);
    assert!(
        call_with_crash(&host, "update_disk", &update, [("AT", "image converted#1")]).is_none()
    );
    pool.hide();
    host.ok("attach_disk", &json!([vm, disk]));
    host.ok("reboot_vm", &json!([vm]));
    host.ok("resize_disk", &json!([disk, 9]));
    host.ok("detach_disk", &json!([vm, disk]));
    pool.show();
    host.ok("update_disk", &json!([disk, 9, {"pool": "nfs"}]));
    assert_pattern(&host, &disk);
    host.ok("delete_vm", &json!([vm]));
    host.ok("delete_disk", &json!([disk]));
    assert_eq!(pool.names(), [MARK]);
}

/// A state directory is restored without the file that holds the host's id.
#[test]
fn call_without_host_id_is_refused_and_forgets_no_disk() {
    let Some((_pool, hosts)) = pair() else { return };
    let host = &hosts[0];
    let disk = disk(host);
    let id = host.path("state/host-id");
    let known = std::fs::read_to_string(&id).unwrap();
    std::fs::remove_file(&id).unwrap();
    // A new disk would get an owner file with a new id.
    for (method, arguments) in
        [("resize_disk", json!([disk, 9])), ("create_disk", json!([8, {}, null]))]
    {
        let refused = host.call(method, &arguments);
        let message = &refused.failure().message;
        assert!(
            message.contains("host-id' is missing") && message.contains(known.trim()),
            "{method}: {message}"
        );
    }
    let (well, found) = host.command(&["gc", "--json"]);
    assert!(!well && found.to_string().contains("host-id' is missing"), "{found}");
    assert_eq!(owners(&hosts, &disk), [0]);
    std::fs::write(&id, known).unwrap();
    host.ok("resize_disk", &json!([disk, 9]));
    assert!(host.command(&["gc", "--json"]).0);
    host.ok("delete_disk", &json!([disk]));
}

/// The next host could not decrypt the disk.
#[test]
fn move_disk_encrypted_with_local_key_is_refused() {
    let Some((_pool, hosts)) = pair() else { return };
    let host = &hosts[0];
    let disk: DiskCid =
        text(&host.ok("create_disk", &json!([8, {"encrypted": true}, null]))).parse().unwrap();
    let said = give_up(host, &disk, &[]);
    assert!(said.contains("key_file") && owners(&hosts, &disk) == [0], "{said}");
    host.reconfigure(|config| config["key_file"] = json!(host.path("state/disk.key")));
    assert_eq!(give_up(host, &disk, &[]).lines().last(), Some("\"given_up\""));
    host.ok("delete_disk", &json!([disk]));
}

/// A disk outside shared pools stays on its host.
#[test]
fn move_disk_outside_shared_pools_is_refused() {
    let Some((_pool, hosts)) = pair() else { return };
    let own: DiskCid =
        text(&hosts[0].ok("create_disk", &json!([8, {"pool": null}, null]))).parse().unwrap();
    let said = give_up(&hosts[0], &own, &[]);
    assert!(said.contains("is in no shared pool"), "{said}");
    let said = give_up(&hosts[1], &own, &[]);
    assert!(said.contains("there is no disk"), "{said}");
    hosts[0].ok("delete_disk", &json!([own]));
}
