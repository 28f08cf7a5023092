//! Replay of recorded flows with Linux guests, which act as their agents would between the calls.
//! Data on the disks must survive.

use std::collections::BTreeMap;

use bosh_qemu_cpi::cid::{DiskCid, VmCid};
use serde_json::{Value, json};

use super::guest::Guest;
use crate::contract::recorded_flows::{self, Flow};
use crate::support::host::{Host, text, vm_cid};

/// Memory of a guest, MiB.
const RAM: u64 = 256;
/// Size of the disk that a flow creates or grows, MiB, as recorded.
const SIZE: u64 = 2048;

/// Agents of a flow's VMs.
struct Agents<'a> {
    host: &'a Host,
    guests: BTreeMap<VmCid, Guest<'a>>,
    /// Attached disks in order, with their VM and whether the flow created them.
    attached: Vec<(DiskCid, VmCid, bool)>,
    made: Vec<DiskCid>,
    /// Whether the Director shuts a VM down after it has detached the disk.
    is_hot_swap: bool,
}

impl<'a> Agents<'a> {
    fn of(host: &'a Host, guest: Guest<'a>) -> Self {
        let guests = BTreeMap::from([(guest.vm.clone(), guest)]);
        Self { host, guests, attached: Vec::new(), made: Vec::new(), is_hot_swap: false }
    }

    fn guest(&self, vm: &Value) -> &Guest<'a> {
        &self.guests[&text(vm).parse().unwrap()]
    }

    /// Returns the guest that the flow created.
    fn new_one(&mut self, old: &VmCid) -> Guest<'a> {
        self.guests.remove(old);
        self.guests.pop_first().expect("a new VM").1
    }

    /// The agent's mount_disk, which grows the filesystem to the disk's size, and migrate_disk.
    fn mount(&self, disk: &DiskCid) {
        let (_, vm, is_new) =
            self.attached.iter().find(|(attached, ..)| attached == disk).expect("attached before");
        let guest = &self.guests[vm];
        if !is_new {
            guest.grow(disk);
            return;
        }
        guest.disk(disk, "format");
        let (old, ..) = self
            .attached
            .iter()
            .find(|(old, its, _)| its == vm && old != disk)
            .expect("two at once");
        assert_eq!(self.host.ok("get_disks", &json!([vm])), json!([old, disk]));
        guest.disk(old, &format!("migrate?text={disk}"));
    }
}

impl recorded_flows::Agents for Agents<'_> {
    fn before(&mut self, method: &str, arguments: &Value) {
        let unmount = |vm: &Value, disk: &Value| {
            self.guest(vm).disk(&text(disk).parse().unwrap(), "unmount");
        };
        match method {
            "detach_disk" => unmount(&arguments[0], &arguments[1]),
            "delete_vm" => {
                let disks = self.host.ok("get_disks", arguments);
                disks.as_array().unwrap().iter().for_each(|disk| unmount(&arguments[0], disk));
            }
            _ => {}
        }
    }

    fn after(&mut self, method: &str, arguments: &Value, result: &Value) {
        match method {
            "create_vm" => {
                let networks = arguments[3].as_object().unwrap();
                let address = networks.values().next().unwrap()["ip"].as_str().unwrap();
                let vm = vm_cid(result);
                self.guests.insert(vm.clone(), Guest::new(self.host, vm, address));
            }
            // The Director pings the agent next.
            "set_vm_metadata" => {
                self.guests
                    .get_mut(&text(&arguments[0]).parse().unwrap())
                    .expect("a guest")
                    .booted();
            }
            "create_disk" => self.made.push(text(result).parse().unwrap()),
            "attach_disk" => {
                let [vm, disk] = [0, 1].map(|at| text(&arguments[at]));
                let disk: DiskCid = disk.parse().unwrap();
                let is_new = self.made.contains(&disk);
                self.attached.push((disk, vm.parse().unwrap(), is_new));
            }
            "set_disk_metadata" => self.mount(&text(&arguments[0]).parse().unwrap()),
            "detach_disk" if self.is_hot_swap => self.guest(&arguments[0]).power_off(),
            _ => {}
        }
    }
}

/// Asserts that the filesystem has the new size of the disk, except for its metadata.
fn assert_has_grown(guest: &Guest<'_>, disk: &DiskCid) {
    let filesystem = guest.grow(disk);
    assert!((SIZE * 9 / 10..=SIZE).contains(&filesystem), "{filesystem} MiB");
}

/// bosh-cli replaces `disk` by a larger one: it recreates the VM, and the agent copies the data.
/// Returns the new guest and the new disk.
pub fn bigger_disk<'a>(
    host: &'a Host,
    stemcell: &str,
    guest: Guest<'a>,
    disk: &DiskCid,
) -> (Guest<'a>, DiskCid) {
    host.bridge("br0");
    for address in ["10.244.0.1", "10.245.0.1"] {
        host.namespace().ip(&format!("address add {address}/24 dev br0"));
    }
    let (old, written) = (guest.vm.clone(), guest.disk(disk, "read"));
    let mut agents = Agents::of(host, guest);
    let ask = |request: &str| host.ask(request);
    let flow = Flow::new(host, &ask, RAM)
        .knows("sc-0005", &stemcell)
        .knows("vm-0006", &old)
        .knows("disk-0003", disk);
    flow.replay("create-env-bigger-disk", &mut agents);
    let (new, larger) = (agents.new_one(&old), agents.made.pop().expect("a new disk"));
    assert_eq!(host.ok("has_disk", &json!([disk])), false);
    assert_eq!(host.ok("get_disks", &json!([new.vm])), json!([larger]));
    assert_eq!(new.disk(&larger, "read"), written);
    assert_has_grown(&new, &larger);
    (new, larger)
}

/// The Director grows a disk whose content is its own cid. The disk was written on another VM and
/// is attached to this one first.
pub fn resize<'a>(host: &'a Host, guest: Guest<'a>, disk: &DiskCid) -> Guest<'a> {
    host.ok("attach_disk", &json!([guest.vm, disk]));
    assert_eq!(guest.disk(disk, "read"), disk.to_string(), "on another VM");
    let vm = guest.vm.clone();
    let mut agents = Agents::of(host, guest);
    let ask = |request: &str| host.ask(request);
    let flow = Flow::new(host, &ask, RAM).knows("vm-0003", &vm).knows("disk-0004", disk);
    flow.replay("director-resize", &mut agents);
    let guest = agents.guests.remove(&vm).expect("the guest");
    assert_has_grown(&guest, disk);
    assert_eq!(guest.disk(disk, "read"), disk.to_string());
    guest
}

/// The Director creates a new VM before it deletes the old one. The old guest powers itself off
/// before the disk is attached to the new VM.
pub fn hot_swap<'a>(host: &'a Host, stemcell: &str, guest: Guest<'a>, disk: &DiskCid) {
    let (old, written) = (guest.vm.clone(), guest.disk(disk, "read"));
    let mut agents = Agents { is_hot_swap: true, ..Agents::of(host, guest) };
    let ask = |request: &str| host.ask(request);
    let flow = Flow::new(host, &ask, RAM)
        .knows("sc-0001", &stemcell)
        .knows("vm-0022", &old)
        .knows("disk-0018", disk);
    flow.replay("director-hotswap", &mut agents);
    assert_eq!(host.ok("has_vm", &json!([old])), true);
    let new = agents.new_one(&old);
    assert_eq!(host.ok("get_disks", &json!([new.vm])), json!([disk]));
    assert_eq!(new.disk(disk, "read"), written);
}
