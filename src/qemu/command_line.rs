//! QEMU's command line for a VM. Every option is valid from QEMU 7.2 to 10; none contains a secret.

use std::net::Ipv4Addr;
use std::os::fd::RawFd;

use serde_json::{Value, json};

use super::files::{BASE, CONFIG_DRIVE, EPHEMERAL, KVM, OpenedFile, ROOT};
use super::{blockdev, topology};
use crate::cid::Cid;
use crate::qemu::Template;
use crate::store::nic_rules::Forward;
use crate::store::record::{Accel, Nic, UserNetwork, VmRecord, Wire};

/// The file descriptors that QEMU inherits.
#[derive(Debug)]
pub struct InheritedFds {
    /// Files in the order of [`super::files::required`]. Each becomes an fd set: 1, 2, ….
    pub files: Vec<(OpenedFile, RawFd)>,
    /// A pipe that contains the key of encrypted images, if a file is encrypted.
    pub key: Option<RawFd>,
    /// One for each NIC; `None` for a NIC without a tap.
    pub taps: Vec<Option<Tap>>,
    /// Listening socket of the monitor for CPI calls.
    pub qmp: RawFd,
    /// Listening socket of the supervisor's monitor.
    pub supervisor_qmp: RawFd,
    /// Listening socket of the serial port.
    pub serial: RawFd,
}

/// A tap attached to its bridge.
#[derive(Debug, Clone)]
pub struct Tap {
    /// File descriptors of the tap, one for each queue. They keep it alive.
    pub queues: Vec<RawFd>,
    /// File descriptors of `/dev/vhost-net`, one for each queue; empty without vhost.
    pub vhost: Vec<RawFd>,
    /// MTU of the network, bytes.
    pub mtu: u32,
}

impl InheritedFds {
    /// The fd set of the file `id`.
    fn fdset(&self, id: &str) -> Option<usize> {
        self.files.iter().position(|(opened, _)| opened.spec.id == id).map(|at| at + 1)
    }
}

/// QEMU's arguments for `vm`. QEMU starts stopped (`-S`): until `cont`, killing it undoes
/// everything.
pub fn command_line(vm: &VmRecord, template: &Template, fds: &InheritedFds) -> Vec<String> {
    let mut line = Line(Vec::new());
    identity(&mut line, vm);
    machine(&mut line, vm, template, fds);
    monitors(&mut line, fds);
    disks(&mut line, vm, fds);
    for (index, (nic, tap)) in vm.nics.iter().zip(&fds.taps).enumerate() {
        network(&mut line, index, nic, tap.as_ref());
    }
    if template.rng {
        line.json("-object", &json!({"qom-type": "rng-builtin", "id": "rng0"}));
        line.device(&json!({"driver": "virtio-rng-pci", "rng": "rng0"}), "pcie.0", topology::RNG);
    }
    if template.panic_device {
        line.device(&json!({"driver": "pvpanic-pci"}), "pcie.0", topology::PANIC);
    }
    for words in &template.extra_arguments {
        line.0.extend(words.iter().cloned());
    }
    // A panic of the guest's kernel ends QEMU with a distinct status; a reboot of the guest keeps
    // the process.
    line.option("-action", "reboot=reset,shutdown=poweroff,panic=exit-failure,watchdog=reset");
    line.option(
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    );
    line.flag("-S");
    line.0
}

/// MTU of plain Ethernet, bytes.
const ETHERNET_MTU: u32 = 1500;

struct Line(Vec<String>);

impl Line {
    fn flag(&mut self, name: &str) {
        self.0.push(name.to_owned());
    }

    fn option(&mut self, name: &str, value: impl Into<String>) {
        self.0.extend([name.to_owned(), value.into()]);
    }

    fn json(&mut self, name: &str, value: &Value) {
        self.option(name, value.to_string());
    }

    fn device(&mut self, device: &Value, bus: &str, slot: u32) {
        let mut device = device.clone();
        device["bus"] = bus.into();
        device["addr"] = format!("{slot:#x}").into();
        self.json("-device", &device);
    }
}

/// Escapes a value of a `key=value,…` option: a single comma ends it, two commas stand for one.
fn escaped(value: &str) -> String {
    value.replace(',', ",,")
}

fn identity(line: &mut Line, vm: &VmRecord) {
    let cid = escaped(vm.cid.as_str());
    line.option("-name", format!("guest={cid},process=qemu-{cid},debug-threads=on"));
    line.option("-uuid", &vm.machine.uuid);
    for flag in ["-no-user-config", "-nodefaults"] {
        line.flag(flag);
    }
    line.option("-display", "none");
    line.option("-msg", "timestamp=on");
    line.option(
        "-smbios",
        format!("type=1,manufacturer=bosh-qemu-cpi,product=BOSH VM,serial={cid}"),
    );
}

fn machine(line: &mut Line, vm: &VmRecord, template: &Template, fds: &InheritedFds) {
    let machine = &vm.machine;
    let options = std::iter::once(&template.machine).chain(&template.machine_options);
    line.option("-machine", options.cloned().collect::<Vec<_>>().join(","));
    line.option(
        "-accel",
        match (machine.accel, fds.fdset(KVM)) {
            (Accel::Kvm, Some(fdset)) => format!("kvm,device=/dev/fdset/{fdset}"),
            (accel, _) => accel.as_str().to_owned(),
        },
    );
    line.option("-cpu", &machine.cpu_model);
    line.option("-smp", format!("cpus={0},sockets=1,cores={0},threads=1", machine.cpus));
    line.option("-m", format!("size={}M", machine.ram.get()));
    line.option("-rtc", "base=utc,driftfix=slew");
    line.option("-boot", "strict=on");
    for global in &template.globals {
        line.option("-global", global);
    }
}

fn monitors(line: &mut Line, fds: &InheritedFds) {
    let sockets = [("qmp0", fds.qmp), ("qmp1", fds.supervisor_qmp), ("serial0", fds.serial)];
    for (id, fd) in sockets {
        line.option("-chardev", format!("socket,id={id},fd={fd},server=on,wait=off"));
    }
    line.option("-mon", "chardev=qmp0,mode=control");
    line.option("-mon", "chardev=qmp1,mode=control");
    line.option("-serial", "chardev:serial0");
}

fn disks(line: &mut Line, vm: &VmRecord, fds: &InheritedFds) {
    line.json("-object", &json!({"qom-type": "iothread", "id": blockdev::IOTHREAD}));
    if let Some(key) = fds.key {
        let file = format!("/proc/self/fd/{key}");
        line.json("-object", &json!({"qom-type": "secret", "id": blockdev::SECRET, "file": file}));
    }
    for (index, (opened, fd)) in fds.files.iter().enumerate() {
        let (spec, fdset) = (&opened.spec, index + 1);
        line.option(
            "-add-fd",
            format!("fd={fd},set={fdset},opaque={}", blockdev::opaque(&spec.node, spec.writable)),
        );
        if spec.format.is_some() {
            for node in blockdev::nodes(opened, fdset as i64) {
                line.json("-blockdev", &node);
            }
        }
    }
    for index in 0..vm.machine.hotplug_slots {
        line.json("-device", &port(index));
    }
    // Persistent disks are behind ports, like hot-plugged disks, so that they can be unplugged.
    let mut ports = 0..;
    for (opened, _) in &fds.files {
        let spec = &opened.spec;
        match (spec.id.as_str(), &vm.ephemeral) {
            (BASE | KVM, _) => {}
            (ROOT, _) => {
                let mut root = blockdev::device(spec, "root");
                root["bootindex"] = 1.into();
                line.device(&root, "pcie.0", topology::ROOT);
            }
            (EPHEMERAL, Some(ephemeral)) => {
                line.device(
                    &blockdev::device(spec, &ephemeral.serial),
                    "pcie.0",
                    topology::EPHEMERAL,
                );
            }
            (CONFIG_DRIVE, _) => {
                line.device(&blockdev::device(spec, "config"), "pcie.0", topology::CONFIG_DRIVE);
            }
            (id, _) => {
                let port = ports.next().expect("endless");
                line.device(&blockdev::device(spec, id), &topology::port_id(port), 0);
            }
        }
    }
}

fn port(index: u32) -> Value {
    json!({
        "driver": "pcie-root-port", "id": topology::port_id(index), "bus": "pcie.0",
        "addr": topology::port_address(index), "multifunction": true, "chassis": index + 1,
        "slot": index + 1,
    })
}

fn network(line: &mut Line, index: usize, nic: &Nic, tap: Option<&Tap>) {
    let id = format!("nic{index}");
    let mut netdev = match (&nic.wire, tap) {
        (Wire::User { user }, _) => user_netdev(nic, user),
        (Wire::Tap { .. }, Some(tap)) => tap_netdev(tap),
        (Wire::Tap { .. }, None) => unreachable!("a NIC on a bridge has a tap"),
    };
    netdev["id"] = id.as_str().into();
    line.json("-netdev", &netdev);
    let mut device = json!({
        "driver": "virtio-net-pci", "id": format!("{id}-device"), "netdev": id, "mac": nic.mac,
        // No network boot: with an empty name QEMU does not look for a ROM file, which it may not
        // open.
        "romfile": "",
    });
    if let Some(tap) = tap {
        if tap.mtu != ETHERNET_MTU {
            // 1500 is every guest's default.
            device["host_mtu"] = tap.mtu.into();
        }
        if tap.queues.len() > 1 {
            device["mq"] = true.into();
            // QEMU needs one interrupt for each direction of each queue, one for the configuration
            // and one for control (hw/virtio/virtio-net-pci.c).
            device["vectors"] = (2 * tap.queues.len() + 2).into();
        }
    }
    line.device(&device, "pcie.0", topology::nic(index));
}

fn tap_netdev(tap: &Tap) -> Value {
    let list = |fds: &[RawFd]| fds.iter().map(ToString::to_string).collect::<Vec<_>>().join(":");
    let several = if tap.queues.len() > 1 { "s" } else { "" };
    let mut netdev = json!({"type": "tap"});
    netdev[format!("fd{several}")] = list(&tap.queues).into();
    if !tap.vhost.is_empty() {
        netdev["vhost"] = true.into();
        netdev[format!("vhostfd{several}")] = list(&tap.vhost).into();
    }
    netdev
}

fn user_netdev(nic: &Nic, user: &UserNetwork) -> Value {
    let forwards = nic.rules.iter().flat_map(|rules| &rules.forwards).flat_map(host_forwards);
    let forwards: Vec<_> = forwards.map(|text| json!({"str": text})).collect();
    let subnet = user.gateway;
    // QEMU's default is the subnet's third address, which may be the guest's or the gateway's.
    let free = |ip: &Ipv4Addr| *ip != subnet.ip() && *ip != user.guest;
    let dns = (1..=3)
        .map(|n| Ipv4Addr::from(u32::from(subnet.broadcast()) - n))
        .find(free)
        .expect("at most two of three addresses are in use");
    json!({
        "type": "user", "ipv4": true, "ipv6": false,
        "net": format!("{}/{}", subnet.network(), subnet.prefix()),
        "host": subnet.ip(), "dns": dns, "dhcpstart": user.guest, "hostfwd": forwards,
    })
}

/// A port forward as QEMU's `hostfwd` values, one for each port.
fn host_forwards(forward: &Forward) -> impl Iterator<Item = String> {
    let protocol = if forward.protocol == UDP { "udp" } else { "tcp" };
    let from = forward.address.map_or_else(String::new, |ip| ip.to_string());
    let to = forward.to;
    let ports = (0..forward.count)
        .map(|n| (forward.host.saturating_add(n), forward.guest.saturating_add(n)));
    ports.map(move |(host, guest)| format!("{protocol}:{from}:{host}-{to}:{guest}"))
}

/// Protocol number of UDP (IANA).
const UDP: u8 = 17;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::nic_rules::NicRules;

    fn tap(queues: &[RawFd], vhost: &[RawFd], mtu: u32) -> Tap {
        Tap { queues: queues.to_vec(), vhost: vhost.to_vec(), mtu }
    }

    fn options(wire: &Value, rules: Option<NicRules>, tap: Option<&Tap>) -> String {
        let mut nic = json!({"network": "lan", "mac": "02:00:00:00:00:01"});
        nic.as_object_mut().unwrap().extend(wire.as_object().unwrap().clone());
        let nic = Nic { rules, ..serde_json::from_value(nic).unwrap() };
        let mut line = Line(Vec::new());
        network(&mut line, 0, &nic, tap);
        line.0.join("\n")
    }

    #[test]
    fn queues_and_vhost_are_passed_as_descriptors() {
        let segment = json!({"network": "lan", "bridge": "br0", "keeper": "operator"});
        let wire = json!({"tap": "bqtapn0", "segment": segment});
        let on = |tap: Tap| options(&wire, None, Some(&tap));
        let lines = [
            on(tap(&[7], &[], 1500)),
            on(tap(&[7], &[8], 9000)),
            on(tap(&[7, 8], &[], 1500)),
            on(tap(&[7, 8], &[9, 10], 1500)),
        ];
        insta::assert_snapshot!(lines.join("\n--\n"), @r#"
        -netdev
        {"fd":"7","id":"nic0","type":"tap"}
        -device
        {"addr":"0x6","bus":"pcie.0","driver":"virtio-net-pci","id":"nic0-device","mac":"02:00:00:00:00:01","netdev":"nic0","romfile":""}
        --
        -netdev
        {"fd":"7","id":"nic0","type":"tap","vhost":true,"vhostfd":"8"}
        -device
        {"addr":"0x6","bus":"pcie.0","driver":"virtio-net-pci","host_mtu":9000,"id":"nic0-device","mac":"02:00:00:00:00:01","netdev":"nic0","romfile":""}
        --
        -netdev
        {"fds":"7:8","id":"nic0","type":"tap"}
        -device
        {"addr":"0x6","bus":"pcie.0","driver":"virtio-net-pci","id":"nic0-device","mac":"02:00:00:00:00:01","mq":true,"netdev":"nic0","romfile":"","vectors":6}
        --
        -netdev
        {"fds":"7:8","id":"nic0","type":"tap","vhost":true,"vhostfds":"9:10"}
        -device
        {"addr":"0x6","bus":"pcie.0","driver":"virtio-net-pci","id":"nic0-device","mac":"02:00:00:00:00:01","mq":true,"netdev":"nic0","romfile":"","vectors":6}
        "#);
    }

    #[test]
    fn user_networking_forwards_ports() {
        let forward = |forward: Value| serde_json::from_value::<Forward>(forward).unwrap();
        let rules = |forwards| Some(NicRules { forwards, ..NicRules::default() });
        let v4 =
            json!({"user": {"network": "lab", "gateway": "10.0.2.1/24", "guest": "10.0.2.15"}});
        let tcp =
            forward(json!({"protocol": 6, "address": "127.0.0.1", "host": 6868, "to": "10.0.2.15",
                "guest": 22, "count": 2}));
        let udp = forward(
            json!({"protocol": 17, "host": 53, "to": "10.0.2.15", "guest": 53, "count": 1}),
        );
        insta::assert_snapshot!(options(&v4, rules(vec![tcp, udp]), None), @r#"
        -netdev
        {"dhcpstart":"10.0.2.15","dns":"10.0.2.254","host":"10.0.2.1","hostfwd":[{"str":"tcp:127.0.0.1:6868-10.0.2.15:22"},{"str":"tcp:127.0.0.1:6869-10.0.2.15:23"},{"str":"udp::53-10.0.2.15:53"}],"id":"nic0","ipv4":true,"ipv6":false,"net":"10.0.2.0/24","type":"user"}
        -device
        {"addr":"0x6","bus":"pcie.0","driver":"virtio-net-pci","id":"nic0-device","mac":"02:00:00:00:00:01","netdev":"nic0","romfile":""}
        "#);
    }
}
