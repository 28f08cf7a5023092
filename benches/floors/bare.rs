//! The floor: QEMU with the command line of a VM, and as little as possible around it.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bosh_qemu_cpi::config::Qemu;
use bosh_qemu_cpi::host::io_uring;
use bosh_qemu_cpi::image;
use bosh_qemu_cpi::qemu::command_line::Tap;
use bosh_qemu_cpi::qemu::{
    FileSpec, InheritedFds, OpenedFile, Template, blockdev, command_line, files, topology,
};
use bosh_qemu_cpi::qmp::Event;
use bosh_qemu_cpi::qmp::monitor::Monitor;
use bosh_qemu_cpi::schema::Property;
use bosh_qemu_cpi::store::VmRecord;
use bosh_qemu_cpi::store::beneath;
use bosh_qemu_cpi::store::record::Format;
use bosh_qemu_cpi::sys::pidfd::Process;
use bosh_qemu_cpi::sys::tun::{self, Framing};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use serde_json::json;

use crate::lab::{self, Lab, Vm};

/// Longest time to wait for QEMU or its guest.
const GUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// The configuration's default.
const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// Time between two presses of the power button. A busy guest misses a press.
const PRESS_INTERVAL: Duration = Duration::from_millis(250);
const DISK: &str = "disk-floor";

/// A QEMU without supervisor and confinement, whose guest runs.
pub struct BareQemu {
    child: Child,
    monitor: Monitor,
    serial: UnixStream,
}

impl BareQemu {
    /// Creates an overlay with `qemu-img` and runs QEMU up to `cont`. The other images are those of
    /// `vm`, which is paused.
    pub fn create(lab: &Lab, vm: &Vm) -> Self {
        let root = lab.scratch("bare-root.qcow2");
        let record = lab.store.read::<VmRecord>(&vm.cid).expect("readable").expect("a record");
        let base = lab.store.base_image(&record).expect("a base");
        let base = base.to_str().expect("UTF-8");
        lab::run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, &root]);
        Self::start(lab, vm)
    }

    fn start(lab: &Lab, vm: &Vm) -> Self {
        let record = lab.store.read::<VmRecord>(&vm.cid).expect("readable").expect("a record");
        let template = Template::load(&record.machine.template, None).expect("a template");
        let files: Vec<_> =
            required(lab, vm, &record).into_iter().map(|spec| open(lab, spec)).collect();
        let taps: Vec<_> = record.nics.iter().map(|_| tap()).collect();
        let sockets = [vm_socket(lab, "qmp"), vm_socket(lab, "other"), vm_socket(lab, "serial")]
            .map(|path| {
                let _ = std::fs::remove_file(&path);
                UnixListener::bind(path).expect("a socket")
            });
        let fds = InheritedFds {
            files: files.iter().map(|(opened, fd)| (opened.clone(), fd.as_raw_fd())).collect(),
            taps: taps
                .iter()
                .map(|fd| Some(Tap { queues: vec![fd.as_raw_fd()], vhost: Vec::new(), mtu: 1500 }))
                .collect(),
            qmp: sockets[0].as_raw_fd(),
            key: None,
            supervisor_qmp: sockets[1].as_raw_fd(),
            serial: sockets[2].as_raw_fd(),
        };
        files.iter().map(|(_, fd)| fd).chain(&taps).for_each(inherit);
        sockets.iter().for_each(inherit);
        let mut command = Command::new(QEMU);
        command
            .args(command_line(&record, &template, &fds))
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let child = command.spawn().expect("start QEMU");
        let mut monitor = Monitor::connect(&vm_socket(lab, "qmp"), Instant::now() + GUEST_TIMEOUT)
            .expect("a monitor");
        let serial = UnixStream::connect(vm_socket(lab, "serial")).expect("the serial port");
        serial.set_read_timeout(Some(GUEST_TIMEOUT)).expect("a timeout");
        monitor.raw("cont", &json!({})).expect("cont");
        Self { child, monitor, serial }
    }

    /// Stops the guest's vCPUs.
    pub fn pause(&mut self) {
        self.monitor.raw("stop", &json!({})).expect("stop");
    }

    /// Continues the guest's vCPUs.
    pub fn resume(&mut self) {
        self.monitor.raw("cont", &json!({})).expect("cont");
    }

    /// Waits until the guest has printed `word`.
    pub fn wait_for(&mut self, word: &str) {
        let (mut output, mut buffer) = (String::new(), [0; 256]);
        while !output.contains(word) {
            let length = self.serial.read(&mut buffer).expect("the guest's word");
            assert_ne!(length, 0, "QEMU ended");
            output.push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
    }

    /// Attaches an empty image.
    pub fn attach(&mut self, lab: &Lab) {
        let path = PathBuf::from(lab.scratch("bare-disk.qcow2"));
        if !path.exists() {
            let size = bosh_qemu_cpi::units::Bytes(64 << 20);
            image::qcow2::create(&path, size, None)
                .and_then(image::UnsyncedFile::sync)
                .expect("an image");
        }
        let spec = FileSpec::image(DISK, path, Format::Qcow2, true);
        let (opened, file) = open(lab, spec);
        let fdset = self.monitor.add_fd(file.as_fd(), DISK).expect("add-fd");
        for node in blockdev::nodes(&opened, fdset) {
            self.monitor.raw("blockdev-add", &node).expect("blockdev-add");
        }
        let mut device = blockdev::device(&opened.spec, DISK);
        device["bus"] = topology::port_id(0).into();
        self.monitor.raw("device_add", &device).expect("device_add");
    }

    /// Detaches it: waits until the guest has released the disk and QEMU has closed it.
    pub fn detach(&mut self) {
        self.monitor.raw("device_del", &json!({"id": DISK})).expect("device_del");
        let deleted =
            |event: &Event| event.name == "DEVICE_DELETED" && event.data["device"] == DISK;
        let event = self.monitor.wait_event(deleted, Instant::now() + GUEST_TIMEOUT);
        event.expect("events").expect("the guest's answer");
        for node in [DISK.to_owned(), blockdev::file_node(DISK)] {
            self.monitor.raw("blockdev-del", &json!({"node-name": node})).expect("blockdev-del");
        }
    }

    /// Presses the power button until the guest powers off, then starts a new QEMU.
    pub fn reboot(&mut self, lab: &Lab, vm: &Vm) {
        let process = Process::open(self.child.id() as i32).expect("QEMU");
        while self.monitor.raw("system_powerdown", &json!({})).is_ok() {
            if process.wait_exit(Instant::now() + PRESS_INTERVAL).expect("a pidfd") {
                break;
            }
        }
        self.child.wait().expect("QEMU ends");
        *self = Self::start(lab, vm);
    }

    /// Kills QEMU with SIGKILL and waits for its exit.
    pub fn kill(self) {
        drop(self);
    }
}

impl Drop for BareQemu {
    fn drop(&mut self) {
        // kill fails if the guest has powered off before.
        let _ = self.child.kill();
        self.child.wait().expect("QEMU ends");
    }
}

fn vm_socket(lab: &Lab, name: &str) -> PathBuf {
    lab.store.run_dir().join(name)
}

/// The files of `vm`, with another root disk. QEMU locks images that it writes, so the ephemeral
/// disk is copied.
fn required(lab: &Lab, vm: &Vm, record: &VmRecord) -> Vec<FileSpec> {
    let mut specs = files::required(record, &vm.paths, &lab.store, &[]).expect("no pool");
    for spec in &mut specs {
        match spec.id.as_str() {
            files::ROOT => spec.path = lab.scratch("bare-root.qcow2").into(),
            files::EPHEMERAL => {
                let own = PathBuf::from(lab.scratch("bare-ephemeral.qcow2"));
                if !own.exists() {
                    std::fs::copy(&spec.path, &own).expect("copy the ephemeral disk");
                }
                spec.path = own;
            }
            _ => {}
        }
    }
    specs
}

fn open(lab: &Lab, spec: FileSpec) -> (OpenedFile, OwnedFd) {
    let qemu = Qemu::absent().expect("every key has a default");
    let io_uring = io_uring::is_usable(lab.store.run_dir(), &qemu);
    if spec.format.is_none() {
        let device = File::options().read(true).write(spec.writable).open(&spec.path);
        let fd = device.expect("open a device").into();
        return (OpenedFile { spec, direct: false, io_uring }, fd);
    }
    let file = beneath::file(&spec.path, spec.expected).expect("find an image");
    let (fd, direct) =
        image::open(&file, spec.writable, spec.cache.bypasses_page_cache()).expect("open an image");
    (OpenedFile { spec, direct, io_uring }, fd)
}

fn tap() -> OwnedFd {
    let device = File::options().read(true).write(true).open("/dev/net/tun").expect("/dev/net/tun");
    tun::create_tap(device.as_fd(), "floor0", Framing::Plain, false).expect("a tap");
    device.into()
}

fn inherit(fd: &impl AsFd) {
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).expect("F_SETFD");
}
