//! The floor: QEMU with the command line of a VM of ours, and as little as can be around it.

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
    FileNeed, Handles, Opened, Template, blockdev, command_line, files, topology,
};
use bosh_qemu_cpi::qmp::Event;
use bosh_qemu_cpi::qmp::monitor::Monitor;
use bosh_qemu_cpi::schema::Property;
use bosh_qemu_cpi::store::VmRecord;
use bosh_qemu_cpi::store::record::Format;
use bosh_qemu_cpi::sys::pidfd::Process;
use bosh_qemu_cpi::sys::tun;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use serde_json::json;

use crate::lab::{self, Lab, Ours};

const PATIENCE: Duration = Duration::from_secs(30);
/// Where the configuration has it by default.
const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// A press that the guest was too busy for is lost.
const AGAIN: Duration = Duration::from_millis(250);
const DISK: &str = "disk-floor";

/// A bare QEMU whose guest runs.
pub struct Bare {
    child: Child,
    monitor: Monitor,
    serial: UnixStream,
}

impl Bare {
    /// An overlay by `qemu-img`, QEMU until `cont`. Its other images are those of `vm`, which is paused.
    pub fn create(lab: &Lab, vm: &Ours) -> Self {
        let root = lab.scratch("bare-root.qcow2");
        let record = lab.store.read::<VmRecord>(&vm.cid).expect("readable").expect("a record");
        let base = lab.store.base_image(&record).expect("a base");
        let base = base.to_str().expect("UTF-8");
        lab::run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, &root]);
        Self::start(lab, vm)
    }

    fn start(lab: &Lab, vm: &Ours) -> Self {
        let record = lab.store.read::<VmRecord>(&vm.cid).expect("readable").expect("a record");
        let template = Template::load(&record.machine.template, None).expect("a template");
        let files: Vec<_> =
            needs(lab, vm, &record).into_iter().map(|need| open(lab, need)).collect();
        let taps: Vec<_> = record.nics.iter().map(|_| tap()).collect();
        let sockets = [vm_socket(lab, "qmp"), vm_socket(lab, "other"), vm_socket(lab, "serial")]
            .map(|path| {
                let _ = std::fs::remove_file(&path);
                UnixListener::bind(path).expect("a socket")
            });
        let handles = Handles {
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
            .args(command_line(&record, &template, &handles))
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let child = command.spawn().expect("start QEMU");
        let mut monitor =
            Monitor::connect(&vm_socket(lab, "qmp"), Instant::now() + PATIENCE).expect("a monitor");
        let serial = UnixStream::connect(vm_socket(lab, "serial")).expect("the serial port");
        serial.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        monitor.raw("cont", &json!({})).expect("cont");
        Self { child, monitor, serial }
    }

    /// Stops the guest's CPU.
    pub fn pause(&mut self) {
        self.monitor.raw("stop", &json!({})).expect("stop");
    }

    /// Goes on.
    pub fn resume(&mut self) {
        self.monitor.raw("cont", &json!({})).expect("cont");
    }

    /// Waits until the guest has said `word`.
    pub fn wait_for(&mut self, word: &str) {
        let (mut said, mut buffer) = (String::new(), [0; 256]);
        while !said.contains(word) {
            let length = self.serial.read(&mut buffer).expect("the guest's word");
            assert_ne!(length, 0, "QEMU ended");
            said.push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
    }

    /// Plugs an empty image in.
    pub fn attach(&mut self, lab: &Lab) {
        let path = PathBuf::from(lab.scratch("bare-disk.qcow2"));
        if !path.exists() {
            let size = bosh_qemu_cpi::units::Bytes(64 << 20);
            image::qcow2::create(&path, size, None).and_then(image::Fresh::sync).expect("an image");
        }
        let need = FileNeed::image(DISK, path, Format::Qcow2, true);
        let (opened, file) = open(lab, need);
        let fdset = self.monitor.add_fd(file.as_fd(), DISK).expect("add-fd");
        for node in blockdev::nodes(&opened, fdset) {
            self.monitor.raw("blockdev-add", &node).expect("blockdev-add");
        }
        let mut device = blockdev::device(&opened.need, DISK);
        device["bus"] = topology::port_id(0).into();
        self.monitor.raw("device_add", &device).expect("device_add");
    }

    /// Asks the guest to let go of it, until QEMU has closed it.
    pub fn detach(&mut self) {
        self.monitor.raw("device_del", &json!({"id": DISK})).expect("device_del");
        let deleted =
            |event: &Event| event.name == "DEVICE_DELETED" && event.data["device"] == DISK;
        let gone = self.monitor.wait_event(deleted, Instant::now() + PATIENCE);
        gone.expect("events").expect("the guest's answer");
        for node in [DISK.to_owned(), blockdev::file_node(DISK)] {
            self.monitor.raw("blockdev-del", &json!({"node-name": node})).expect("blockdev-del");
        }
    }

    /// The power button, pressed until the guest listens, and a new QEMU.
    pub fn reboot(&mut self, lab: &Lab, vm: &Ours) {
        let process = Process::open(self.child.id() as i32).expect("QEMU");
        while self.monitor.raw("system_powerdown", &json!({})).is_ok() {
            if process.wait_exit(Instant::now() + AGAIN).expect("a pidfd") {
                break;
            }
        }
        self.child.wait().expect("QEMU ends");
        *self = Self::start(lab, vm);
    }

    /// SIGKILL, and the wait for its end.
    pub fn kill(self) {
        drop(self);
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        // It has ended already if the guest powered off.
        let _ = self.child.kill();
        self.child.wait().expect("QEMU ends");
    }
}

fn vm_socket(lab: &Lab, name: &str) -> PathBuf {
    lab.store.run_dir().join(name)
}

/// The files of `vm`, with a root disk of its own. QEMU locks images that it writes, so the ephemeral disk is copied.
fn needs(lab: &Lab, vm: &Ours, record: &VmRecord) -> Vec<FileNeed> {
    let mut needs = files::needs(record, &vm.paths, &lab.store, &[]).expect("no pool");
    for need in &mut needs {
        match need.id.as_str() {
            files::ROOT => need.path = lab.scratch("bare-root.qcow2").into(),
            files::EPHEMERAL => {
                let own = PathBuf::from(lab.scratch("bare-ephemeral.qcow2"));
                if !own.exists() {
                    std::fs::copy(&need.path, &own).expect("copy the ephemeral disk");
                }
                need.path = own;
            }
            _ => {}
        }
    }
    needs
}

fn open(lab: &Lab, need: FileNeed) -> (Opened, OwnedFd) {
    let qemu = Qemu::absent().expect("every key has a default");
    let io_uring = io_uring::works(lab.store.run_dir(), &qemu);
    let (fd, direct) = image::open(&need.path, need.writable, need.cache.bypasses_page_cache())
        .expect("open an image");
    (Opened { need, direct, io_uring }, fd)
}

fn tap() -> OwnedFd {
    let device = File::options().read(true).write(true).open("/dev/net/tun").expect("/dev/net/tun");
    tun::create_tap(device.as_fd(), "floor0", false).expect("a tap");
    device.into()
}

fn inherit(fd: &impl AsFd) {
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).expect("F_SETFD");
}
