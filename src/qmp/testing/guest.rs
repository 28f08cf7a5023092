//! A real QEMU under TCG with the 512-byte guest of `guests/acpi-bootsector.S`.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::{TEST_TIMEOUT, test_deadline};
use crate::qmp::{Monitor, power};

/// The guest's boot sector.
#[derive(Clone, Copy)]
pub enum Image {
    /// Releases devices when asked, and obeys the power button.
    Answering,
    /// Ignores unplug requests and the power button.
    Mute,
}

/// A QEMU, killed on drop. It has root ports `hotplug0`, … up to the number given.
pub struct Guest {
    child: Child,
    console: BufReader<UnixStream>,
    dir: TempDir,
}

impl Guest {
    /// Starts QEMU; the guest waits in prelaunch. Panics if QEMU is missing, rather than skipping
    /// the test.
    pub fn new(image: Image, ports: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let sector: &[u8; 512] = match image {
            Image::Answering => include_bytes!("../../../guests/acpi-bootsector.bin"),
            Image::Mute => include_bytes!("../../../guests/acpi-bootsector-mute.bin"),
        };
        let boot = dir.path().join("boot.raw");
        std::fs::write(&boot, sector).unwrap();
        // SeaBIOS does not boot from a disk of less than one cylinder, 504 KiB.
        OpenOptions::new().write(true).open(&boot).unwrap().set_len(1 << 20).unwrap();
        // The socket exists before QEMU starts, so no test has to wait for it.
        let listener = UnixListener::bind(dir.path().join("qmp.sock")).unwrap();
        let (console, theirs) = UnixStream::pair().unwrap();
        console.set_read_timeout(Some(TEST_TIMEOUT)).unwrap();

        let mut command = Command::new("/usr/bin/qemu-system-x86_64");
        command.args(
            "-nodefaults -no-user-config -display none -machine q35,usb=off -accel tcg -m 32 -S"
                .split(' '),
        );
        command.args(
            "-chardev socket,id=qmp,fd=0,server=on,wait=off -mon chardev=qmp,mode=control"
                .split(' '),
        );
        command.args("-chardev socket,id=console,fd=1 -serial chardev:console".split(' '));
        command.args([
            "-blockdev",
            &format!("driver=file,node-name=boot,read-only=on,filename={}", boot.display()),
        ]);
        command.args(["-device", "virtio-blk-pci,drive=boot,bootindex=1,addr=0x3"]);
        for port in 0..ports {
            let place = format!("addr=0x4.{port:#x},multifunction=on");
            command.args([
                "-device",
                &format!("pcie-root-port,id=hotplug{port},chassis={},{place}", port + 1),
            ]);
        }
        command
            .stdin(OwnedFd::from(listener))
            .stdout(OwnedFd::from(theirs))
            .stderr(Stdio::inherit());
        let child = command.spawn().expect("start /usr/bin/qemu-system-x86_64");
        Self { child, console: BufReader::new(console), dir }
    }

    /// Like [`Self::new`], with the guest running.
    pub fn booted(image: Image, ports: usize) -> Self {
        let mut guest = Self::new(image, ports);
        guest.monitor().run(async |c| power::cont(c).await).unwrap();
        guest.wait_for("BOOTSECTOR-OK");
        guest
    }

    /// Opens a new connection to the monitor.
    pub fn monitor(&self) -> Monitor {
        Monitor::connect(&self.socket(), test_deadline()).unwrap()
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("qmp.sock")
    }

    /// A path in the guest's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Reads the console up to the line `text`.
    pub fn wait_for(&mut self, text: &str) {
        let mut line = String::new();
        while line.trim_end() != text {
            line.clear();
            assert!(
                self.console.read_line(&mut line).unwrap() > 0,
                "the console closed before '{text}'"
            );
        }
    }

    /// Types one byte on the console.
    pub fn type_byte(&mut self, byte: u8) {
        self.console.get_mut().write_all(&[byte]).unwrap();
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    /// Waits until QEMU has exited and returns its exit code.
    pub fn wait(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // SIGKILL also ends a stopped QEMU. Both calls fail only if a test has waited for its exit.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
