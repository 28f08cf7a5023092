//! The supervisor's life, from launch to the exit that is not followed by another start.

use std::fs::File;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use qapi::qmp;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::capped_log::CappedLog;
use super::enospc::EnospcWait;
use super::exit::{Ending, ExitRecord};
use super::launch::{self, Running};
use super::power::{PowerState, power_state};
use super::restart::RestartHistory;
use super::{StartResult, VmContext, boot_slots, memory};
use crate::cid::Cid;
use crate::config::Restart;
use crate::crash;
use crate::error::{Error, ErrorKind, Result};
use crate::host::cgroup::Cgroup;
use crate::host::{clock, memory as host_memory};
use crate::qmp::{Event, power};
use crate::store::record::{Desired, Phase, VmRecord};
use crate::store::{Guard, Rank, atomic};
use crate::sys::{code, pidlock};

/// A guest can write without end to its console, and cause events without end.
const CONSOLE_MAX_BYTES: u64 = 1 << 20;
const EVENTS_MAX_BYTES: u64 = 256 << 10;
/// Room for some events of a full filesystem.
const EVENTS_RESERVED_BYTES: u64 = 16 << 10;
/// A restart gives way to the calls that work on the VM, but not for ever.
const RESTART_TIMEOUT: Duration = Duration::from_secs(600);
/// What QEMU said before it ended is still in the sockets; it comes at once or not at all.
const FINAL_OUTPUT_TIMEOUT: Duration = Duration::from_millis(200);

/// A supervisor is small, and of use when memory is short: the kernel is to end it as one of the last.
const SUPERVISOR_OOM_SCORE_ADJ: i32 = -900;
/// The reason of an end by the kernel, for want of memory: the VM's own by its limit, or the host's.
const OOM_KILL: &str = "oom-kill";

/// How a supervisor gets its QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartMode {
    /// It starts one, when it is its turn.
    Launch {
        /// How long it waits for that.
        queue_deadline: Instant,
    },
    /// It takes over the one that runs, whose supervisor died.
    Adopt,
}

/// Runs the VM until it stays off. The caller is sent through `handshake` how the beginning went. Until then the VM's
/// lock is held here too, as `vm_lock`: nobody works on a VM that is being launched, whatever becomes of the caller.
pub fn supervise(
    context: &VmContext,
    begin: StartMode,
    vm_lock: File,
    handshake: File,
) -> Result<()> {
    host_memory::set_oom_score_adj(std::process::id() as i32, SUPERVISOR_OOM_SCORE_ADJ);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::os("start the event loop", error))?;
    let launched = prepare(context, begin, &runtime).and_then(|(lock, mut supervisor)| {
        let running = match begin {
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
    // A caller that lives has it yet; when it has its answer, nobody else must.
    drop(vm_lock);
    let sent = send_result(handshake, &message);
    crash::point!("caller answered");
    let (_lock, mut supervisor, running) = launched?;
    if !sent && supervisor.vm.phase == Phase::Creating {
        // The call was killed before it could answer: nobody knows this VM, and its address will be given to another.
        return running.qemu.process().signal(nix::sys::signal::Signal::SIGKILL);
    }
    supervisor.run(&runtime, running)
}

/// Takes the supervisor's lock, by which others know that the VM starts or runs. One that starts must have the memory.
fn prepare<'a>(
    context: &'a VmContext,
    begin: StartMode,
    runtime: &tokio::runtime::Runtime,
) -> Result<(File, Supervisor<'a>)> {
    let starts = matches!(begin, StartMode::Launch { .. });
    let _deciding = if starts { Some(memory::lock(context)?) } else { None };
    // Who finds the pid may signal it.
    let signals = Signals::listen(runtime)?;
    atomic::make_dir(&context.paths.run)?;
    let lock = pidlock::lock_self(&context.paths.supervisor_pid())?;
    let supervisor = Supervisor::new(context, signals)?;
    if starts {
        memory::ensure_memory(context, &supervisor.vm)?;
    }
    Ok((lock, supervisor))
}

/// Tells the caller that there will be no launch.
pub fn report_failure(handshake: File, error: &Error) {
    let _ = send_result(handshake, &StartResult::failed(error));
}

/// Whether the caller could be sent.
fn send_result(mut handshake: File, message: &StartResult) -> bool {
    let mut line = serde_json::to_vec(message).expect("a message is plain data");
    line.push(b'\n');
    let sent = handshake.write_all(&line);
    if let Err(error) = &sent {
        tracing::warn!(%error, "the call that started this supervisor is gone");
    }
    sent.is_ok()
}

/// What others want of a supervisor; they are signals.
struct Signals {
    /// The host goes down: the guest is to do so in order.
    terminate: Signal,
    /// A launch is not wanted any more. What runs is not meant.
    cancel_launch: Signal,
}

impl Signals {
    fn listen(runtime: &tokio::runtime::Runtime) -> Result<Self> {
        let _entered = runtime.enter();
        let listen = |kind| signal(kind).map_err(|e| Error::os("watch for signals", e));
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            cancel_launch: listen(SignalKind::user_defined1())?,
        })
    }

    /// When a launch is to end.
    async fn any(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.cancel_launch.recv() => {}
        }
    }
}

struct Supervisor<'a> {
    context: &'a VmContext,
    vm: VmRecord,
    console: CappedLog,
    events: CappedLog,
    restarts: RestartHistory,
    signals: Signals,
}

/// What was learned while QEMU ran.
#[derive(Default)]
struct Run {
    reason: Option<String>,
    host_stopping: bool,
    enospc: EnospcWait,
}

impl<'a> Supervisor<'a> {
    fn new(context: &'a VmContext, signals: Signals) -> Result<Self> {
        let vm = read(context)?.filter(|vm| vm.phase != Phase::Deleting).ok_or_else(|| {
            // The call that started us was killed, and delete_vm is or was here since.
            let _ = atomic::remove_dir(&context.paths.run);
            Error::new(
                ErrorKind::VmNotFound,
                format!("VM '{}' has no record to start from", context.cid),
            )
        })?;
        let mut events =
            CappedLog::open(context.paths.events(), EVENTS_MAX_BYTES, EVENTS_RESERVED_BYTES)?;
        if let Err(error) = events.begin_line() {
            tracing::warn!(error = error.report(), "an event may be lost");
        }
        Ok(Self {
            context,
            vm,
            events,
            console: CappedLog::open(context.paths.console_log(), CONSOLE_MAX_BYTES, 0)?,
            restarts: RestartHistory::default(),
            signals,
        })
    }

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

    fn adopt(&mut self, runtime: &tokio::runtime::Runtime) -> Result<Running> {
        let PowerState::On(process) = power_state(&self.context.paths)? else {
            return Err(Error::new(
                ErrorKind::Host,
                format!("VM '{}' has ended meanwhile", self.context.cid),
            ));
        };
        let running = runtime.block_on(launch::adopt(self.context, process))?;
        self.log_event("adopted", &json!({"pid": running.qemu.process().pid()}));
        Ok(running)
    }

    fn run(&mut self, runtime: &tokio::runtime::Runtime, running: Running) -> Result<()> {
        let mut running = Some(running);
        loop {
            let ending = match running.take() {
                Some(qemu) => {
                    let exit = runtime.block_on(self.watch(qemu));
                    if read(self.context)
                        .is_ok_and(|vm| vm.is_none_or(|vm| vm.phase == Phase::Deleting))
                    {
                        // Nobody will ask how it ended, and delete_vm waits for us.
                        return Ok(());
                    }
                    self.log_event(
                        "exited",
                        &json!({"how": exit.describe(), "ending": format!("{:?}", exit.ending())}),
                    );
                    if let Err(error) = exit.write(&self.context.paths.exit()) {
                        // A full disk is no reason to leave a crashed VM off.
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

    /// Takes the VM's lock if the VM is to be started again, after the back-off. Calls that end a VM say so in its
    /// record first, so the record is asked twice: at once, and again under the lock.
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
        // Its create_vm may still have been at work when it ended. That is over now, and if it is not ready, nobody has it.
        if self.reload_record()? && self.vm.phase == Phase::Ready {
            return Ok(Some(lock));
        }
        if read(self.context)?.is_none() {
            lock.retire()?;
        }
        Ok(None)
    }

    /// Whether the record still wants the run this supervisor is for; takes over what changed in it.
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

    /// Writes down what happens until QEMU is gone.
    async fn watch(&mut self, running: Running) -> ExitRecord {
        // The launch took most of the program's code; the long wait takes little.
        code::release_pages();
        let group = Cgroup::open(self.context.cid.as_str());
        let oom_kills = group.oom_kills();
        let Running { mut qemu, mut monitor, mut serial, enospc } = running;
        let (mut run, mut open, mut buffer) =
            (Run { enospc, ..Run::default() }, (true, true), vec![0; 4096]);
        let mut presses = tokio::time::interval(power::LONGEST_PRESS_INTERVAL);
        let status = loop {
            tokio::select! {
                status = qemu.exited() => break status.unwrap_or(None),
                event = monitor.next_event(), if open.0 => match event {
                    Ok(event) => self.on_event(&event, &mut run),
                    Err(_) => open.0 = false,
                },
                read = serial.read(&mut buffer), if open.1 => match read {
                    Ok(0) | Err(_) => open.1 = false,
                    Ok(length) => self.on_console(&buffer[..length]),
                },
                () = run.enospc.wait_for_check(), if open.0 => match run.enospc.resume_if_space(&mut monitor, qemu.process().pid()).await {
                    Ok(true) => self.log_event("resumed", &json!({"why": "there is room again"})),
                    Ok(false) => {}
                    Err(error) => tracing::warn!(%error, "can not look after a guest that waits for room"),
                },
                // It came too late.
                _ = self.signals.cancel_launch.recv() => {}
                _ = self.signals.terminate.recv() => {
                    // The host is going down: the guest may do so in order, and is wanted again afterwards.
                    run.host_stopping = true;
                    presses.reset_immediately();
                }
                // Again and again: a guest that still boots does not listen.
                _ = presses.tick(), if run.host_stopping => {
                    let pressed = monitor.execute(&qmp::system_powerdown {}).await;
                    self.log_event("power button", &json!({"pressed": pressed.is_ok()}));
                }
            }
        };
        let _ = tokio::time::timeout(FINAL_OUTPUT_TIMEOUT, async {
            while let (true, Ok(event)) = (open.0, monitor.next_event().await) {
                self.on_event(&event, &mut run);
            }
            while let (true, Ok(length @ 1..)) = (open.1, serial.read(&mut buffer).await) {
                self.on_console(&buffer[..length]);
            }
        })
        .await;
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

    fn on_event(&mut self, event: &Event, run: &mut Run) {
        if event.name == "SHUTDOWN" {
            run.reason = event.data["reason"].as_str().map(str::to_owned);
        }
        if event.name == "GUEST_PANICKED" {
            run.reason = Some("guest-panic".into());
        }
        run.enospc.on_event(event.kind());
        self.log_event(&event.name, &event.data);
    }

    /// A log that can not be written must not stop the guest's supervision.
    fn on_console(&mut self, bytes: &[u8]) {
        if let Err(error) = self.console.append(bytes) {
            tracing::warn!(error = error.report(), "console output is lost");
        }
    }

    fn log_event(&mut self, event: &str, data: &Value) {
        // A guest can cause events without end; they are in the capped file.
        tracing::debug!(event, %data);
        let line = json!({"at": clock::now(), "run": self.vm.run, "event": event, "data": data});
        if let Err(error) = self.events.append(format!("{line}\n").as_bytes()) {
            tracing::warn!(error = error.report(), "an event is lost");
        }
    }
}

fn read(context: &VmContext) -> Result<Option<VmRecord>> {
    context.store.read::<VmRecord>(&context.cid)
}
