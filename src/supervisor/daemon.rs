//! The supervisor's main loop: launch or adopt QEMU, watch it, record its exit, restart it.

use std::fs::File;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use qapi::qmp;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;

use super::capped_log::CappedLog;
use super::enospc::EnospcWait;
use super::exit::{Ending, ExitRecord};
use super::launch::{self, Running};
use super::power::{PowerState, power_state};
use super::restart::RestartHistory;
use super::signals::Signals;
use super::{StartResult, VmContext, boot_slots, memory};
use crate::cid::Cid;
use crate::config::Restart;
use crate::crash;
use crate::error::{Error, ErrorKind, Result};
use crate::host::cgroup::Cgroup;
use crate::host::{clock, memory as host_memory};
use crate::qmp::connection::Connection;
use crate::qmp::{Event, power};
use crate::schema::printable;
use crate::store::record::{Desired, Phase, VmRecord};
use crate::store::{Guard, Rank, atomic};
use crate::sys::{code, pidlock};

/// The longest data of an event that is recorded. QEMU's own have below 1 KiB.
const EVENT_MAX_BYTES: usize = 8 << 10;
/// How long a restart waits for the VM's lock, which a call may hold, and then for a boot slot.
const RESTART_TIMEOUT: Duration = Duration::from_secs(600);
/// How long to read the last events and console output of a QEMU that has ended: the sockets still
/// contain them.
const FINAL_OUTPUT_TIMEOUT: Duration = Duration::from_millis(200);

/// `oom_score_adj` of a supervisor: it is small and records an OOM kill, so the kernel should end
/// other processes first.
const SUPERVISOR_OOM_SCORE_ADJ: i32 = -900;
/// Exit reason of a QEMU that the kernel killed because the VM's memory limit, or the host's
/// memory, was exceeded.
const OOM_KILL: &str = "oom-kill";

/// How a supervisor gets its QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartMode {
    /// Start a QEMU once a boot slot is free.
    Launch {
        /// When to stop waiting for a boot slot.
        queue_deadline: Instant,
    },
    /// Take over the running QEMU, whose supervisor died.
    Adopt,
}

/// Runs the VM until it stays off, and sends the result of the start through `handshake` to the
/// call that waits for it.
///
/// `vm_lock` is the VM's lock, inherited from that call. The supervisor holds it until the launch
/// is done, so no other call works on the VM even if the call is killed.
///
/// # Errors
/// Why the launch or the adoption failed, which the call gets too; later, why a restart was not
/// possible.
pub fn supervise(
    context: &VmContext,
    mode: StartMode,
    vm_lock: File,
    handshake: File,
) -> Result<()> {
    host_memory::set_oom_score_adj(std::process::id() as i32, SUPERVISOR_OOM_SCORE_ADJ);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::os("start the event loop", error))?;
    let launched = prepare(context, mode, &runtime).and_then(|(lock, mut supervisor)| {
        let running = match mode {
            StartMode::Launch { queue_deadline } => supervisor.launch(&runtime, queue_deadline)?,
            StartMode::Adopt => supervisor.adopt(&runtime)?,
        };
        Ok((lock, supervisor, running))
    });
    let message = match &launched {
        Ok(_) => StartResult::Running,
        Err(error) => StartResult::failed(error),
    };
    crash::point!("launch done");
    // The call still holds the VM's lock through its own descriptor. Once the call has the result,
    // it must be the only holder.
    drop(vm_lock);
    let sent = send_result(handshake, &message);
    crash::point!("caller answered");
    let (_lock, mut supervisor, running) = launched?;
    if !sent && supervisor.vm.phase == Phase::Creating {
        // The call was killed before it could answer. The Director does not know this VM and may
        // give its address to another.
        return running.qemu.process().signal(nix::sys::signal::Signal::SIGKILL);
    }
    supervisor.run(&runtime, running)
}

/// Locks `supervisor.pid`, which shows other processes that the VM starts or runs. Before a launch
/// it also checks that the host has the memory.
fn prepare<'a>(
    context: &'a VmContext,
    mode: StartMode,
    runtime: &tokio::runtime::Runtime,
) -> Result<(File, Supervisor<'a>)> {
    let starts = matches!(mode, StartMode::Launch { .. });
    let _memory_lock = if starts { Some(memory::lock(context)?) } else { None };
    // Other processes may signal the supervisor as soon as they can find its pid.
    let signals = Signals::listen(runtime)?;
    atomic::make_dir(&context.paths.run)?;
    let lock = pidlock::lock_self(&context.paths.supervisor_pid())?;
    let supervisor = Supervisor::new(context, signals)?;
    if starts {
        memory::ensure_memory(context, &supervisor.vm)?;
    }
    Ok((lock, supervisor))
}

/// Sends `error` to the call that started this supervisor: there will be no launch.
pub fn report_failure(handshake: File, error: &Error) {
    let _ = send_result(handshake, &StartResult::failed(error));
}

/// Sends the result of the start and returns whether the call could receive it.
fn send_result(mut handshake: File, message: &StartResult) -> bool {
    let mut line = serde_json::to_vec(message).expect("a message is plain data");
    line.push(b'\n');
    let sent = handshake.write_all(&line);
    if let Err(error) = &sent {
        tracing::warn!(%error, "the call that started this supervisor has ended");
    }
    sent.is_ok()
}

/// The supervisor of one VM.
struct Supervisor<'a> {
    context: &'a VmContext,
    /// The VM's record, as it was read last.
    vm: VmRecord,
    console: CappedLog,
    events: CappedLog,
    restarts: RestartHistory,
    signals: Signals,
}

/// State of one run of QEMU.
#[derive(Default)]
struct Run {
    /// The exit reason, once QEMU reported it.
    reason: Option<String>,
    /// Whether the supervisor presses the power button because the host shuts down.
    host_stopping: bool,
    /// Whether the guest waits for space on a full filesystem.
    enospc: EnospcWait,
}

impl<'a> Supervisor<'a> {
    fn new(context: &'a VmContext, signals: Signals) -> Result<Self> {
        let vm = read(context)?.filter(|vm| vm.phase != Phase::Deleting).ok_or_else(|| {
            // The call that started this supervisor was killed, and delete_vm removed the VM since.
            let _ = atomic::remove_dir(&context.paths.run);
            Error::new(
                ErrorKind::VmNotFound,
                format!("VM '{}' has no record to start from", context.cid),
            )
        })?;
        let mut events = CappedLog::events(&context.paths)?;
        if let Err(error) = events.begin_line() {
            tracing::warn!(error = error.report(), "an event may be lost");
        }
        Ok(Self {
            context,
            vm,
            events,
            console: CappedLog::console(&context.paths)?,
            restarts: RestartHistory::default(),
            signals,
        })
    }

    /// Launches QEMU once a boot slot is free, and returns when the guest runs.
    fn launch(
        &mut self,
        runtime: &tokio::runtime::Runtime,
        queue_deadline: Instant,
    ) -> Result<Running> {
        let _slot = runtime.block_on(async {
            tokio::select! {
                slot = boot_slots::acquire(self.context, queue_deadline) => slot,
                () = self.signals.any() => Err(launch::launch_cancelled(self.context)),
            }
        })?;
        let child = launch::spawn(self.context, &self.vm)?;
        let running = runtime.block_on(launch::run_guest(
            self.context,
            &self.vm,
            child,
            self.signals.any(),
        ))?;
        self.log_event(
            "started",
            &json!({"pid": running.qemu.process().pid(), "accel": self.vm.machine.accel}),
        );
        Ok(running)
    }

    /// Takes over the running QEMU.
    fn adopt(&mut self, runtime: &tokio::runtime::Runtime) -> Result<Running> {
        let PowerState::On(process) = power_state(&self.context.paths)? else {
            return Err(Error::new(
                ErrorKind::Host,
                format!("VM '{}' cannot be adopted: its QEMU has ended", self.context.cid),
            ));
        };
        let running = runtime.block_on(launch::adopt(self.context, process))?;
        self.log_event("adopted", &json!({"pid": running.qemu.process().pid()}));
        Ok(running)
    }

    /// Watches QEMU and restarts it after crashes, until the VM stays off.
    fn run(&mut self, runtime: &tokio::runtime::Runtime, running: Running) -> Result<()> {
        let mut running = Some(running);
        loop {
            let ending = match running.take() {
                Some(qemu) => {
                    let exit = runtime.block_on(self.watch(qemu));
                    if read(self.context)
                        .is_ok_and(|vm| vm.is_none_or(|vm| vm.phase == Phase::Deleting))
                    {
                        // The VM is being deleted: no exit record is needed, and delete_vm waits
                        // for this supervisor.
                        return Ok(());
                    }
                    self.log_event(
                        "exited",
                        &json!({"how": exit.describe(), "ending": format!("{:?}", exit.ending())}),
                    );
                    if let Err(error) = exit.write(&self.context.paths.exit()) {
                        // Goes on: a full disk must not keep a crashed VM from its restart.
                        tracing::error!(error = error.report(), "the exit record is lost");
                    }
                    if exit.host_stopping { Ending::Stopped } else { exit.ending() }
                }
                None => Ending::Crashed,
            };
            let Some(lock) = self.lock_for_restart(runtime, ending)? else { return Ok(()) };
            match self.launch(runtime, Instant::now() + RESTART_TIMEOUT) {
                Ok(qemu) => running = Some(qemu),
                Err(error) => self.log_event("restart failed", &json!({"error": error.report()})),
            }
            drop(lock);
        }
    }

    /// Waits for the restart delay and returns the VM's lock, or `None` if the VM is not to be
    /// restarted. A call that ends a VM writes that to the VM's record first. So this reads the
    /// record before the delay, after it, and again under the lock.
    fn lock_for_restart(
        &mut self,
        runtime: &tokio::runtime::Runtime,
        ending: Ending,
    ) -> Result<Option<Guard>> {
        let wanted = ending == Ending::Crashed && self.context.config.restart == Restart::OnCrash;
        if !wanted || !self.reload_record()? {
            return Ok(None);
        }
        let Some(wait) = self.restarts.next_delay(Instant::now()) else {
            self.log_event("gave up", &json!({"why": "crashed too often"}));
            return Ok(None);
        };
        self.log_event("restarting", &json!({"in_seconds": wait.as_secs()}));
        let terminated = runtime.block_on(async {
            tokio::select! {
                () = tokio::time::sleep(wait) => false,
                _ = self.signals.terminate.recv() => true,
            }
        });
        if terminated || !self.reload_record()? {
            return Ok(None);
        }
        let lock = self.context.store.lock(
            Rank::Vm,
            &self.context.cid,
            Instant::now() + RESTART_TIMEOUT,
        )?;
        // Its create_vm may still have been running when the guest crashed. It has ended now,
        // because the lock is free. A VM that is not ready then has no owner.
        if self.reload_record()? && self.vm.phase == Phase::Ready {
            return Ok(Some(lock));
        }
        if read(self.context)?.is_none() {
            lock.unlink()?;
        }
        Ok(None)
    }

    /// Reads the VM's record again and returns whether it still wants this run: same run number,
    /// desired state running, not in deletion.
    fn reload_record(&mut self) -> Result<bool> {
        let Some(now) = read(self.context)? else { return Ok(false) };
        let same = now.run == self.vm.run
            && now.phase != Phase::Deleting
            && now.desired == Desired::Running;
        if same {
            self.vm = now;
        }
        Ok(same)
    }

    /// Records events and console output until QEMU has ended, and returns how it ended.
    async fn watch(&mut self, running: Running) -> ExitRecord {
        // The launch used most of the program's code; the long wait needs little of it.
        code::release_pages();
        let group = Cgroup::open(self.context.cid.as_str());
        let oom_kills = group.oom_kills();
        let Running { mut qemu, mut monitor, mut serial, enospc, log } = running;
        let mut run = Run { enospc, ..Run::default() };
        let (mut monitor_open, mut serial_open, mut buffer) = (true, true, vec![0; 4096]);
        let mut presses = tokio::time::interval(power::MAX_PRESS_INTERVAL);
        let status = loop {
            tokio::select! {
                status = qemu.exited() => break status.unwrap_or(None),
                event = monitor.next_event(), if monitor_open => match event {
                    Ok(event) => self.on_event(&event, &mut run),
                    Err(_) => monitor_open = false,
                },
                read = serial.read(&mut buffer), if serial_open => match read {
                    Ok(0) | Err(_) => serial_open = false,
                    Ok(length) => self.on_console(&buffer[..length]),
                },
                () = run.enospc.wait_for_check(), if monitor_open => {
                    self.resume_if_space(&mut run.enospc, &mut monitor, qemu.process().pid()).await;
                }
                // The launch is done, so there is nothing to cancel.
                _ = self.signals.cancel_launch.recv() => {}
                _ = self.signals.terminate.recv() => {
                    // The host shuts down: the guest gets the power button. Its desired state stays
                    // running.
                    run.host_stopping = true;
                    presses.reset_immediately();
                }
                // Repeated, because a guest that still boots ignores the power button.
                _ = presses.tick(), if run.host_stopping => {
                    let pressed = monitor.execute(&qmp::system_powerdown {}).await;
                    self.log_event("power button", &json!({"pressed": pressed.is_ok()}));
                }
            }
        };
        let _ = tokio::time::timeout(FINAL_OUTPUT_TIMEOUT, async {
            while let (true, Ok(event)) = (monitor_open, monitor.next_event().await) {
                self.on_event(&event, &mut run);
            }
            while let (true, Ok(length @ 1..)) = (serial_open, serial.read(&mut buffer).await) {
                self.on_console(&buffer[..length]);
            }
        })
        .await;
        log.finish().await;
        if run.reason.is_none() && group.oom_kills() > oom_kills {
            run.reason = Some(OOM_KILL.to_owned());
            self.log_event("out of memory", &json!({"memory_mib": self.vm.machine.ram}));
        }
        ExitRecord {
            run: self.vm.run,
            code: status.and_then(|status| status.code()),
            signal: status.and_then(|status| status.signal()),
            reason: run.reason,
            host_stopping: run.host_stopping,
            at: clock::now(),
        }
    }

    /// Continues a guest that QEMU paused on a full filesystem, if there is space now.
    async fn resume_if_space(
        &mut self,
        enospc: &mut EnospcWait,
        monitor: &mut Connection,
        qemu: i32,
    ) {
        match enospc.resume_if_space(monitor, qemu).await {
            Ok(true) => self.log_event("resumed", &json!({"why": "there is space again"})),
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "cannot resume a guest that waits for space"),
        }
    }

    /// Handles an event of QEMU's: keeps the exit reason, notices a full filesystem, logs it.
    fn on_event(&mut self, event: &Event, run: &mut Run) {
        if event.name == "SHUTDOWN" {
            run.reason = event.data["reason"].as_str().map(printable);
        }
        if event.name == "GUEST_PANICKED" {
            run.reason = Some("guest-panic".into());
        }
        run.enospc.on_event(event.kind());
        self.log_event(&event.name, &event.data);
    }

    /// Appends console output. A failure is logged, because it must not end the guest's
    /// supervision.
    fn on_console(&mut self, bytes: &[u8]) {
        if let Err(error) = self.console.append(bytes) {
            tracing::warn!(error = error.report(), "console output is lost");
        }
    }

    /// Appends an event to `events.jsonl`.
    fn log_event(&mut self, event: &str, data: &Value) {
        // At debug level, because a guest can cause events without end. `events.jsonl` has them
        // all, within its size limit.
        tracing::debug!(event, %data);
        let dropped = data.to_string().len();
        let data = if dropped > EVENT_MAX_BYTES {
            json!({"dropped_bytes": dropped})
        } else {
            data.clone()
        };
        let event = printable(event);
        let line = json!({"at": clock::now(), "run": self.vm.run, "event": event, "data": data});
        if let Err(error) = self.events.append(format!("{line}\n").as_bytes()) {
            tracing::warn!(error = error.report(), "an event is lost");
        }
    }
}

fn read(context: &VmContext) -> Result<Option<VmRecord>> {
    context.store.read::<VmRecord>(&context.cid)
}
