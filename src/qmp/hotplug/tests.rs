//! Tests of hot-plug against a real QEMU.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;

use nix::sys::signal::Signal;
use serde_json::json;

use super::*;
use crate::qmp::power;
use crate::qmp::query::QueryJobs;
use crate::qmp::testing::{ClosingProxy, Guest, Image, test_deadline};

/// A disk image and its names in QEMU.
struct Disk {
    names: HotDisk,
    file: File,
}

impl Disk {
    fn new(guest: &Guest, name: &str) -> Self {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(guest.path(name))
            .unwrap();
        file.set_len(1 << 20).unwrap();
        let names = HotDisk {
            device: format!("disk-{name}"),
            node: format!("node-{name}"),
            lower_nodes: vec![format!("file-{name}")],
        };
        Self { names, file }
    }

    /// Creates each node by its own `blockdev-add`.
    fn blockdevs(&self, set: i64) -> Vec<Value> {
        let lower = &self.names.lower_nodes[0];
        vec![
            json!({"driver": "file", "node-name": lower, "filename": format!("/dev/fdset/{set}")}),
            json!({"driver": "raw", "node-name": self.names.node, "file": lower}),
        ]
    }

    /// Creates the lower node inside the JSON of the upper node.
    fn nested(&self, set: i64) -> Vec<Value> {
        let mut both = self.blockdevs(set);
        let below = both.remove(0);
        both[0]["file"] = below;
        both
    }

    fn attach_with(
        &self,
        monitor: &mut Monitor,
        blockdevs: &dyn Fn(i64) -> Vec<Value>,
    ) -> Result<Attached, HotplugError> {
        let device = json!({"driver": "virtio-blk-pci", "id": self.names.device,
            "drive": self.names.node, "serial": "x"});
        let Value::Object(device) = device else { unreachable!() };
        let request = AttachRequest {
            disk: &self.names,
            file: self.file.as_fd(),
            blockdevs,
            device: &device,
            port_prefix: "hotplug",
        };
        attach(monitor, &request, short_deadline())
    }

    fn attach(&self, monitor: &mut Monitor) -> Result<Attached, HotplugError> {
        self.attach_with(monitor, &|set| self.blockdevs(set))
    }

    fn detach(&self, monitor: &mut Monitor) -> Result<(), HotplugError> {
        detach(monitor, &self.names, test_deadline())
    }

    /// Number of devices, nodes and fds of this disk in QEMU.
    fn parts(&self, monitor: &mut Monitor) -> (usize, usize, usize) {
        let found = Inventory::query(monitor).unwrap();
        let sets = monitor.execute(&qmp::query_fdsets {}).unwrap();
        let fds = sets
            .iter()
            .flat_map(|set| &set.fds)
            .filter(|fd| fd.opaque == Some(self.names.opaque()))
            .count();
        let nodes = self.names.nodes().filter(|node| found.has_node(node)).count();
        (usize::from(found.has_device(&self.names.device)), nodes, fds)
    }
}

const ATTACHED: (usize, usize, usize) = (1, 2, 1);
const ABSENT: (usize, usize, usize) = (0, 0, 0);

/// A deadline that passes during a test.
fn short_deadline() -> Instant {
    Instant::now() + Duration::from_millis(1200)
}

fn on(port: &str) -> Attached {
    Attached::New { port: port.into() }
}

#[test]
fn attach_and_detach_twice_have_the_effect_of_once() {
    let mut guest = Guest::booted(Image::Answering, 1);
    let disk = Disk::new(&guest, "a");
    let mut monitor = guest.monitor();
    disk.detach(&mut monitor).unwrap();
    assert_eq!(disk.attach(&mut monitor).unwrap(), on("hotplug0"));
    guest.wait_for("U0");
    assert_eq!(disk.attach(&mut monitor).unwrap(), Attached::Already);
    assert_eq!(disk.parts(&mut monitor), ATTACHED);
    disk.detach(&mut monitor).unwrap();
    assert_eq!(disk.parts(&mut monitor), ABSENT);
    disk.detach(&mut monitor).unwrap();
    // On the same connection: the events of the first device must not count for the second.
    assert_eq!(disk.attach_with(&mut monitor, &|set| disk.nested(set)).unwrap(), on("hotplug0"));
    assert_eq!(disk.parts(&mut monitor), ATTACHED);
    disk.detach(&mut monitor).unwrap();
    assert_eq!(disk.parts(&mut monitor), ABSENT);
}

#[test]
fn attach_uses_the_lowest_free_port_until_none_is_free() {
    let guest = Guest::booted(Image::Answering, 2);
    let [a, b, c] = ["a", "b", "c"].map(|name| Disk::new(&guest, name));
    let mut monitor = guest.monitor();
    assert_eq!(a.attach(&mut monitor).unwrap(), on("hotplug0"));
    assert_eq!(b.attach(&mut monitor).unwrap(), on("hotplug1"));
    let full = c.attach(&mut monitor).unwrap_err();
    assert!(matches!(full, HotplugError::NoFreeSlot { slots: 2 }), "{full}");
    assert!(Error::from(full).report().contains("'extra_disks_slots'"));
    assert_eq!(c.parts(&mut monitor), ABSENT);
    a.detach(&mut monitor).unwrap();
    assert_eq!(c.attach(&mut monitor).unwrap(), on("hotplug0"));
    assert_eq!(b.parts(&mut monitor), ATTACHED);
}

#[test]
fn attach_to_a_port_occupied_meanwhile_uses_the_next_port() {
    let guest = Guest::new(Image::Answering, 2);
    let disk = Disk::new(&guest, "a");
    let mut monitor = guest.monitor();
    monitor
        .raw("device_add", &json!({"driver": "virtio-rng-pci", "id": "thief", "bus": "hotplug0"}))
        .unwrap();
    let mut plug_late = |id: &str| {
        let Value::Object(device) = json!({"driver": "virtio-rng-pci", "id": id}) else {
            unreachable!()
        };
        let blockdevs = |_| Vec::new();
        let request = AttachRequest {
            disk: &disk.names,
            file: disk.file.as_fd(),
            blockdevs: &blockdevs,
            device: &device,
            port_prefix: "hotplug",
        };
        plug(&mut monitor, &request, "hotplug0", &mut ["hotplug1"].into_iter()).unwrap()
    };
    assert_eq!(plug_late("first"), Some("hotplug1"));
    assert_eq!(plug_late("second"), None);
}

#[test]
fn refused_attach_leaves_nothing() {
    let guest = Guest::new(Image::Answering, 1);
    let disk = Disk::new(&guest, "a");
    let mut monitor = guest.monitor();
    let unreadable = |set: i64| {
        let mut nodes = disk.blockdevs(set);
        nodes[1]["driver"] = "qcow2".into();
        nodes
    };
    let error = disk.attach_with(&mut monitor, &unreadable).unwrap_err();
    assert!(matches!(&error, HotplugError::Monitor(e) if e.refused_with("qcow2")), "{error}");
    assert_eq!(disk.parts(&mut monitor), ABSENT);
    // The same with a device that QEMU refuses.
    let rng = json!({"driver": "virtio-rng-pci", "id": disk.names.device, "bus": "hotplug0"});
    let other = Disk {
        names: HotDisk { device: "boot".into(), ..disk.names.clone() },
        file: disk.file.try_clone().unwrap(),
    };
    let nodes_only = |set: i64| vec![other.blockdevs(set).remove(0)];
    other.attach_with(&mut monitor, &nodes_only).unwrap_err();
    assert_eq!(other.parts(&mut monitor), ABSENT);
    monitor.raw("device_add", &rng).unwrap();
}

#[test]
fn before_the_start_attach_works_and_detach_is_refused() {
    let mut guest = Guest::new(Image::Answering, 2);
    let [a, b] = ["a", "b"].map(|name| Disk::new(&guest, name));
    let mut monitor = guest.monitor();
    assert_eq!(a.attach(&mut monitor).unwrap(), on("hotplug0"));
    assert_eq!(b.attach(&mut monitor).unwrap(), on("hotplug1"));
    assert!(matches!(a.detach(&mut monitor), Err(HotplugError::NotStarted { .. })));
    assert_eq!(a.parts(&mut monitor), ATTACHED);
    monitor.run(async |c| power::cont(c).await).unwrap();
    // Detach works from the firmware on.
    a.detach(&mut monitor).unwrap();
    guest.wait_for("BOOTSECTOR-OK");
    assert_eq!(a.parts(&mut monitor), ABSENT);
    assert_eq!(b.parts(&mut monitor), ATTACHED);
}

#[test]
fn detach_from_a_mute_guest_times_out_until_a_reset() {
    let mut guest = Guest::booted(Image::Mute, 1);
    let disk = Disk::new(&guest, "a");
    let mut monitor = guest.monitor();
    disk.attach(&mut monitor).unwrap();
    let error =
        detach(&mut monitor, &disk.names, Instant::now() + 2 * UNPLUG_RESEND_INTERVAL).unwrap_err();
    let HotplugError::StillAttached { asked: 2.., state, .. } = &error else { panic!("{error}") };
    assert_eq!(state, "running");
    assert_eq!(Error::from(error).kind(), ErrorKind::Timeout);
    assert_eq!(disk.parts(&mut monitor), ATTACHED);
    assert_eq!(disk.attach(&mut monitor).unwrap(), Attached::Already);
    monitor.run(async |c| power::reset(c).await).unwrap();
    guest.wait_for("BOOTSECTOR-OK");
    disk.detach(&mut monitor).unwrap();
    assert_eq!(disk.parts(&mut monitor), ABSENT);
}

#[test]
fn unplug_pending_from_another_client_is_reported_and_cleared_by_a_reset() {
    let mut guest = Guest::new(Image::Mute, 1);
    let disk = Disk::new(&guest, "a");
    let mut monitor = guest.monitor();
    disk.attach(&mut monitor).unwrap();
    // This program never sends device_del in prelaunch.
    monitor.execute(&qmp::device_del { id: disk.names.device.clone() }).unwrap();
    monitor.run(async |c| power::cont(c).await).unwrap();
    guest.wait_for("BOOTSECTOR-OK");
    let error = detach(&mut monitor, &disk.names, short_deadline()).unwrap_err();
    let HotplugError::StillAttached { refusal: Some(refusal), .. } = &error else {
        panic!("{error}")
    };
    assert!(refusal.contains("already in the process of unplug"), "{refusal}");
    assert_eq!(disk.parts(&mut monitor), ATTACHED);
    monitor.run(async |c| power::reset(c).await).unwrap();
    disk.detach(&mut monitor).unwrap();
    assert_eq!(disk.parts(&mut monitor), ABSENT);
}

#[test]
fn backend_of_a_disk_the_guest_ejected_is_removed() {
    let mut guest = Guest::booted(Image::Answering, 1);
    let disk = Disk::new(&guest, "a");
    let mut monitor = guest.monitor();
    for attach_again in [true, false] {
        disk.attach(&mut monitor).unwrap();
        guest.wait_for("U0");
        guest.type_byte(b'e');
        let deleted = |e: &crate::qmp::Event| {
            matches!(e.kind(), EventKind::DeviceDeleted { device: Some(_), .. })
        };
        monitor.wait_event(deleted, test_deadline()).unwrap().unwrap();
        assert_eq!(disk.parts(&mut monitor), (0, 2, 1));
        if attach_again {
            assert_eq!(disk.attach(&mut monitor).unwrap(), on("hotplug0"));
            assert_eq!(disk.parts(&mut monitor), ATTACHED);
        }
        disk.detach(&mut monitor).unwrap();
        assert_eq!(disk.parts(&mut monitor), ABSENT);
    }
}

#[test]
fn attach_and_detach_recover_from_a_client_killed_after_any_command() {
    let guest = Guest::booted(Image::Answering, 1);
    let disk = Disk::new(&guest, "a");
    let proxy_after = |commands| {
        let proxy = ClosingProxy::after(commands, &guest.socket(), disk.file.try_clone().unwrap());
        Monitor::connect(&proxy.socket(), test_deadline())
    };
    let is_closed =
        |error: &HotplugError| matches!(error, HotplugError::Monitor(MonitorError::Closed));

    let complete = (2..).find(|commands| match disk.attach(&mut proxy_after(*commands).unwrap()) {
        Ok(_) => true,
        Err(error) => {
            assert!(is_closed(&error), "{error}");
            let mut monitor = guest.monitor();
            disk.attach(&mut monitor).unwrap();
            assert_eq!(disk.parts(&mut monitor), ATTACHED, "after {commands} commands");
            disk.detach(&mut monitor).unwrap();
            assert_eq!(disk.parts(&mut monitor), ABSENT, "after {commands} commands");
            false
        }
    });
    assert!(complete.unwrap() > 8, "{complete:?}");

    let complete = (2..).find(|commands| match disk.detach(&mut proxy_after(*commands).unwrap()) {
        Ok(()) => true,
        Err(error) => {
            assert!(is_closed(&error), "{error}");
            let mut monitor = guest.monitor();
            disk.detach(&mut monitor).unwrap();
            assert_eq!(disk.parts(&mut monitor), ABSENT, "after {commands} commands");
            disk.attach(&mut monitor).unwrap();
            assert_eq!(disk.parts(&mut monitor), ATTACHED, "after {commands} commands");
            false
        }
    });
    assert!(complete.unwrap() > 8, "{complete:?}");
}

#[test]
fn unused_fd_sets_are_removed() {
    let guest = Guest::booted(Image::Answering, 1);
    let disk = Disk::new(&guest, "a");
    let mut monitor = guest.monitor();
    let strange = monitor.add_fd(disk.file.as_fd(), "rdwr:other").unwrap();
    for _ in 0..2 {
        monitor.add_fd(disk.file.as_fd(), &disk.names.opaque()).unwrap();
    }
    assert_eq!(disk.parts(&mut monitor), (0, 0, 2));
    disk.attach(&mut monitor).unwrap();
    assert_eq!(disk.parts(&mut monitor), ATTACHED);
    disk.detach(&mut monitor).unwrap();
    let left = monitor.execute(&qmp::query_fdsets {}).unwrap();
    assert_eq!(left.iter().map(|set| set.fdset_id).collect::<Vec<_>>(), [strange]);
}

/// Starts a copy of the disk that runs until it is cancelled.
fn start_job(monitor: &mut Monitor, disk: &Disk, id: &str) {
    let target = format!("target-{id}");
    monitor
        .raw("blockdev-add", &json!({"driver": "null-co", "node-name": target, "size": 1 << 20}))
        .unwrap();
    let copy = json!({"job-id": id, "device": disk.names.node, "target": target, "sync": "none",
        "auto-dismiss": false});
    monitor.raw("blockdev-mirror", &copy).unwrap();
}

#[test]
fn detach_cancels_own_jobs_and_reports_others() {
    let guest = Guest::booted(Image::Answering, 1);
    let disk = Disk::new(&guest, "a");
    let mut monitor = guest.monitor();
    disk.attach(&mut monitor).unwrap();
    start_job(&mut monitor, &disk, &disk.names.job("snapshot"));
    disk.detach(&mut monitor).unwrap();
    assert_eq!(disk.parts(&mut monitor), ABSENT);
    assert!(monitor.execute(&QueryJobs {}).unwrap().is_empty());

    disk.attach(&mut monitor).unwrap();
    start_job(&mut monitor, &disk, "stranger");
    let error = detach(&mut monitor, &disk.names, short_deadline()).unwrap_err();
    assert!(
        matches!(&error, HotplugError::NodeInUse { jobs, .. } if *jobs == ["stranger"]),
        "{error}"
    );
    assert_eq!(disk.parts(&mut monitor), (0, 2, 1));
    monitor.execute(&qmp::job_cancel { id: "stranger".into() }).unwrap();
    // The cancelled job concludes and waits to be dismissed. That is enough to free the node.
    disk.detach(&mut monitor).unwrap();
    assert_eq!(disk.parts(&mut monitor), ABSENT);
}

#[test]
fn stopped_or_killed_qemu_is_an_error_by_the_deadline() {
    let guest = Guest::booted(Image::Answering, 1);
    let disk = Disk::new(&guest, "a");
    let mut monitor = guest.monitor();
    disk.attach(&mut monitor).unwrap();
    monitor.run(async |c| c.set_deadline(short_deadline()));
    guest.signal(Signal::SIGSTOP);
    let error = detach(&mut monitor, &disk.names, short_deadline()).unwrap_err();
    assert!(matches!(error, HotplugError::Monitor(MonitorError::Timeout { .. })), "{error}");
    drop(monitor);
    let error = Monitor::connect(&guest.socket(), short_deadline()).unwrap_err();
    assert!(matches!(error, MonitorError::Greeting { .. }), "{error}");

    guest.signal(Signal::SIGCONT);
    let mut monitor = guest.monitor();
    assert_eq!(disk.parts(&mut monitor), ATTACHED);
    guest.signal(Signal::SIGKILL);
    let error = disk.detach(&mut monitor).unwrap_err();
    assert!(matches!(error, HotplugError::Monitor(MonitorError::Closed)), "{error}");
}
