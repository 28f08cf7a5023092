//! Everything QEMU inherits: opened files, taps, listening sockets. Whatever was opened is closed again when this is
//! dropped, and a closed tap is gone.

use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use super::Scope;
use crate::cid::DiskCid;
use crate::config::Config;
use crate::crash;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::host::io_uring;
use crate::net::apply::Plug;
use crate::net::change::Port;
use crate::net::plan::{self, Segment};
use crate::qemu::command_line::Tap;
use crate::qemu::{FileNeed, Handles, Opened, files};
use crate::store::record::{AttachmentPhase, DiskRecord, Nic, VmRecord};
use crate::store::{DiskKey, Phase, Rank, atomic};
use crate::{image, net};

/// How long to wait for another process that works on the same bridge: each holds the lock for milliseconds.
const NETWORK_LOCK: Duration = Duration::from_secs(20);

/// What QEMU inherits.
pub(super) struct Resources {
    files: Vec<(Opened, OwnedFd)>,
    key: Option<OwnedFd>,
    taps: Vec<Option<Plug>>,
    qmp: UnixListener,
    supervisor_qmp: UnixListener,
    serial: UnixListener,
}

impl Resources {
    /// Opens everything `vm` needs, making bridges and taps.
    pub(super) fn open(scope: &Scope, vm: &VmRecord) -> Result<Self> {
        let needs = files::needs(vm, &scope.paths, &scope.store, &disks(scope, vm)?)?;
        let encrypted = needs.iter().any(|need| need.encrypted);
        // In force before there is a tap: a VM is never on a wire without them.
        net::guard::add(&vm.nics, || all_nics(scope))?;
        Ok(Self {
            files: needs
                .into_iter()
                .map(|need| open_file(&scope.config, need))
                .collect::<Result<_>>()?,
            key: if encrypted { Some(key_pipe(scope)?) } else { None },
            taps: vm.nics.iter().map(|nic| plug(scope, vm, nic)).collect::<Result<_>>()?,
            qmp: listen(&scope.paths.qmp())?,
            supervisor_qmp: listen(&scope.paths.supervisor_qmp())?,
            serial: listen(&scope.paths.serial())?,
        })
    }

    /// The descriptors by what they are for.
    pub(super) fn handles(&self) -> Handles {
        Handles {
            files: self.files.iter().map(|(opened, fd)| (opened.clone(), fd.as_raw_fd())).collect(),
            key: self.key.as_ref().map(AsRawFd::as_raw_fd),
            taps: self.taps.iter().map(|plug| plug.as_ref().map(tap)).collect(),
            qmp: self.qmp.as_raw_fd(),
            supervisor_qmp: self.supervisor_qmp.as_raw_fd(),
            serial: self.serial.as_raw_fd(),
        }
    }

    /// The descriptors themselves, to be closed here once QEMU has them: an image's lock lives as long as any copy.
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

/// The records of the disks `vm` starts with: a disk the guest was only asked to let go of is still its own.
pub(super) fn disks(scope: &Scope, vm: &VmRecord) -> Result<Vec<DiskRecord>> {
    let attached = vm.disks.iter().filter(|a| a.phase != AttachmentPhase::Attaching);
    let record = |disk| scope.store.read::<DiskRecord>(disk)?.ok_or_else(|| missing_disk(disk));
    attached.map(|attachment| record(&attachment.disk)).collect()
}

fn missing_disk(disk: &DiskCid) -> Error {
    Error::new(
        ErrorKind::DiskNotFound,
        format!("disk '{disk}' is attached to the VM but has no record"),
    )
    .hint("restore the disk's directory, or detach the disk with detach_disk")
}

/// Opens one file as QEMU wants it, on its command line or over its monitor.
///
/// # Errors
/// [`ErrorKind::Corrupt`] for an image that names other files; what the filesystem says.
pub fn open_file(config: &Config, need: FileNeed) -> Result<(Opened, OwnedFd)> {
    if let Some(format) = need.format {
        image::refuse_other_files(&need.path, format, need.id == files::ROOT)?;
    }
    let (fd, direct) = image::open(&need.path, need.writable, need.cache.bypasses_page_cache())?;
    let io_uring = io_uring::works(&config.run_dir, &config.qemu);
    Ok((Opened { need, direct, io_uring }, fd))
}

/// The key of encrypted disks in a pipe: QEMU opens it by name, and once it has read it, it is empty.
fn key_pipe(scope: &Scope) -> Result<OwnedFd> {
    let key = DiskKey::from_config(&scope.config).read()?;
    let pipe = |error| Error::os("pass the key of encrypted disks through a pipe", error);
    let (reader, mut writer) = std::io::pipe().map_err(pipe)?;
    // A key has at most 4096 bytes, which any pipe takes at once.
    writer.write_all(key.0.as_bytes()).map_err(pipe)?;
    // A name like /proc/self/fd/3 is opened anew, by QEMU's own user. Nobody else has the name.
    rustix::fs::fchmod(&reader, rustix::fs::Mode::from_raw_mode(0o444))
        .map_err(|e| pipe(e.into()))?;
    Ok(reader.into())
}

/// The cards of all VMs there are, should the host have lost everybody's rules.
fn all_nics(scope: &Scope) -> Result<Vec<Nic>> {
    let vms = scope
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

/// Makes the NIC's bridge as it must be and plugs a new tap into it, if it is to have one.
fn plug(scope: &Scope, vm: &VmRecord, nic: &Nic) -> Result<Option<Plug>> {
    let Some((port, segment)) = Port::of(nic) else { return Ok(None) };
    let _lock =
        scope.store.short_lock(Rank::Network, &segment.bridge, Instant::now() + NETWORK_LOCK)?;
    // A broken QEMU can make its tap outlive it (TUNSETPERSIST needs no right on an open tap).
    net::apply::remove_tap(&port.link)?;
    let queues = net::tap::queues(vm.machine.cpus);
    let plug = net::apply::plug(&port, segment, queues, || everybody(scope, vm, segment))?;
    // Made again, it lost the word that it stays.
    if scope.store.is_pinned(&segment.bridge) {
        net::kept::keep(&segment.bridge, &scope.store.state_dir_id()?)?;
    }
    Ok(Some(plug))
}

/// What all VMs on the bridge of `segment` want of it, whether they run or not, and its pin; and their ports. Who
/// disagrees keeps a new VM from being made; one that was there before starts, whatever the others have become.
fn everybody(scope: &Scope, vm: &VmRecord, segment: &Segment) -> Result<(Segment, Vec<Port>)> {
    let (mut all, mut ports) = (segment.clone(), Vec::new());
    for other in scope
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
                    tracing::warn!(other = %cid, error = error.report(), "the bridge is as this VM wants it")
                }
                Ok(()) => all.isolated |= its.isolated,
            }
            ports.push(port);
        }
    }
    for pin in scope.store.pins()?.iter().filter(|pin| pin.bridge == segment.bridge) {
        if let Err(error) = plan::merge(&mut all, pin) {
            tracing::warn!(
                error = error.report(),
                "the bridge is no more as 'network apply' made it"
            );
        }
    }
    Ok((all, ports))
}

/// A socket QEMU will accept on. Bound by us, so the name is never QEMU's to choose, and root's alone.
fn listen(path: &Path) -> Result<UnixListener> {
    atomic::remove_file(path)?;
    // The supervisor's umask makes it 0600.
    let listener = UnixListener::bind(path).at("listen on", path)?;
    crash::point!("{}: bound", path.file_name().unwrap_or_default().display());
    Ok(listener)
}
