//! The launch: from a VM's record to a running guest.
//!
//! QEMU can open almost nothing by itself ([`crate::sys::confine`]): it has its own uid, no
//! capabilities, empty network and ipc namespaces, Landlock rules and a seccomp filter. It inherits
//! every file as a descriptor. It starts with `-S`, the supervisor checks it, and only `cont` runs
//! the guest.

use std::fs::File;
use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::enospc::EnospcWait;
use super::qemu_log::{self, QemuLog};
use super::qemu_process::QemuProcess;
use super::resources::{self, Resources};
use super::{VmContext, address_probe, capped_log, limits};
use crate::cid::Cid;
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

/// How long QEMU may take to open its monitor: 0.1 s on an idle host, much longer on a busy one.
const MONITOR_CONNECT_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a QEMU that is adopted may take to answer: at once, unless it hangs. A hung QEMU is not
/// adopted; the next call that needs it deals with it.
const ADOPT_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long to wait for the exit of a QEMU that failed: it exits within milliseconds of closing its
/// monitor.
const QEMU_EXIT_TIMEOUT: Duration = Duration::from_millis(500);

/// A QEMU whose guest runs.
pub(super) struct Running {
    /// Its process.
    pub(super) qemu: QemuProcess,
    /// The supervisor's monitor.
    pub(super) monitor: Connection,
    /// The guest's serial console.
    pub(super) serial: UnixStream,
    /// Whether the guest waits for space on a full filesystem.
    pub(super) enospc: EnospcWait,
    /// What QEMU prints.
    pub(super) log: QemuLog,
}

/// Starts QEMU with `-S` in the VM's control groups. Synchronous, so that the fork happens while
/// this process has one thread. A call that deletes the VM waits for the lock on `supervisor.pid`
/// before it removes the groups.
///
/// Returns QEMU and the reading end of its output.
pub(super) fn spawn(context: &VmContext, vm: &VmRecord) -> Result<(Child, File)> {
    let template =
        Template::load(&vm.machine.template, context.config.qemu.templates_dir.as_deref())?;
    let resources = std::thread::scope(|threads| {
        // Moving a process into a group waits 15 ms for an RCU grace period. Files and taps are
        // opened meanwhile.
        let moved = threads
            .spawn(|| Cgroup::open(context.cid.as_str()).enter(&limits::for_vm(context, vm)));
        let resources = Resources::open(context, vm);
        moved.join().expect("no panic");
        resources
    })?;
    let arguments = command_line(vm, &template, &resources.handles());
    capped_log::rotate(&context.paths.qemu_log());
    let (output, log) = qemu_log::make_pipe(&context.paths.qemu_output())?;
    let confined = Confined {
        program: context.config.qemu.binary.clone(),
        args: arguments.into_iter().map(Into::into).collect(),
        inherit: resources.into_fds(),
        uid: vm.uid,
        keeps_network: vm.nics.iter().any(|nic| nic.tap().is_none()),
        paths: Paths::of_qemu(&context.config.qemu.binary),
        log,
        pid_lock: pidlock::open(&context.paths.qemu_pid())?,
        hardening: context.config.hardening,
    };
    let child = confine::spawn(confined)?;
    // QEMU inherited the supervisor's value, which protects it from the OOM killer.
    memory::set_oom_score_adj(child.process().pid(), 0);
    Ok((child, output))
}

/// Waits for QEMU's monitor, checks QEMU and runs the guest. QEMU is killed if that fails, or as
/// soon as `cancelled` completes.
pub(super) async fn run_guest(
    context: &VmContext,
    vm: &VmRecord,
    (mut child, output): (Child, File),
    cancelled: impl Future<Output = ()>,
) -> Result<Running> {
    let log = match QemuLog::record(&context.paths, output) {
        Ok(log) => log,
        Err(error) => {
            child.kill()?;
            return Err(error);
        }
    };
    let path = context.paths.supervisor_qmp();
    let booted = tokio::select! {
        booted = connect_and_continue(context, vm, &path) => booted,
        status = child.exited() => Err(early_exit_error(context, status?)),
        () = cancelled => Err(launch_cancelled(context)),
    };
    match booted {
        Ok((monitor, serial)) => Ok(Running {
            qemu: QemuProcess::Child(child),
            monitor,
            serial,
            enospc: EnospcWait::default(),
            log,
        }),
        Err(error) => {
            // A QEMU that exits closes its sockets first. Its exit status and log say more than a
            // closed socket.
            let ended = timeout(QEMU_EXIT_TIMEOUT, child.exited()).await;
            child.kill()?;
            log.finish().await;
            Err(ended
                .map_or(Ok(error), |status| Ok::<_, Error>(early_exit_error(context, status?)))?)
        }
    }
}

/// Checks QEMU over its monitor, sets disk limits, removes the key of encrypted disks, and sends
/// `cont`.
async fn connect_and_continue(
    context: &VmContext,
    vm: &VmRecord,
    path: &Path,
) -> Result<(Connection, UnixStream)> {
    // The probes run while QEMU starts, which takes longer.
    let probes = address_probe::start(vm);
    let mut monitor = Connection::connect(path, Instant::now() + MONITOR_CONNECT_TIMEOUT).await?;
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
        own.into_iter().flatten().filter_map(|id| blockdev::throttle_in_group(id, vm.disk_limits));
    let disks = resources::attached_disks(context, vm)?;
    if disks.iter().any(|disk| disk.encrypted) {
        remove_key(&mut monitor).await?;
    }
    let persistent =
        disks.iter().filter_map(|disk| blockdev::throttle(disk.cid.as_str(), disk.limits));
    for limits in own.chain(persistent) {
        monitor.raw("block_set_io_throttle", &limits).await?;
    }
    let serial = connect_serial(context).await?;
    probes.finish(context).await?;
    power::cont(&mut monitor).await?;
    Ok((monitor, serial))
}

/// Takes over the QEMU `process`, whose supervisor died. The guest is not affected, even if this
/// fails.
pub(super) async fn adopt(context: &VmContext, process: Process) -> Result<Running> {
    // The supervisor must leave the control group of the call that started it: the group may end
    // with that call.
    Cgroup::open(context.cid.as_str()).rejoin();
    let qemu = QemuProcess::adopt(process)?;
    let mut monitor = Connection::connect(
        &context.paths.supervisor_qmp(),
        Instant::now() + ADOPT_CONNECT_TIMEOUT,
    )
    .await?;
    let enospc = EnospcWait::from_status(&power::status(&mut monitor).await?);
    let log = QemuLog::adopt(&context.paths)?;
    Ok(Running { qemu, monitor, serial: connect_serial(context).await?, enospc, log })
}

async fn connect_serial(context: &VmContext) -> Result<UnixStream> {
    let path = context.paths.serial();
    UnixStream::connect(&path).await.at("connect to serial port", &path)
}

/// Deletes the key of encrypted disks from QEMU, which has opened its images by now. QEMU must not
/// have the key, which opens every disk, while the guest runs.
async fn remove_key(monitor: &mut Connection) -> Result<()> {
    match monitor.raw("object-del", &json!({"id": blockdev::SECRET})).await {
        // The encrypted disk was attached after QEMU's files were opened, so QEMU never had the
        // key.
        Err(error) if error.refused_with("not found") => Ok(()),
        deleted => deleted.map(drop).map_err(Error::from),
    }
}

/// The error of a launch that another call cancelled, to stop or delete the VM.
pub(super) fn launch_cancelled(context: &VmContext) -> Error {
    Error::new(ErrorKind::Host, format!("the launch of VM '{}' was cancelled", context.cid))
}

fn early_exit_error(context: &VmContext, status: ExitStatus) -> Error {
    let log = context.paths.qemu_log();
    let output = tail::last_lines(&log, 5);
    if output.contains(WRONG_KEY) {
        return DiskKey::from_config(&context.config).wrong_key_error(None);
    }
    Error::new(ErrorKind::Host, format!("QEMU ended with {status} before it was ready: {output}"))
        .hint(format!("see its log '{}'", log.display()))
}
