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
use crate::qmp::monitor::Monitor;
use crate::qmp::power;
use crate::schema::Redacted;
use crate::store::record::Nic;
use crate::store::{Store, VmRecord};
use crate::supervisor::{PowerState, power_state};
use crate::units::MiB;

/// The guest boots in 0.3 s emulated and, at worst, in seconds under nested KVM.
const PATIENCE: Duration = Duration::from_secs(30);

/// Runs all checks; the first that fails ends the tour, but not the cleaning up.
pub(super) fn all(lab: &Lab, report: &mut Report<'_>) -> bool {
    let mut tour = Tour { lab, vm: None, disk: None, stemcell: None };
    let toured = tour.run(report).is_some();
    let cleaned = report.check("nothing left", || tour.clean_up()).is_some();
    toured && cleaned
}

struct Tour<'a> {
    lab: &'a Lab,
    vm: Option<VmCid>,
    disk: Option<DiskCid>,
    stemcell: Option<StemcellCid>,
}

type Checked = Result<((), String)>;

fn fine(remark: impl Into<String>) -> Checked {
    Ok(((), remark.into()))
}

impl Tour<'_> {
    fn run(&mut self, report: &mut Report<'_>) -> Option<()> {
        report.check("accelerator", || self.accelerator())?;
        self.stemcell = Some(report.check("stemcell", || self.import())?);
        self.vm = Some(report.check("create VM", || self.create_vm())?);
        report.check("boot", || self.sees("BOOTSECTOR-OK", 1))?;
        report.check("hardening", || self.hardening())?;
        report.check("tap", || self.tap())?;
        self.disk = Some(report.check("create disk", || self.create_disk())?);
        report.check("hot-plug", || self.attach())?;
        report.check("unplug", || self.detach())?;
        report.check("reset", || self.reset())?;
        report.check("power button", || self.reboot())
    }

    /// Each verb is a call of its own, as for a Director.
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
            if accel.as_str() == "tcg" { ": emulated, many times slower than kvm" } else { "" };
        fine(format!("{} with CPU model {model}{slow}", accel.as_str()))
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
            "type": "manual", "ip": "10.255.255.2", "netmask": "255.255.255.252", "gateway": "10.255.255.1",
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

    fn sees(&self, word: &str, times: usize) -> Checked {
        tail::wait_for(&self.console(), word, times, Instant::now() + PATIENCE)?;
        fine(format!("the guest said {word}"))
    }

    fn hardening(&self) -> Checked {
        let PowerState::On(qemu) = power_state(&self.store().vm(self.vm()))? else {
            return Err(Error::new(ErrorKind::Host, "QEMU does not run"));
        };
        let path = format!("/proc/{}/status", qemu.pid());
        let status =
            std::fs::read_to_string(&path).map_err(|e| Error::io("read", path.as_ref(), e))?;
        if self.lab.config.hardening == Hardening::Off {
            return fine("switched off by the configuration");
        }
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.unwrap_or_default().split_whitespace().next().unwrap_or_default().to_owned()
        };
        let found = [("CapEff", "0000000000000000"), ("NoNewPrivs", "1"), ("Seccomp", "2")]
            .into_iter()
            .filter(|(name, wanted)| field(name) != *wanted)
            .map(|(name, wanted)| format!("{name} is {}, not {wanted}", field(name)))
            .chain((field("Uid") == "0").then(|| "it runs as root".to_owned()))
            .collect::<Vec<_>>();
        if found.is_empty() {
            return fine(format!(
                "uid {}, no capabilities, seccomp, Landlock, no namespace of the host's",
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
        fine(format!("{tap} on bridge {}", segment.bridge))
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
        self.sees("\nU", 1)?;
        fine(format!("the guest was told of {}", hint.path))
    }

    fn detach(&self) -> Checked {
        let disk = self.disk.as_ref().expect("made by an earlier check");
        self.cpi().detach_disk(self.vm(), disk)?;
        self.sees("\nD", 1)?;
        fine("the guest let go")
    }

    fn reset(&self) -> Checked {
        let deadline = Instant::now() + PATIENCE;
        let mut monitor = Monitor::connect(&self.store().vm(self.vm()).qmp(), deadline)?;
        monitor.run(async |connection| power::reset(connection).await)?;
        self.sees("BOOTSECTOR-OK", 2)
    }

    fn reboot(&self) -> Checked {
        self.cpi().reboot_vm(self.vm())?;
        self.sees("OFF", 1)?;
        self.sees("BOOTSECTOR-OK", 3)?;
        fine("the guest powered off and was started again")
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
            return fine("no process, link, file or lock");
        }
        Err(Error::new(ErrorKind::Internal, format!("left behind: {}", left.join(", "))))
    }
}
