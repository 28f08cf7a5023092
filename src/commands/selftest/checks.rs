//! The checks, in the order of a VM's life.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::value::RawValue;
use serde_json::{Map, json};

use super::{Lab, Report};
use crate::cid::{DiskCid, StemcellCid, VmCid};
use crate::config::Hardening;
use crate::cpi::Cpi;
use crate::cpi::context::Context;
use crate::cpi::contract::networks::Networks;
use crate::cpi::contract::{AgentId, Contract, CreateDisk, CreateStemcell, CreateVm, Env};
use crate::error::{Error, ErrorKind, Result};
use crate::host::{probe, tail};
use crate::image::qemu_img::{NewImage, QemuImg};
use crate::qmp::monitor::Monitor;
use crate::qmp::power;
use crate::schema::Redacted;
use crate::store::record::{Format, Nic, Preallocation};
use crate::store::{Store, VmRecord};
use crate::supervisor::{PowerState, power_state};
use crate::units::{Bytes, MiB};

/// How long the guest may take for one step. It boots in 0.3 s emulated and, at worst, in seconds
/// under nested KVM.
const GUEST_STEP_TIMEOUT: Duration = Duration::from_secs(30);
/// How long `qemu-img` may take for an empty image.
const QEMU_IMG_TIMEOUT: Duration = Duration::from_secs(30);

/// Runs the checks up to the first that fails, and then always the clean-up. Returns true if all
/// pass.
pub(super) fn all(lab: &Lab, report: &mut Report<'_>) -> bool {
    let mut checks = Checks { lab, vm: None, disk: None, stemcell: None };
    let passed = checks.run(report).is_some();
    let cleaned = report.check("clean-up", || checks.clean_up()).is_some();
    passed && cleaned
}

/// The checks and the objects that earlier ones created.
struct Checks<'a> {
    lab: &'a Lab,
    vm: Option<VmCid>,
    disk: Option<DiskCid>,
    stemcell: Option<StemcellCid>,
}

/// The outcome of a check without a value; the text is its remark.
type Checked = Result<((), String)>;

fn passed(remark: impl Into<String>) -> Checked {
    Ok(((), remark.into()))
}

impl Checks<'_> {
    fn run(&mut self, report: &mut Report<'_>) -> Option<()> {
        report.check("accelerator", || self.accelerator())?;
        report.check("qemu-img", || self.qemu_img())?;
        self.stemcell = Some(report.check("stemcell", || self.import())?);
        self.vm = Some(report.check("create VM", || self.create_vm())?);
        report.check("boot", || self.wait_for_boot(1))?;
        report.check("hardening", || self.hardening())?;
        report.check("tap", || self.tap())?;
        self.disk = Some(report.check("create disk", || self.create_disk())?);
        report.check("attach disk", || self.attach())?;
        report.check("detach disk", || self.detach())?;
        report.check("reset", || self.reset())?;
        report.check("power button", || self.reboot())
    }

    /// A new CPI for each call, as a Director has.
    fn cpi(&self) -> Cpi {
        Cpi::new(Context::new(self.lab.config.clone(), Some(self.lab.config_file.clone())))
    }

    fn store(&self) -> Store {
        Store::new(&self.lab.config.state_dir, &self.lab.config.run_dir)
    }

    fn vm(&self) -> &VmCid {
        self.vm.as_ref().expect("made by an earlier check")
    }

    fn accelerator(&self) -> Checked {
        let qemu = &self.lab.config.qemu;
        let (accel, model) = probe::accelerator(
            &self.lab.config.run_dir,
            &qemu.binary,
            qemu.accel,
            qemu.cpu.as_deref(),
        )?;
        let slow =
            if accel.as_str() == "tcg" { ": emulated, many times slower than KVM" } else { "" };
        passed(format!("{} with CPU model {model}{slow}", accel.as_str()))
    }

    /// The built-in guest needs no qemu-img; most stemcells do.
    fn qemu_img(&self) -> Checked {
        let program = &self.lab.config.qemu.img_binary;
        let path = self.lab.config.run_dir.join("selftest.qcow2");
        let image = NewImage {
            path: &path,
            format: Format::Qcow2,
            size: Bytes(1 << 20),
            preallocation: Preallocation::Metadata,
            key: None,
        };
        let deadline = Instant::now() + QEMU_IMG_TIMEOUT;
        let qemu_img = QemuImg::new(program);
        image.create(&qemu_img, deadline)?.sync()?;
        qemu_img.check(&path, deadline)?;
        passed(format!("{} makes and checks images", program.display()))
    }

    fn import(&self) -> Result<(StemcellCid, String)> {
        let image = self.lab.guest.clone();
        let nothing = (Redacted(Map::new()), Map::new());
        let cid = self.cpi().create_stemcell(CreateStemcell {
            image,
            cloud_properties: nothing.0,
            tags: nothing.1,
        })?;
        Ok((cid, "the built-in guest".into()))
    }

    fn create_vm(&self) -> Result<(VmCid, String)> {
        let networks = json!({"net": {
            "type": "manual", "ip": "10.255.255.2", "netmask": "255.255.255.252",
            "gateway": "10.255.255.1",
        }});
        let bug = |what: &str| {
            Error::new(ErrorKind::Internal, format!("the selftest's own {what} is malformed"))
        };
        let networks = RawValue::from_string(networks.to_string()).map_err(|_| bug("network"))?;
        let properties = json!({"cpu": 1, "ram": 64, "ephemeral_disk": 64});
        let (cid, _) = self.cpi().create_vm(CreateVm {
            agent_id: AgentId::parse("selftest").ok_or_else(|| bug("agent id"))?,
            stemcell: self.stemcell.clone().expect("imported by an earlier check"),
            cloud_properties: Redacted(properties.as_object().cloned().unwrap_or_default()),
            networks: Networks::from_json(&networks).map_err(|e| e.in_request("networks"))?,
            disks: Vec::new(),
            env: RawValue::from_string("{}".into())
                .ok()
                .and_then(|env| Env::new(&env))
                .ok_or_else(|| bug("env"))?,
        })?;
        let remark = cid.to_string();
        Ok((cid, remark))
    }

    fn console(&self) -> PathBuf {
        self.store().vm(self.vm()).console_log()
    }

    /// Waits until the console has `word` for the given number of times in all.
    fn wait_for_console(&self, word: &str, times: usize) -> Result<()> {
        tail::wait_for(&self.console(), word, times, Instant::now() + GUEST_STEP_TIMEOUT)
    }

    fn wait_for_boot(&self, times: usize) -> Checked {
        self.wait_for_console("BOOTSECTOR-OK", times)?;
        passed("the guest booted")
    }

    fn hardening(&self) -> Checked {
        let PowerState::On(qemu) = power_state(&self.store().vm(self.vm()))? else {
            return Err(Error::new(ErrorKind::Host, "QEMU is not running"));
        };
        let path = format!("/proc/{}/status", qemu.pid());
        let status =
            std::fs::read_to_string(&path).map_err(|e| Error::io("read", path.as_ref(), e))?;
        if self.lab.config.hardening == Hardening::Off {
            return passed("off by configuration");
        }
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.unwrap_or_default().split_whitespace().next().unwrap_or_default().to_owned()
        };
        let found = [("CapEff", "0000000000000000"), ("NoNewPrivs", "1"), ("Seccomp", "2")]
            .into_iter()
            .filter(|(name, wanted)| field(name) != *wanted)
            .map(|(name, wanted)| format!("{name} is {}, expected {wanted}", field(name)))
            .chain((field("Uid") == "0").then(|| "its uid is 0".to_owned()))
            .collect::<Vec<_>>();
        if found.is_empty() {
            return passed(format!(
                "QEMU has uid {}, no capabilities, no_new_privs and seccomp",
                field("Uid")
            ));
        }
        Err(Error::new(ErrorKind::Host, format!("QEMU is not confined: {}", found.join(", "))))
    }

    fn tap(&self) -> Checked {
        let record = self.record()?;
        for (tap, segment) in record.nics.iter().filter_map(Nic::tap) {
            for link in [tap, &segment.bridge] {
                nix::net::if_::if_nametoindex(link.as_str())
                    .map_err(|e| Error::os(format!("find link '{link}'"), e))?;
            }
        }
        let (tap, segment) = record.nics[0].tap().expect("the default network has a bridge");
        passed(format!("{tap} on bridge {}", segment.bridge))
    }

    fn record(&self) -> Result<VmRecord> {
        let record = self.store().read::<VmRecord>(self.vm())?;
        record.ok_or_else(|| Error::new(ErrorKind::VmNotFound, "the VM has no record"))
    }

    fn create_disk(&self) -> Result<(DiskCid, String)> {
        let size = MiB::new(64).expect("in range");
        let disk = CreateDisk { size, cloud_properties: Redacted(Map::new()), vm: None };
        let cid = self.cpi().create_disk(disk)?;
        let remark = cid.to_string();
        Ok((cid, remark))
    }

    fn attach(&self) -> Checked {
        let disk = self.disk.as_ref().expect("made by an earlier check");
        let hint = self.cpi().attach_disk(self.vm(), disk)?;
        self.wait_for_console("\nU", 1)?;
        passed(format!("the running guest got {}", hint.path))
    }

    fn detach(&self) -> Checked {
        let disk = self.disk.as_ref().expect("made by an earlier check");
        self.cpi().detach_disk(self.vm(), disk)?;
        self.wait_for_console("\nD", 1)?;
        passed("the running guest released it")
    }

    fn reset(&self) -> Checked {
        let deadline = Instant::now() + GUEST_STEP_TIMEOUT;
        let mut monitor = Monitor::connect(&self.store().vm(self.vm()).qmp(), deadline)?;
        monitor.run(async |connection| power::reset(connection).await)?;
        self.wait_for_boot(2)
    }

    fn reboot(&self) -> Checked {
        self.cpi().reboot_vm(self.vm())?;
        self.wait_for_console("OFF", 1)?;
        self.wait_for_boot(3)?;
        passed("the guest powered off and booted again")
    }

    fn clean_up(&mut self) -> Checked {
        let record = self.vm.as_ref().map(|_| self.record()).transpose()?;
        if let Some(vm) = self.vm.take() {
            self.cpi().delete_vm(&vm)?;
        }
        if let Some(disk) = self.disk.take() {
            self.cpi().delete_disk(&disk)?;
        }
        if let Some(stemcell) = self.stemcell.take() {
            self.cpi().delete_stemcell(&stemcell)?;
        }
        let mut left = Vec::new();
        for (tap, segment) in record.iter().flat_map(|record| &record.nics).filter_map(Nic::tap) {
            let links = [tap, &segment.bridge].into_iter();
            left.extend(
                links
                    .filter(|l| nix::net::if_::if_nametoindex(l.as_str()).is_ok())
                    .map(ToString::to_string),
            );
        }
        for dir in ["stemcells", "vms", "disks", "locks", "pending", "uids"] {
            let entries =
                self.lab.config.state_dir.join(dir).read_dir().into_iter().flatten().flatten();
            left.extend(entries.map(|entry| entry.path().display().to_string()));
        }
        if left.is_empty() {
            return passed("no process, link, file or lock left");
        }
        Err(Error::new(ErrorKind::Internal, format!("not removed: {}", left.join(", "))))
    }
}
