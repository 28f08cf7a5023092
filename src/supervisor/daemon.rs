//! The supervisor's life, from launch to the exit that is not followed by another start.

use std::fs::File;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use qapi::qmp;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::console_log::CappedLog;
use super::exit::{Ending, ExitRecord};
use super::full::Full;
use super::launch::{self, Running};
use super::restart::Restarts;
use super::{Launched, Scope};
use crate::config::Restart;
use crate::crash;
use crate::error::{Error, ErrorKind, Result};
use crate::host::clock;
use crate::qmp::Event;
use crate::store::record::{Desired, Phase, VmRecord};
use crate::store::{Guard, Rank, atomic};
use crate::sys::pidlock;

/// A guest can write without end to its console, and cause events without end.
const CONSOLE_CAP: u64 = 1 << 20;
const EVENTS_CAP: u64 = 256 << 10;
/// Room for some events of a full filesystem.
const EVENTS_RESERVE: u64 = 16 << 10;
/// A restart gives way to the calls that work on the VM, but not for ever.
const LOCK_PATIENCE: Duration = Duration::from_secs(600);
/// What QEMU said before it ended is still in the sockets; it comes at once or not at all.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// Runs the VM until it stays off. The caller is told through `handshake` how the launch went. Until then the VM's lock
/// is held here too, as `vm_lock`: nobody works on a VM that is being launched, whatever becomes of the caller.
pub fn supervise(scope: &Scope, vm_lock: File, handshake: File) -> Result<()> {
    let lock = atomic::make_dir(&scope.paths.run).and_then(|()| pidlock::lock_self(&scope.paths.supervisor_pid()));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::os("start the event loop", error))?;
    let first = lock.and_then(|lock| Supervisor::new(scope, &runtime).map(|supervisor| (lock, supervisor)));
    let launched = first.and_then(|(lock, mut supervisor)| {
        let running = supervisor.launch(&runtime)?;
        Ok((lock, supervisor, running))
    });
    let message = match &launched {
        Ok(_) => Launched::Running,
        Err(error) => Launched::failed(error),
    };
    crash::point!("launch done");
    let told = tell(handshake, &message);
    crash::point!("caller told");
    let (_lock, mut supervisor, mut running) = launched?;
    if !told && supervisor.vm.phase == Phase::Creating {
        // The call was killed before it could answer: nobody knows this VM, and its address will be given to another.
        running.child.kill()?;
        return Ok(());
    }
    drop(vm_lock);
    supervisor.live(&runtime, running)
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

struct Supervisor<'a> {
    scope: &'a Scope,
    vm: VmRecord,
    console: CappedLog,
    events: CappedLog,
    restarts: Restarts,
    terminate: Signal,
}

/// What was learned while QEMU ran.
#[derive(Default)]
struct Run {
    reason: Option<String>,
    host_stopping: bool,
    full: Full,
}

impl<'a> Supervisor<'a> {
    fn new(scope: &'a Scope, runtime: &tokio::runtime::Runtime) -> Result<Self> {
        let _entered = runtime.enter();
        let vm = read(scope)?.filter(|vm| vm.phase != Phase::Deleting).ok_or_else(|| {
            // The call that started us was killed, and delete_vm is or was here since.
            let _ = atomic::remove_dir(&scope.paths.run);
            Error::new(ErrorKind::VmNotFound, format!("VM '{}' has no record to start from", scope.cid))
        })?;
        Ok(Self {
            scope,
            vm,
            console: CappedLog::open(scope.paths.console_log(), CONSOLE_CAP, 0)?,
            events: CappedLog::open(scope.paths.events(), EVENTS_CAP, EVENTS_RESERVE)?,
            restarts: Restarts::default(),
            terminate: signal(SignalKind::terminate()).map_err(|e| Error::os("watch for SIGTERM", e))?,
        })
    }

    fn launch(&mut self, runtime: &tokio::runtime::Runtime) -> Result<Running> {
        let child = launch::spawn(self.scope, &self.vm)?;
        let running = runtime.block_on(launch::boot(self.scope, &self.vm, child))?;
        self.note("started", &json!({"pid": running.child.process().pid(), "accel": self.vm.machine.accel}));
        Ok(running)
    }

    fn live(&mut self, runtime: &tokio::runtime::Runtime, running: Running) -> Result<()> {
        let mut running = Some(running);
        loop {
            let ending = match running.take() {
                Some(qemu) => {
                    let exit = runtime.block_on(self.watch(qemu));
                    if read(self.scope).is_ok_and(|vm| vm.is_none_or(|vm| vm.phase == Phase::Deleting)) {
                        // Nobody will ask how it ended, and delete_vm waits for us.
                        return Ok(());
                    }
                    self.note("exited", &json!({"how": exit.describe(), "ending": format!("{:?}", exit.ending())}));
                    if let Err(error) = exit.write(&self.scope.paths.exit()) {
                        // A full disk is no reason to leave a crashed VM off.
                        tracing::error!(error = error.report(), "the exit record is lost");
                    }
                    if exit.host_stopping { Ending::Stopped } else { exit.ending() }
                }
                None => Ending::Crashed,
            };
            let Some(lock) = self.may_restart(runtime, ending)? else { return Ok(()) };
            match self.launch(runtime) {
                Ok(qemu) => running = Some(qemu),
                Err(error) => self.note("restart failed", &json!({"error": error.report()})),
            }
            drop(lock);
        }
    }

    /// Takes the VM's lock if the VM is to be started again, after the back-off. Calls that end a VM say so in its
    /// record first, so the record is asked twice: at once, and again under the lock.
    fn may_restart(&mut self, runtime: &tokio::runtime::Runtime, ending: Ending) -> Result<Option<Guard>> {
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
                _ = self.terminate.recv() => true,
            }
        });
        if told_to_end || !self.still_ours()? {
            return Ok(None);
        }
        let lock = self.scope.store.lock(Rank::Vm, &self.scope.cid, Instant::now() + LOCK_PATIENCE)?;
        if !self.still_ours()? {
            return Ok(None);
        }
        Ok(Some(lock))
    }

    /// Whether the record still wants the run this supervisor is for; takes over what changed in it.
    fn still_ours(&mut self) -> Result<bool> {
        let Some(now) = read(self.scope)? else { return Ok(false) };
        let same = now.run == self.vm.run && now.phase == Phase::Ready && now.desired == Desired::Running;
        if same {
            self.vm = now;
        }
        Ok(same)
    }

    /// Writes down what happens until QEMU is gone.
    async fn watch(&mut self, qemu: Running) -> ExitRecord {
        let Running { mut child, mut monitor, mut serial } = qemu;
        let (mut run, mut open, mut buffer) = (Run::default(), (true, true), vec![0; 4096]);
        let status = loop {
            tokio::select! {
                status = child.exited() => break status,
                event = monitor.next_event(), if open.0 => match event {
                    Ok(event) => self.take_event(&event, &mut run),
                    Err(_) => open.0 = false,
                },
                read = serial.read(&mut buffer), if open.1 => match read {
                    Ok(0) | Err(_) => open.1 = false,
                    Ok(length) => self.take_console(&buffer[..length]),
                },
                () = run.full.time_to_look(), if open.0 => match run.full.look(&mut monitor, child.process().pid()).await {
                    Ok(true) => self.note("resumed", &json!({"why": "there is room again"})),
                    Ok(false) => {}
                    Err(error) => tracing::warn!(%error, "can not look after a guest that waits for room"),
                },
                _ = self.terminate.recv() => {
                    // The host is going down: the guest may do so in order, and is wanted again afterwards.
                    run.host_stopping = true;
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
        ExitRecord {
            run: self.vm.run,
            code: status.as_ref().ok().and_then(ExitStatus::code),
            signal: status.as_ref().ok().and_then(ExitStatus::signal),
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
