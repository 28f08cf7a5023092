//! The buttons of a VM.

use std::time::{Duration, Instant};

use qapi::qmp;

use super::connection::MonitorError;
use super::monitor::Monitor;
use crate::error::{Error, ErrorKind, Result};

/// A press is lost on a guest whose logind is not up yet, so it is repeated.
const AGAIN: Duration = Duration::from_secs(5);

/// Presses the power button until the guest powers off.
///
/// # Errors
/// [`ErrorKind::Timeout`] at `deadline`.
pub fn power_down(monitor: &mut Monitor, deadline: Instant) -> Result<()> {
    loop {
        match monitor.execute(&qmp::system_powerdown {}) {
            Ok(_) => {}
            // QEMU ends when its guest does.
            Err(MonitorError::Gone { .. }) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let until = deadline.min(Instant::now() + AGAIN);
        match monitor.wait_for(until, |event| (event.name == "SHUTDOWN").then_some(())) {
            Ok(Some(())) | Err(MonitorError::Gone { .. }) => return Ok(()),
            Ok(None) if Instant::now() < deadline => {}
            Ok(None) => {
                return Err(Error::new(ErrorKind::Timeout, "the guest did not follow its power button in time"));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Ends QEMU in order: it writes back what it caches of its images.
pub fn quit(monitor: &mut Monitor) -> Result<()> {
    match monitor.execute(&qmp::quit {}) {
        Ok(_) | Err(MonitorError::Gone { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
