//! The same guest and disk through libvirt, if it is installed: an operator would call `virsh`.

use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use bosh_qemu_cpi::host::tail;
use bosh_qemu_cpi::image;
use bosh_qemu_cpi::units::Bytes;

use crate::lab::{GUEST, Lab};

/// Longest time to wait for output of the guest.
const GUEST_TIMEOUT: Duration = Duration::from_secs(30);
const DOMAIN: &str = "bosh-qemu-cpi-floor";

/// A libvirt domain whose guest runs. Drop destroys it.
pub struct Libvirt {
    console: PathBuf,
    disk: String,
    seen: usize,
}

impl Libvirt {
    /// Starts the domain.
    ///
    /// # Errors
    /// Why libvirt cannot be used.
    pub fn start(lab: &Lab) -> Result<Self, String> {
        let version =
            Command::new("virsh").args(["--connect", "qemu:///system", "version"]).output();
        match version {
            Err(error) => return Err(format!("no virsh: {error}")),
            Ok(output) if !output.status.success() => {
                return Err(format!("virsh cannot connect to libvirt: {}", stderr(&output)));
            }
            Ok(_) => {}
        }
        let (root, disk, xml) = (
            lab.scratch("libvirt-root.img"),
            lab.scratch("libvirt.qcow2"),
            lab.scratch("domain.xml"),
        );
        let console = PathBuf::from(lab.scratch("libvirt-console.log"));
        let mut guest = vec![0; 1 << 20];
        guest[..GUEST.len()].copy_from_slice(GUEST);
        std::fs::write(&root, guest).expect("write the guest");
        image::qcow2::create(disk.as_ref(), Bytes(64 << 20), None)
            .and_then(image::UnsyncedFile::sync)
            .expect("an image");
        std::fs::write(&xml, domain(&root, &console.to_string_lossy())).expect("write the domain");
        let made = virsh(&["create", &xml]);
        if !made.status.success() {
            return Err(format!("libvirt cannot start the domain: {}", stderr(&made)));
        }
        let domain = Self { console, disk, seen: 0 };
        domain.wait_for("BOOTSECTOR-OK", 1);
        domain.pause();
        Ok(domain)
    }

    /// Attaches the disk and waits for the guest's output.
    pub fn attach(&mut self) {
        let words = [
            "--targetbus",
            "virtio",
            "--driver",
            "qemu",
            "--subdriver",
            "qcow2",
            "--cache",
            "none",
            "--live",
        ];
        self.change(&[&["attach-disk", DOMAIN, &self.disk, "vdb"], &words[..]].concat());
        self.seen += 1;
        self.wait_for("\nU", self.seen);
    }

    /// Detaches the disk. libvirt returns before or after the guest has released it, so this waits
    /// for the guest's output.
    pub fn detach(&self) {
        self.change(&["detach-disk", DOMAIN, "vdb", "--live"]);
        self.wait_for("\nD", self.seen);
    }

    /// Stops the guest's vCPUs.
    pub fn pause(&self) {
        self.change(&["suspend", DOMAIN]);
    }

    /// Continues the guest's vCPUs.
    pub fn resume(&self) {
        self.change(&["resume", DOMAIN]);
    }

    fn change(&self, words: &[&str]) {
        let output = virsh(words);
        assert!(output.status.success(), "virsh {words:?}: {}", stderr(&output));
    }

    fn wait_for(&self, word: &str, times: usize) {
        tail::wait_for(&self.console, word, times, Instant::now() + GUEST_TIMEOUT)
            .expect("the guest's word");
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        virsh(&["destroy", DOMAIN]);
    }
}

fn virsh(words: &[&str]) -> Output {
    let mut command = Command::new("virsh");
    command
        .args(["--connect", "qemu:///system", "--quiet"])
        .args(words)
        .output()
        .expect("run virsh")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).trim().to_owned()
}

/// XML of an emulated domain, like the benchmark's VMs, with one free port for a disk.
fn domain(root: &str, console: &str) -> String {
    format!(
        "<domain type='qemu'><name>{DOMAIN}</name><memory unit='MiB'>256</memory><vcpu>1</vcpu>
         <os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features>
         <seclabel type='none' model='none'/>
         <devices>
           <emulator>/usr/bin/qemu-system-x86_64</emulator>
           <controller type='pci' model='pcie-root'/>
           <controller type='pci' model='pcie-root-port'/>
           <controller type='pci' model='pcie-root-port'/>
           <controller type='pci' model='pcie-root-port'/>
           <controller type='pci' model='pcie-root-port'/>
           <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{root}'/>
             <target dev='vda' bus='virtio'/></disk>
           <serial type='file'><source path='{console}'/></serial>
           <memballoon model='none'/>
         </devices></domain>"
    )
}
