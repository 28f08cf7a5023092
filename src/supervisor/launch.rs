//! From a record to a running guest.
//!
//! QEMU gets nothing it could open itself: a uid of its own, no capabilities, empty network and ipc namespaces,
//! Landlock, its own seccomp filter, and every file as a descriptor ([`crate::sys::confine`]). It starts stopped; what
//! it is gets checked; only `cont` runs the guest.

use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use super::full::Full;
use super::resources::{self, Resources};
use super::watched::Watched;
use super::{Scope, conflict, limits};
use crate::cid::Cid;
use serde_json::json;
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::host::cgroup::Cgroup;
use crate::host::{memory, tail};
use crate::qemu::{Template, blockdev, command_line, files};
use crate::qmp::connection::Connection;
use crate::qmp::power;
use crate::store::DiskKey;
use crate::store::disk_key::WRONG_KEY;
use crate::store::record::{Accel, VmRecord};
use crate::sys::confine::{self, Child, Confined, Paths};
use crate::sys::pidfd::Process;
use crate::sys::pidlock;

/// QEMU's initialization takes 0.1 s on an idle host; a busy one is given this long.
const READY: Duration = Duration::from_secs(60);

/// A QEMU that runs answers at once. One that does not is hung, and left to the call that needs it.
const ADOPTED: Duration = Duration::from_secs(5);

/// A QEMU that closed its monitor is gone within milliseconds.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// A QEMU whose guest runs.
pub(super) struct Running {
    pub(super) qemu: Watched,
    pub(super) monitor: Connection,
    pub(super) serial: UnixStream,
    pub(super) full: Full,
}

/// Starts QEMU, stopped, in the VM's control groups. Synchronous: the child is made while this process has one thread.
/// Whoever removes the VM sees the supervisor's lock, and waits for it before it removes the groups.
pub(super) fn spawn(scope: &Scope, vm: &VmRecord) -> Result<Child> {
    let template =
        Template::load(&vm.machine.template, scope.config.qemu.templates_dir.as_deref())?;
    let resources = std::thread::scope(|threads| {
        // Moving a process waits for a pause of every CPU (RCU), 15 ms. Files and taps are opened meanwhile.
        let moved =
            threads.spawn(|| Cgroup::open(scope.cid.as_str()).enter(&limits::of(scope, vm)));
        let resources = Resources::open(scope, vm);
        moved.join().expect("no panic");
        resources
    })?;
    let arguments = command_line(vm, &template, &resources.handles());
    Scope::rotate(&scope.paths.qemu_log());
    let log = open_log(&scope.paths.qemu_log())?;
    let confined = Confined {
        program: scope.config.qemu.binary.clone(),
        args: arguments.into_iter().map(Into::into).collect(),
        inherit: resources.into_fds(),
        uid: vm.uid,
        keeps_network: vm.nics.iter().any(|nic| nic.tap().is_none()),
        paths: Paths::of_qemu(&scope.config.qemu.binary),
        log,
        pid_lock: pidlock::open(&scope.paths.qemu_pid())?,
        hardening: scope.config.hardening,
    };
    let child = confine::spawn(confined)?;
    // Not as spared as its supervisor, from which it inherited that.
    memory::prefer_ending(child.process().pid(), 0);
    Ok(child)
}

/// Waits until QEMU is up, checks it and lets the guest run. If that fails or is no longer wanted, QEMU is killed.
pub(super) async fn boot(
    scope: &Scope,
    vm: &VmRecord,
    mut child: Child,
    told_to_end: impl Future<Output = ()>,
) -> Result<Running> {
    let path = scope.paths.supervisor_qmp();
    let booted = tokio::select! {
        booted = connect_and_continue(scope, vm, &path) => booted,
        status = child.exited() => Err(early_exit(scope, status?)),
        () = told_to_end => Err(called_off(scope)),
    };
    match booted {
        Ok((monitor, serial)) => {
            Ok(Running { qemu: Watched::Child(child), monitor, serial, full: Full::default() })
        }
        Err(error) => {
            // A QEMU that ends closes its sockets first: its own words say more than that they are closed.
            let ended = timeout(LAST_WORDS, child.exited()).await;
            child.kill()?;
            Err(ended.map_or(Ok(error), |status| Ok::<_, Error>(early_exit(scope, status?)))?)
        }
    }
}

async fn connect_and_continue(
    scope: &Scope,
    vm: &VmRecord,
    path: &Path,
) -> Result<(Connection, UnixStream)> {
    // While QEMU starts: it takes longer than the answers.
    let questions = conflict::ask(vm);
    let mut monitor = Connection::connect(path, Instant::now() + READY).await?;
    let status = power::status(&mut monitor).await?;
    if !status.is_prelaunch() {
        return Err(Error::new(
            ErrorKind::Internal,
            format!("QEMU started in state {:?}", status.state),
        ));
    }
    let kvm = monitor.raw("query-kvm", &json!({})).await?;
    let wanted = vm.machine.accel == Accel::Kvm;
    if kvm["enabled"] != wanted {
        return Err(Error::new(
            ErrorKind::Host,
            format!("QEMU runs with kvm {}, not {wanted}", kvm["enabled"]),
        ));
    }
    let own = [Some(files::ROOT), vm.ephemeral.as_ref().map(|_| files::EPHEMERAL)];
    let own =
        own.into_iter().flatten().filter_map(|id| blockdev::throttle_together(id, vm.disk_limits));
    let disks = resources::disks(scope, vm)?;
    if disks.iter().any(|disk| disk.encrypted) {
        forget_key(&mut monitor).await?;
    }
    let persistent =
        disks.iter().filter_map(|disk| blockdev::throttle(disk.cid.as_str(), disk.limits));
    for limits in own.chain(persistent) {
        monitor.raw("block_set_io_throttle", &limits).await?;
    }
    let serial = serial(scope).await?;
    questions.settle(scope).await?;
    power::cont(&mut monitor).await?;
    Ok((monitor, serial))
}

/// Takes over the QEMU `process`, whose supervisor died. The guest does not notice; if it fails, QEMU stays as it is.
pub(super) async fn adopt(scope: &Scope, process: Process) -> Result<Running> {
    // The call that started us may end, and its control group with it.
    Cgroup::open(scope.cid.as_str()).rejoin();
    let qemu = Watched::orphan(process)?;
    let mut monitor =
        Connection::connect(&scope.paths.supervisor_qmp(), Instant::now() + ADOPTED).await?;
    let full = Full::found(&power::status(&mut monitor).await?);
    Ok(Running { qemu, monitor, serial: serial(scope).await?, full })
}

async fn serial(scope: &Scope) -> Result<UnixStream> {
    let path = scope.paths.serial();
    UnixStream::connect(&path).await.at("connect to serial port", &path)
}

/// The images are open: before the guest runs, nothing in QEMU may know the key of every disk.
async fn forget_key(monitor: &mut Connection) -> Result<()> {
    match monitor.raw("object-del", &json!({"id": blockdev::SECRET})).await {
        // A disk that was attached since its files were opened: QEMU never had the key.
        Err(error) if error.refused_with("not found") => Ok(()),
        forgotten => forgotten.map(drop).map_err(Error::from),
    }
}

/// Somebody wants the VM off or gone.
pub(super) fn called_off(scope: &Scope) -> Error {
    Error::new(ErrorKind::Host, format!("the launch of VM '{}' was called off", scope.cid))
}

fn early_exit(scope: &Scope, status: ExitStatus) -> Error {
    let log = scope.paths.qemu_log();
    let said = tail::last_lines(&log, 5);
    if said.contains(WRONG_KEY) {
        return DiskKey::from_config(&scope.config).wrong_key_error(None);
    }
    Error::new(ErrorKind::Host, format!("QEMU ended with {status} before it was ready: {said}"))
        .hint(format!("its whole output is in '{}'", log.display()))
}

fn open_log(path: &Path) -> Result<std::fs::File> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
        .at("open log", path)
}
