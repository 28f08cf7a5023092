//! The supervisor's life, from launch to the exit that is not followed by another start.

use std::fs::File;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use qapi::qmp;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::console_log::CappedLog;
use super::exit::{Ending, ExitRecord};
use super::full::Full;
use super::launch::{self, Running};
use super::power::{PowerState, power_state};
use super::restart::Restarts;
use super::{Launched, Scope, boot, memory};
use crate::cid::Cid;
use crate::config::Restart;
use crate::crash;
use crate::error::{Error, ErrorKind, Result};
use crate::host::cgroup::Cgroup;
use crate::host::{clock, memory as memory_of_host};
use crate::qmp::{Event, power};
use crate::store::record::{Desired, Phase, VmRecord};
use crate::store::{Guard, Rank, atomic};
use crate::sys::{code, pidlock};

/// A guest can write without end to its console, and cause events without end.
const CONSOLE_CAP: u64 = 1 << 20;
const EVENTS_CAP: u64 = 256 << 10;
/// Room for some events of a full filesystem.
const EVENTS_RESERVE: u64 = 16 << 10;
/// A restart gives way to the calls that work on the VM, but not for ever.
const LOCK_PATIENCE: Duration = Duration::from_secs(600);
/// What QEMU said before it ended is still in the sockets; it comes at once or not at all.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// A supervisor is small, and of use when memory is short: the kernel is to end it as one of the last.
const SPARED: i32 = -900;
/// The reason of an end by the kernel, for want of memory: the VM's own by its limit, or the host's.
const OOM_KILL: &str = "oom-kill";

/// How a supervisor gets its QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    /// It starts one, when it is its turn.
    Launch {
        /// How long it waits for that.
        queue_until: Instant,
    },
    /// It takes over the one that runs, whose supervisor died.
    Adopt,
}

/// Runs the VM until it stays off. The caller is told through `handshake` how the beginning went. Until then the VM's
/// lock is held here too, as `vm_lock`: nobody works on a VM that is being launched, whatever becomes of the caller.
pub fn supervise(scope: &Scope, begin: Begin, vm_lock: File, handshake: File) -> Result<()> {
    memory_of_host::prefer_ending(std::process::id() as i32, SPARED);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::os("start the event loop", error))?;
    let launched = admitted(scope, begin, &runtime).and_then(|(lock, mut supervisor)| {
        let running = match begin {
            Begin::Launch { queue_until } => supervisor.launch(&runtime, queue_until)?,
            Begin::Adopt => supervisor.adopt(&runtime)?,
        };
        Ok((lock, supervisor, running))
    });
    let message = match &launched {
        Ok(_) => Launched::Running,
        Err(error) => Launched::failed(error),
    };
    crash::point!("launch done");
    // A caller that lives has it yet; when it has its answer, nobody else must.
    drop(vm_lock);
    let told = tell(handshake, &message);
    crash::point!("caller told");
    let (_lock, mut supervisor, running) = launched?;
    if !told && supervisor.vm.phase == Phase::Creating {
        // The call was killed before it could answer: nobody knows this VM, and its address will be given to another.
        return running.qemu.process().signal(nix::sys::signal::Signal::SIGKILL);
    }
    supervisor.live(&runtime, running)
}

/// Takes the supervisor's lock, by which others know that the VM starts or runs. One that starts must have the memory.
fn admitted<'a>(
    scope: &'a Scope,
    begin: Begin,
    runtime: &tokio::runtime::Runtime,
) -> Result<(File, Supervisor<'a>)> {
    let starts = matches!(begin, Begin::Launch { .. });
    let _deciding = if starts { Some(memory::lock(scope)?) } else { None };
    // Who finds the pid may signal it.
    let orders = Orders::hear(runtime)?;
    atomic::make_dir(&scope.paths.run)?;
    let lock = pidlock::lock_self(&scope.paths.supervisor_pid())?;
    let supervisor = Supervisor::new(scope, orders)?;
    if starts {
        memory::admit(scope, &supervisor.vm)?;
    }
    Ok((lock, supervisor))
}

/// Tells the caller that there will be no launch.
pub fn refuse(handshake: File, error: &Error) {
    let _ = tell(handshake, &Launched::failed(error));
}

/// Whether the caller could be told.
fn tell(mut handshake: File, message: &Launched) -> bool {
    let mut line = serde_json::to_vec(message).expect("a message is plain data");
    line.push(b'\n');
    let told = handshake.write_all(&line);
    if let Err(error) = &told {
        tracing::warn!(%error, "the call that started this supervisor is gone");
    }
    told.is_ok()
}

/// What others want of a supervisor; they are signals.
struct Orders {
    /// The host goes down: the guest is to do so in order.
    end: Signal,
    /// A launch is not wanted any more. What runs is not meant.
    call_off: Signal,
}

impl Orders {
    fn hear(runtime: &tokio::runtime::Runtime) -> Result<Self> {
        let _entered = runtime.enter();
        let hear = |kind| signal(kind).map_err(|e| Error::os("watch for signals", e));
        Ok(Self {
            end: hear(SignalKind::terminate())?,
            call_off: hear(SignalKind::user_defined1())?,
        })
    }

    /// When a launch is to end.
    async fn either(&mut self) {
        tokio::select! {
            _ = self.end.recv() => {}
            _ = self.call_off.recv() => {}
        }
    }
}

struct Supervisor<'a> {
    scope: &'a Scope,
    vm: VmRecord,
    console: CappedLog,
    events: CappedLog,
    restarts: Restarts,
    orders: Orders,
}

/// What was learned while QEMU ran.
#[derive(Default)]
struct Run {
    reason: Option<String>,
    host_stopping: bool,
    full: Full,
}

impl<'a> Supervisor<'a> {
    fn new(scope: &'a Scope, orders: Orders) -> Result<Self> {
        let vm = read(scope)?.filter(|vm| vm.phase != Phase::Deleting).ok_or_else(|| {
            // The call that started us was killed, and delete_vm is or was here since.
            let _ = atomic::remove_dir(&scope.paths.run);
            Error::new(
                ErrorKind::VmNotFound,
                format!("VM '{}' has no record to start from", scope.cid),
            )
        })?;
        let mut events = CappedLog::open(scope.paths.events(), EVENTS_CAP, EVENTS_RESERVE)?;
        if let Err(error) = events.begin_line() {
            tracing::warn!(error = error.report(), "an event may be lost");
        }
        Ok(Self {
            scope,
            vm,
            events,
            console: CappedLog::open(scope.paths.console_log(), CONSOLE_CAP, 0)?,
            restarts: Restarts::default(),
            orders,
        })
    }

    fn launch(
        &mut self,
        runtime: &tokio::runtime::Runtime,
        queue_until: Instant,
    ) -> Result<Running> {
        let _slot = runtime.block_on(async {
            tokio::select! {
                slot = boot::slot(self.scope, queue_until) => slot,
                () = self.orders.either() => Err(launch::called_off(self.scope)),
            }
        })?;
        let child = launch::spawn(self.scope, &self.vm)?;
        let running =
            runtime.block_on(launch::boot(self.scope, &self.vm, child, self.orders.either()))?;
        self.note(
            "started",
            &json!({"pid": running.qemu.process().pid(), "accel": self.vm.machine.accel}),
        );
        Ok(running)
    }

    fn adopt(&mut self, runtime: &tokio::runtime::Runtime) -> Result<Running> {
        let PowerState::On(process) = power_state(&self.scope.paths)? else {
            return Err(Error::new(
                ErrorKind::Host,
                format!("VM '{}' has ended meanwhile", self.scope.cid),
            ));
        };
        let running = runtime.block_on(launch::adopt(self.scope, process))?;
        self.note("adopted", &json!({"pid": running.qemu.process().pid()}));
        Ok(running)
    }

    fn live(&mut self, runtime: &tokio::runtime::Runtime, running: Running) -> Result<()> {
        let mut running = Some(running);
        loop {
            let ending = match running.take() {
                Some(qemu) => {
                    let exit = runtime.block_on(self.watch(qemu));
                    if read(self.scope)
                        .is_ok_and(|vm| vm.is_none_or(|vm| vm.phase == Phase::Deleting))
                    {
                        // Nobody will ask how it ended, and delete_vm waits for us.
                        return Ok(());
                    }
                    self.note(
                        "exited",
                        &json!({"how": exit.describe(), "ending": format!("{:?}", exit.ending())}),
                    );
                    if let Err(error) = exit.write(&self.scope.paths.exit()) {
                        // A full disk is no reason to leave a crashed VM off.
                        tracing::error!(error = error.report(), "the exit record is lost");
                    }
                    if exit.host_stopping { Ending::Stopped } else { exit.ending() }
                }
                None => Ending::Crashed,
            };
            let Some(lock) = self.may_restart(runtime, ending)? else { return Ok(()) };
            match self.launch(runtime, Instant::now() + LOCK_PATIENCE) {
                Ok(qemu) => running = Some(qemu),
                Err(error) => self.note("restart failed", &json!({"error": error.report()})),
            }
            drop(lock);
        }
    }

    /// Takes the VM's lock if the VM is to be started again, after the back-off. Calls that end a VM say so in its
    /// record first, so the record is asked twice: at once, and again under the lock.
    fn may_restart(
        &mut self,
        runtime: &tokio::runtime::Runtime,
        ending: Ending,
    ) -> Result<Option<Guard>> {
        let wanted = ending == Ending::Crashed && self.scope.config.restart == Restart::OnCrash;
        if !wanted || !self.still_ours()? {
            return Ok(None);
        }
        let Some(wait) = self.restarts.next(Instant::now()) else {
            self.note("gave up", &json!({"why": "crashed too often"}));
            return Ok(None);
        };
        self.note("restarting", &json!({"in_seconds": wait.as_secs()}));
        let told_to_end = runtime.block_on(async {
            tokio::select! {
                () = tokio::time::sleep(wait) => false,
                _ = self.orders.end.recv() => true,
            }
        });
        if told_to_end || !self.still_ours()? {
            return Ok(None);
        }
        let lock =
            self.scope.store.lock(Rank::Vm, &self.scope.cid, Instant::now() + LOCK_PATIENCE)?;
        // Its create_vm may still have been at work when it ended. That is over now, and if it is not ready, nobody has it.
        if self.still_ours()? && self.vm.phase == Phase::Ready {
            return Ok(Some(lock));
        }
        if read(self.scope)?.is_none() {
            lock.unlink()?;
        }
        Ok(None)
    }

    /// Whether the record still wants the run this supervisor is for; takes over what changed in it.
    fn still_ours(&mut self) -> Result<bool> {
        let Some(now) = read(self.scope)? else { return Ok(false) };
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
        code::let_go();
        let group = Cgroup::open(self.scope.cid.as_str());
        let oom_kills = group.oom_kills();
        let Running { mut qemu, mut monitor, mut serial, full } = running;
        let (mut run, mut open, mut buffer) =
            (Run { full, ..Run::default() }, (true, true), vec![0; 4096]);
        let mut presses = tokio::time::interval(power::LONGEST_PRESS_INTERVAL);
        let status = loop {
            tokio::select! {
                status = qemu.exited() => break status.unwrap_or(None),
                event = monitor.next_event(), if open.0 => match event {
                    Ok(event) => self.take_event(&event, &mut run),
                    Err(_) => open.0 = false,
                },
                read = serial.read(&mut buffer), if open.1 => match read {
                    Ok(0) | Err(_) => open.1 = false,
                    Ok(length) => self.take_console(&buffer[..length]),
                },
                () = run.full.time_to_look(), if open.0 => match run.full.look(&mut monitor, qemu.process().pid()).await {
                    Ok(true) => self.note("resumed", &json!({"why": "there is room again"})),
                    Ok(false) => {}
                    Err(error) => tracing::warn!(%error, "can not look after a guest that waits for room"),
                },
                // It came too late.
                _ = self.orders.call_off.recv() => {}
                _ = self.orders.end.recv() => {
                    // The host is going down: the guest may do so in order, and is wanted again afterwards.
                    run.host_stopping = true;
                    presses.reset_immediately();
                }
                // Again and again: a guest that still boots does not listen.
                _ = presses.tick(), if run.host_stopping => {
                    let pressed = monitor.execute(&qmp::system_powerdown {}).await;
                    self.note("power button", &json!({"pressed": pressed.is_ok()}));
                }
            }
        };
        let _ = tokio::time::timeout(LAST_WORDS, async {
            while let (true, Ok(event)) = (open.0, monitor.next_event().await) {
                self.take_event(&event, &mut run);
            }
            while let (true, Ok(length @ 1..)) = (open.1, serial.read(&mut buffer).await) {
                self.take_console(&buffer[..length]);
            }
        })
        .await;
        if run.reason.is_none() && group.oom_kills() > oom_kills {
            run.reason = Some(OOM_KILL.to_owned());
            self.note("out of memory", &json!({"memory_mib": self.vm.machine.ram}));
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

    fn take_event(&mut self, event: &Event, run: &mut Run) {
        if event.name == "SHUTDOWN" {
            run.reason = event.data["reason"].as_str().map(str::to_owned);
        }
        if event.name == "GUEST_PANICKED" {
            run.reason = Some("guest-panic".into());
        }
        run.full.take(event.kind());
        self.note(&event.name, &event.data);
    }

    /// A log that can not be written must not stop the guest's supervision.
    fn take_console(&mut self, bytes: &[u8]) {
        if let Err(error) = self.console.append(bytes) {
            tracing::warn!(error = error.report(), "console output is lost");
        }
    }

    fn note(&mut self, event: &str, data: &Value) {
        // A guest can cause events without end; they are in the capped file.
        tracing::debug!(event, %data);
        let line = json!({"at": clock::now(), "run": self.vm.run, "event": event, "data": data});
        if let Err(error) = self.events.append(format!("{line}\n").as_bytes()) {
            tracing::warn!(error = error.report(), "an event is lost");
        }
    }
}

fn read(scope: &Scope) -> Result<Option<VmRecord>> {
    scope.store.read::<VmRecord>(&scope.cid)
}
