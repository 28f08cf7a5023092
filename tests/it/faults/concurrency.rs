//! Concurrent callers. A Director has several workers with up to 32 threads each, and every call is
//! a process of its own.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bosh_qemu_cpi::cid::{Cid, VmCid};
use bosh_qemu_cpi::store::VmRecord;
use nix::sys::signal::Signal;
use serde_json::json;

use crate::support::answer::{Answer, Failure};
use crate::support::disks::is_plugged;
use crate::support::host::{Host, eventually, text, vm_cid, wait_for_exit};
use crate::support::vm_list::vm_list;

/// Threads of a Director's worker.
const CALLERS: usize = 32;
/// VMs whose emulated guests boot on two cores.
const VMS: usize = 16;
/// Pool with one address for each of these VMs.
const POOL: &str = "10.9.0.100-10.9.0.115";

/// Runs `job` in [`CALLERS`] threads and passes each its number.
fn call_from_all_threads<T: Send>(job: impl Fn(usize) -> T + Sync) -> Vec<T> {
    std::thread::scope(|threads| {
        let callers: Vec<_> = (0..CALLERS)
            .map(|number| {
                threads.spawn({
                    let job = &job;
                    move || job(number)
                })
            })
            .collect();
        callers
            .into_iter()
            .map(|caller| caller.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

fn all_differ<T: Ord + Debug>(what: &str, values: impl IntoIterator<Item = T>) {
    let mut seen = BTreeSet::new();
    for value in values {
        assert!(!seen.contains(&value), "{what} {value:?} twice");
        seen.insert(value);
    }
}

#[allow(clippy::print_stdout)]
fn print_rate(what: &str, times: usize, began: Instant) {
    let seconds = began.elapsed().as_secs_f64();
    println!(
        "{what}: {times} by {CALLERS} callers in {seconds:.1} s, {:.0} a second",
        times as f64 / seconds
    );
}

/// Runs `job` while `audit` and `gc` run in a loop. They must report nothing about objects that
/// calls work on, and not disturb the calls.
fn with_audit_loop<T>(host: &Host, job: impl FnOnce() -> T) -> T {
    let is_done = AtomicBool::new(false);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            for words in [["audit", "--json"], ["gc", "--json"]].iter().cycle() {
                let (clean, found) = host.command(words);
                assert!(clean && found["findings"] == json!([]), "{words:?}: {found}");
                if is_done.load(Ordering::Relaxed) {
                    return;
                }
            }
        });
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job));
        is_done.store(true, Ordering::Relaxed);
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[test]
fn call_from_32_threads_succeeds() {
    let Some(host) = Host::with(json!({"qemu": {"hotplug_slots": 4}})) else { return };
    with_audit_loop(&host, || many_calls(&host));
    host.assert_no_leaks();
}

/// Each create first sees the pending notes of the others and must not take them for those of
/// killed calls.
#[test]
fn create_vms_concurrently_get_distinct_addresses() {
    let networks = json!({"default": {"subnet": "10.9.0.0/24", "pool": POOL}});
    let Some(host) = Host::with(json!({"networks": networks})) else { return };
    let dynamic =
        json!(["agent-1", host.stemcell(), {"ram": 64}, {"net": {"type": "dynamic"}}, [], {}]);
    let made = call_from_all_threads(|number| {
        let answer = (number < VMS).then(|| host.ok("create_vm", &dynamic));
        host.ok("delete_disk", &json!([host.disk()]));
        answer
    });
    let made: Vec<_> = made.into_iter().flatten().collect();
    all_differ("address", made.iter().map(|answer| text(&answer[1]["net"]["ip"])));
    for answer in &made {
        let rules = host.record(&vm_cid(answer)).nics[0].rules.clone().unwrap();
        assert_eq!(json!(rules.addresses[0].ip()), answer[1]["net"]["ip"]);
    }
    let full = host.call("create_vm", &dynamic);
    assert!(full.failure().message.contains("no free address"), "{full:?}");
}

fn many_calls(host: &Host) {
    let stemcell = host.stemcell();

    let began = Instant::now();
    let made =
        call_from_all_threads(|number| ((number < VMS).then(|| host.vm(&stemcell)), host.disk()));
    print_rate("create_vm and create_disk", VMS + CALLERS, began);
    let (vms, disks): (Vec<_>, Vec<_>) = made.into_iter().unzip();
    let vms: Vec<_> = vms.into_iter().flatten().collect();
    let records: Vec<_> = vms.iter().map(|vm| host.record(vm)).collect();
    all_differ("vm", &vms);
    all_differ("disk", &disks);
    all_differ("uid", records.iter().map(|vm| vm.uid));
    let nics = || records.iter().flat_map(|vm| &vm.nics);
    all_differ("MAC", nics().map(|nic| nic.mac.to_string()));
    all_differ("tap", nics().map(|nic| nic.tap().expect("a tap").0.to_string()));
    all_differ("process", vms.iter().map(|vm| host.qemu(vm).expect("it runs").pid()));
    let links = host.namespace().ip_json("link show master bosh-nat0");
    assert_eq!(links.as_array().unwrap().len(), VMS, "every tap is on one bridge");

    let began = Instant::now();
    let there = call_from_all_threads(|number| {
        (0..20).all(|_| host.ok("has_vm", &json!([vms[number % VMS]])) == true)
    });
    print_rate("has_vm", 20 * CALLERS, began);
    assert!(there.into_iter().all(|there| there));

    for vm in &vms {
        host.wait_for_console(vm, "BOOTSECTOR-OK", 1);
    }
    // Two callers attach each disk, to two VMs.
    let began = Instant::now();
    let wins = call_from_all_threads(|number| {
        let attach = |vm: usize| host.call("attach_disk", &json!([vms[vm % VMS], disks[number]]));
        let both = std::thread::scope(|threads| {
            let other = threads.spawn(|| attach(number + 1));
            [attach(number), other.join().unwrap()]
        });
        for refused in both.iter().filter_map(|answer| answer.outcome.as_ref().err()) {
            assert!(
                refused.message.contains("is attached to VM")
                    || refused.message.contains("disk slots of VM"),
                "{refused:?}"
            );
        }
        both.iter().filter(|answer| answer.outcome.is_ok()).count()
    });
    print_rate("attach_disk", 2 * CALLERS, began);
    let listed = |vm: &VmCid| host.ok("get_disks", &json!([vm])).as_array().unwrap().clone();
    let attached: Vec<_> = vms
        .iter()
        .flat_map(|vm| listed(vm).into_iter().map(move |disk| (text(&disk), vm)))
        .collect();
    assert_eq!(attached.len(), wins.iter().sum::<usize>());
    all_differ("attached disk", attached.iter().map(|(disk, _)| disk));
    let in_qemu =
        attached.iter().filter(|(disk, vm)| is_plugged(host, vm, &disk.parse().unwrap())).count();
    assert_eq!(in_qemu, attached.len());

    let began = Instant::now();
    call_from_all_threads(|number| {
        if let Some((disk, vm)) = attached.get(number) {
            // The VM may be deleted before or during the call.
            let answer = host.call("detach_disk", &json!([vm, disk]));
            let late = |failure: &Failure| {
                failure.kind == "VMNotFound" || failure.message.contains("monitor")
            };
            assert!(answer.outcome.as_ref().err().is_none_or(late), "{answer:?}");
        }
        if let Some(vm) = vms.get(number) {
            host.ok("delete_vm", &json!([vm]));
        }
    });
    call_from_all_threads(|number| host.ok("delete_disk", &json!([disks[number]])));
    print_rate("detach_disk, delete_vm and delete_disk", attached.len() + VMS + CALLERS, began);
    host.ok("delete_stemcell", &json!([stemcell]));
}

#[test]
fn call_concurrently_on_one_vm_and_disk_stays_consistent() {
    let Some(host) = Host::new() else { return };
    let (vm, disk) = (host.booted_vm(), host.disk());
    let both = json!([vm, disk]);
    let answers = call_from_all_threads(|number| match number % 4 {
        0 => host.call("attach_disk", &both),
        1 => host.call("detach_disk", &both),
        2 => host.call("set_vm_metadata", &json!([vm, {"index": number.to_string()}])),
        _ => host.call("has_disk", &json!([disk])),
    });
    let failed: Vec<_> = answers.iter().filter(|answer| answer.outcome.is_err()).collect();
    assert!(failed.is_empty(), "{failed:?}");
    let listed = host.ok("get_disks", &json!([vm])) == json!([disk]);
    assert_eq!(listed, is_plugged(&host, &vm, &disk));
    // Some callers delete the VM while others use it. A late caller gets VMNotFound.
    let answers = call_from_all_threads(|number| match number % 4 {
        0 => host.call("delete_vm", &json!([vm])),
        1 => host.call("detach_disk", &both),
        2 => host.call("attach_disk", &both),
        _ => host.call("reboot_vm", &json!([vm])),
    });
    let failure_of = |answer: &Answer| {
        answer.outcome.as_ref().err().map(|failure| (failure.kind.clone(), failure.message.clone()))
    };
    for (number, failure) in answers.iter().map(failure_of).enumerate() {
        match failure {
            None => {}
            Some((kind, _)) if kind == "VMNotFound" && number % 4 != 0 => {}
            // delete_vm cancels a launch that is in progress.
            Some((_, message)) if number % 4 == 3 && message.contains("was cancelled") => {}
            Some(failure) => panic!("caller {number}: {failure:?}"),
        }
    }
    host.ok("delete_vm", &json!([vm]));
    assert_eq!(host.ok("has_vm", &json!([vm])), false);
    host.ok("delete_disk", &json!([disk]));
}

#[test]
fn create_vms_beyond_parallel_boots_wait() {
    let Some(host) = Host::with(json!({"limits": {"parallel_boots": 2}})) else { return };
    let stemcell = host.stemcell();
    // No launch ever becomes ready, so each keeps its slot.
    host.replace_qemu("exec sleep 600");
    let callers: Vec<_> =
        (0..5).map(|_| host.start("create_vm", &host.vm_arguments(&stemcell))).collect();
    let all = |what: &dyn Fn(&VmCid) -> bool| {
        let vms = host.store().list::<VmRecord>().unwrap();
        vms.into_iter().filter(|vm| what(vm)).collect::<Vec<_>>()
    };
    let mut seen = BTreeSet::new();
    for turn in 0..3 {
        let vms = eventually("five launches, two of them with a slot", || {
            let wants = all(&|vm| host.supervisor(vm).is_some());
            let may = all(&|vm| host.qemu(vm).is_some());
            assert!(may.len() <= 2, "{may:?} at a time");
            (wants.len() == 5 - turn && may.len() == 2).then_some(may)
        });
        seen.extend(vms.iter().cloned());
        // This launch fails, and the next one gets the slot.
        let (qemu, supervisor) = (host.qemu(&vms[0]).unwrap(), host.supervisor(&vms[0]).unwrap());
        qemu.signal(Signal::SIGKILL).unwrap();
        wait_for_exit(&supervisor);
    }
    assert!(seen.len() >= 3, "waiting launches did not get a slot: {seen:?}");
    for vm in all(&|_| true) {
        host.track_vms(vm.as_str());
        host.call("delete_vm", &json!([vm])).result();
    }
    for mut caller in callers {
        caller.wait().unwrap();
    }
}

/// A host whose only boot slot is held by a VM whose QEMU never becomes ready. Returns the host, a
/// running VM, the hung call and the VM that holds the slot.
fn host_with_held_boot_slot() -> Option<(Host, VmCid, std::process::Child, VmCid)> {
    let host = Host::with(json!({"limits": {"parallel_boots": 1}}))?;
    let vm = host.booted_vm();
    let stemcell = host.store().read::<VmRecord>(&vm).unwrap().unwrap().stemcell.to_string();
    // The replacement of QEMU holds its lock and never opens a monitor.
    host.replace_qemu("exec sleep 600");
    let stuck = host.start("create_vm", &host.vm_arguments(&stemcell));
    let slow = eventually("a VM with a hung launch", || {
        let vms = host.store().list::<VmRecord>().unwrap();
        vms.into_iter().find(|cid| *cid != vm && host.qemu(cid).is_some())
    });
    host.track_vms(slow.as_str());
    Some((host, vm, stuck, slow))
}

#[test]
fn reboot_vm_without_boot_slot_names_the_holder() {
    let Some((host, vm, mut stuck, slow)) = host_with_held_boot_slot() else { return };
    host.reconfigure(|config| config["deadlines"] = json!({"reboot_vm": 20}));
    // has_vm needs no boot slot.
    let began = Instant::now();
    assert_eq!(host.ok("has_vm", &json!([vm])), true);
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    let answer = host.call("reboot_vm", &json!([vm]));
    let failure = answer.failure();
    assert_eq!(failure.kind, "CloudError");
    let holder = host.supervisor(&slow).expect("a supervisor").pid();
    for word in
        ["waited for one of 1 boot slots", "limits.parallel_boots", &format!("process {holder}")]
    {
        assert!(failure.message.contains(word), "{word} in {failure:?}");
    }

    host.reconfigure(|config| config["deadlines"] = json!({}));
    let waiting = host.start("reboot_vm", &json!([vm]));
    eventually("reboot_vm waits for a slot", || {
        let line = vm_list(&host)
            .as_array()
            .unwrap()
            .iter()
            .find(|line| line["cid"] == json!(vm))
            .cloned();
        line.filter(|line| line["state"] == "starting")
    });
    let began = Instant::now();
    host.ok("delete_vm", &json!([vm]));
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    let output = waiting.wait_with_output().unwrap();
    assert!(Answer::of(&output).failure().message.contains("was cancelled"), "{output:?}");
    assert_eq!(host.ok("has_vm", &json!([vm])), false);

    let supervisor = host.supervisor(&slow).unwrap();
    host.ok("delete_vm", &json!([slow]));
    wait_for_exit(&supervisor);
    stuck.wait().unwrap();
}

#[test]
fn create_vm_beyond_memory_is_refused_with_figures() {
    let Some(host) = Host::new() else { return };
    let stemcell = host.stemcell();
    let runs = host.vm(&stemcell);
    host.wait_for_console(&runs, "BOOTSECTOR-OK", 1);
    let mut arguments = host.vm_arguments(&stemcell);
    arguments[2]["ram"] = json!(64 << 20);
    let answer = host.call("create_vm", &arguments);
    let failure = answer.failure();
    assert_eq!((failure.kind.as_str(), failure.ok_to_retry), ("VMCreationFailed", false));
    for word in [
        "it needs 67108928 MiB (65536 GiB for the guest)",
        "512 MiB are reserved",
        &format!("{runs} has "),
    ] {
        assert!(failure.message.contains(word), "{word} in {failure:?}");
    }
    assert_eq!(host.store().list::<VmRecord>().unwrap(), std::slice::from_ref(&runs));

    // With all memory reserved, reboot_vm is refused before the VM is turned off.
    host.reconfigure(|config| config["limits"] = json!({"memory_reserve_mib": 1 << 20}));
    let qemu = host.qemu(&runs).unwrap().pid();
    let answer = host.call("reboot_vm", &json!([runs]));
    assert_eq!(answer.failure().kind, "CloudError");
    assert!(answer.failure().message.contains("are left"), "{answer:?}");
    assert_eq!(host.qemu(&runs).expect("it runs on").pid(), qemu);
    host.reconfigure(|config| config["limits"] = json!({}));
    host.ok("reboot_vm", &json!([runs]));
}

#[test]
fn create_vms_concurrently_beyond_memory_admits_one() {
    let Some(host) = Host::with(json!({"limits": {"memory_reserve_mib": 0}})) else { return };
    let stemcell = host.stemcell();
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let available = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap();
    let mib = available.trim().trim_end_matches(" kB").parse::<u64>().unwrap() >> 10;
    // More than half of the available memory, whatever other tests use meanwhile. The guests do not
    // touch it.
    let arguments = || {
        let mut arguments = host.vm_arguments(&stemcell);
        arguments[2]["ram"] = json!(mib * 6 / 10);
        arguments
    };
    let answers =
        call_from_all_threads(|number| (number < 4).then(|| host.call("create_vm", &arguments())));
    let answers: Vec<_> = answers.into_iter().flatten().collect();
    let made: Vec<_> = answers.iter().filter_map(|answer| answer.outcome.as_ref().ok()).collect();
    assert_eq!(made.len(), 1, "{answers:?}");
    let vm = vm_cid(made[0]);
    let refused = host.call("create_vm", &arguments());
    assert!(refused.failure().message.contains("promised to 1 other VMs"), "{refused:?}");
    // With overcommit, a second VM starts.
    host.reconfigure(|config| config["limits"]["memory"] = json!("overcommit"));
    host.ok("create_vm", &arguments());
    host.ok("delete_vm", &json!([vm]));
}
