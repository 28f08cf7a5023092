//! The signals that a supervisor handles.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::error::{Error, Result};

/// The signals by which other processes control a supervisor.
pub(super) struct Signals {
    /// SIGTERM: a running guest gets the power button, because the host shuts down. In any other
    /// state the supervisor ends.
    pub(super) terminate: Signal,
    /// SIGUSR1: cancels a launch; has no effect on a running guest.
    pub(super) cancel_launch: Signal,
}

impl Signals {
    /// Installs the handlers. Must be called before another process can find this one.
    pub(super) fn listen(runtime: &tokio::runtime::Runtime) -> Result<Self> {
        let _entered = runtime.enter();
        let listen = |kind| signal(kind).map_err(|e| Error::os("watch for signals", e));
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            cancel_launch: listen(SignalKind::user_defined1())?,
        })
    }

    /// Waits for either signal: both cancel a launch.
    pub(super) async fn any(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.cancel_launch.recv() => {}
        }
    }
}
