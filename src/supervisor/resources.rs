//! The descriptors that QEMU inherits: files, taps, listening sockets. Dropping them closes them,
//! and the kernel removes a closed tap.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use super::VmContext;
use crate::cid::DiskCid;
use crate::config::Config;
use crate::crash;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::host::io_uring;
use crate::net::apply::Plug;
use crate::net::change::Port;
use crate::net::plan::{self, Segment};
use crate::qemu::command_line::Tap;
use crate::qemu::{FileSpec, InheritedFds, OpenedFile, files};
use crate::store::record::{AttachmentPhase, DiskRecord, Nic, VmRecord};
use crate::store::{DiskKey, Phase, Rank, atomic, beneath};
use crate::{image, net};

/// How long to wait for another process that changes the same bridge: each holds the lock for
/// milliseconds.
const NETWORK_LOCK_TIMEOUT: Duration = Duration::from_secs(20);

/// The descriptors that QEMU inherits.
pub(super) struct Resources {
    files: Vec<(OpenedFile, OwnedFd)>,
    key: Option<OwnedFd>,
    taps: Vec<Option<Plug>>,
    qmp: UnixListener,
    supervisor_qmp: UnixListener,
    serial: UnixListener,
}

impl Resources {
    /// Opens everything that `vm` needs, and makes its bridges and taps.
    pub(super) fn open(context: &VmContext, vm: &VmRecord) -> Result<Self> {
        vm.base.ensure_unchanged()?;
        let needs =
            files::required(vm, &context.paths, &context.store, &attached_disks(context, vm)?)?;
        let encrypted = needs.iter().any(|need| need.encrypted);
        // The filter rules are in force before the taps exist: a VM is never on a network without
        // them.
        net::filter::add(&vm.nics, || all_nics(context))?;
        Ok(Self {
            files: needs
                .into_iter()
                .map(|need| open_file(&context.config, need))
                .collect::<Result<_>>()?,
            key: if encrypted { Some(key_pipe(context)?) } else { None },
            taps: vm.nics.iter().map(|nic| plug(context, vm, nic)).collect::<Result<_>>()?,
            qmp: listen(&context.paths.qmp())?,
            supervisor_qmp: listen(&context.paths.supervisor_qmp())?,
            serial: listen(&context.paths.serial())?,
        })
    }

    /// Returns the numbers of the descriptors, by their purpose.
    pub(super) fn handles(&self) -> InheritedFds {
        InheritedFds {
            files: self.files.iter().map(|(opened, fd)| (opened.clone(), fd.as_raw_fd())).collect(),
            key: self.key.as_ref().map(AsRawFd::as_raw_fd),
            taps: self.taps.iter().map(|plug| plug.as_ref().map(tap)).collect(),
            qmp: self.qmp.as_raw_fd(),
            supervisor_qmp: self.supervisor_qmp.as_raw_fd(),
            serial: self.serial.as_raw_fd(),
        }
    }

    /// Returns the descriptors, to be closed once QEMU has inherited them: an image's lock lasts
    /// until its last copy is closed.
    pub(super) fn into_fds(self) -> Vec<OwnedFd> {
        let sockets = [self.qmp, self.supervisor_qmp, self.serial].map(OwnedFd::from);
        let taps = self
            .taps
            .into_iter()
            .flatten()
            .flat_map(|plug| plug.queues.into_iter().chain(plug.vhost));
        self.files
            .into_iter()
            .map(|(_, fd)| fd)
            .chain(self.key)
            .chain(taps)
            .chain(sockets)
            .collect()
    }
}

/// Returns the records of the disks that `vm` starts with. A disk in phase `detaching` is still one
/// of them.
pub(super) fn attached_disks(context: &VmContext, vm: &VmRecord) -> Result<Vec<DiskRecord>> {
    let attached = vm.disks.iter().filter(|a| a.phase != AttachmentPhase::Attaching);
    let record =
        |disk| context.store.read::<DiskRecord>(disk)?.ok_or_else(|| missing_disk_error(disk));
    attached.map(|attachment| record(&attachment.disk)).collect()
}

fn missing_disk_error(disk: &DiskCid) -> Error {
    Error::new(
        ErrorKind::DiskNotFound,
        format!("disk '{disk}' is attached to the VM but has no record"),
    )
    .hint("restore the disk's directory, or detach the disk with detach_disk")
}

/// Opens one file for QEMU, which gets it at its start or over its monitor.
///
/// # Errors
/// [`ErrorKind::Corrupt`] for an image that refers to other files, or whose path does not lead to
/// the file expected there; else the filesystem's error.
pub fn open_file(config: &Config, need: FileSpec) -> Result<(OpenedFile, OwnedFd)> {
    let (fd, direct) = match need.format {
        Some(format) => {
            let image = beneath::file(&need.path, need.expected)?;
            image::ensure_no_external_files(&image, format, need.id == files::ROOT)?;
            image::open(&image, need.writable, need.cache.bypasses_page_cache())?
        }
        None => (open_device(&need)?, false),
    };
    let io_uring = io_uring::is_usable(&config.run_dir, &config.qemu);
    Ok((OpenedFile { spec: need, direct, io_uring }, fd))
}

fn open_device(need: &FileSpec) -> Result<OwnedFd> {
    let open = File::options().read(true).write(need.writable).open(&need.path);
    Ok(open.at("open", &need.path)?.into())
}

/// Returns a pipe that contains the key of encrypted disks. QEMU opens it by name; the pipe is
/// empty after one read.
fn key_pipe(context: &VmContext) -> Result<OwnedFd> {
    let key = DiskKey::from_config(&context.config).read()?;
    let pipe = |error| Error::os("pass the key of encrypted disks through a pipe", error);
    let (reader, mut writer) = std::io::pipe().map_err(pipe)?;
    // A key has at most 4096 bytes, which fit in any pipe.
    writer.write_all(key.0.as_bytes()).map_err(pipe)?;
    // Opening /proc/self/fd/3 checks permissions again, for QEMU's own uid. No other process has
    // that name.
    rustix::fs::fchmod(&reader, rustix::fs::Mode::from_raw_mode(0o444))
        .map_err(|e| pipe(e.into()))?;
    Ok(reader.into())
}

/// Returns the NICs of all VMs, for the case that the host has lost all rules.
fn all_nics(context: &VmContext) -> Result<Vec<Nic>> {
    let vms = context
        .store
        .list_readable::<VmRecord>()?
        .into_iter()
        .filter(|vm| vm.phase != Phase::Deleting);
    Ok(vms.flat_map(|vm| vm.nics).collect())
}

fn tap(plug: &Plug) -> Tap {
    let numbers = |fds: &[OwnedFd]| fds.iter().map(AsRawFd::as_raw_fd).collect();
    Tap { queues: numbers(&plug.queues), vhost: numbers(&plug.vhost), mtu: plug.mtu }
}

/// Makes or updates the NIC's bridge and plugs a new tap into it. `None` if the NIC has no tap.
fn plug(context: &VmContext, vm: &VmRecord, nic: &Nic) -> Result<Option<Plug>> {
    let Some((port, segment)) = Port::of(nic) else { return Ok(None) };
    let _lock = context.store.short_lock(
        Rank::Network,
        &segment.bridge,
        Instant::now() + NETWORK_LOCK_TIMEOUT,
    )?;
    // A compromised QEMU can make its tap persistent: TUNSETPERSIST on an open tap needs no
    // capability.
    net::apply::remove_tap(&port.link)?;
    let queues = net::tap::queue_count(vm.machine.cpus);
    let plug = net::apply::plug(&port, segment, queues, || bridge_members(context, vm, segment))?;
    // If the bridge was made again, it has lost the mark that it is pinned.
    if context.store.is_pinned(&segment.bridge) {
        net::bridge_owners::add_owner(&segment.bridge, &context.store.state_dir_id()?)?;
    }
    Ok(Some(plug))
}

/// Returns the merged settings and the ports of all VMs on the bridge of `segment`, running or not,
/// and of its pin. A disagreement between VMs is an error only for a new VM. An existing VM starts,
/// and the disagreement is logged.
fn bridge_members(
    context: &VmContext,
    vm: &VmRecord,
    segment: &Segment,
) -> Result<(Segment, Vec<Port>)> {
    let (mut all, mut ports) = (segment.clone(), Vec::new());
    for other in context
        .store
        .list_readable::<VmRecord>()?
        .into_iter()
        .filter(|vm| vm.phase != Phase::Deleting)
    {
        let cid = &other.cid;
        for (port, its) in
            other.nics.iter().filter_map(Port::of).filter(|(_, its)| its.bridge == segment.bridge)
        {
            match plan::merge(&mut all, its) {
                Err(error) if vm.phase == Phase::Creating => {
                    return Err(error
                        .with_kind(ErrorKind::Conflict)
                        .during(format!("VM '{cid}' is on the bridge")));
                }
                Err(error) => {
                    tracing::warn!(
                        other = %cid,
                        error = error.report(),
                        "another VM wants other settings of the bridge; this VM's settings are used"
                    );
                }
                Ok(()) => all.isolated |= its.isolated,
            }
            ports.push(port);
        }
    }
    for pin in context.store.pins()?.iter().filter(|pin| pin.bridge == segment.bridge) {
        if let Err(error) = plan::merge(&mut all, pin) {
            tracing::warn!(
                error = error.report(),
                "the pin of 'network apply' wants other settings of the bridge; \
                 this VM's settings are used"
            );
        }
    }
    Ok((all, ports))
}

/// Binds a socket on which QEMU accepts connections. The supervisor binds it, so that QEMU cannot
/// choose the path and only root can connect.
fn listen(path: &Path) -> Result<UnixListener> {
    atomic::remove_file(path)?;
    // The supervisor's umask makes it 0600.
    let listener = UnixListener::bind(path).at("listen on", path)?;
    crash::point!("{}: bound", path.file_name().unwrap_or_default().display());
    Ok(listener)
}
