//! Starts, resets and stops the machine of a running QEMU.
//!
//! The functions take a [`Connection`], because the supervisor uses them too. A CPI call writes
//! `monitor.run(async |c| power::press_button(c, until).await)`.

use std::time::{Duration, Instant};

use qapi::qmp;

use super::connection::Connection;
use super::error::MonitorError;
use super::event::EventKind;
use super::query::{QueryStatus, Status};

/// Time between the first two presses of the power button, doubled up to [`MAX_PRESS_INTERVAL`].
/// The guest misses presses before it listens (firmware, early boot, before systemd-logind) and
/// ignores those during its shutdown.
const FIRST_PRESS_INTERVAL: Duration = Duration::from_millis(250);
/// Longest time between two presses of the power button.
pub const MAX_PRESS_INTERVAL: Duration = Duration::from_secs(3);

/// Result of pressing the power button.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Powerdown {
    /// The machine is down. QEMU exits or has exited, unless `-no-shutdown` keeps it running.
    Down,
    /// The machine was still up at the end of the wait.
    NoAnswer,
}

/// Returns whether the machine runs, and its state.
///
/// # Errors
/// Those of [`Connection::execute`].
pub async fn status(connection: &mut Connection) -> Result<Status, MonitorError> {
    connection.execute(&QueryStatus {}).await
}

/// Lets the vCPUs run: after `-S`, a pause, or an I/O error whose cause is repaired.
///
/// # Errors
/// Those of [`Connection::execute`].
pub async fn cont(connection: &mut Connection) -> Result<(), MonitorError> {
    connection.execute(&qmp::cont {}).await.map(drop)
}

/// Resets the machine, as its reset button does. Disks stay attached; a pending unplug completes.
///
/// # Errors
/// Those of [`Connection::execute`].
pub async fn reset(connection: &mut Connection) -> Result<(), MonitorError> {
    connection.execute(&qmp::system_reset {}).await.map(drop)
}

/// Presses the power button repeatedly until the machine is down or `until` has passed. A machine
/// whose vCPUs are stopped cannot react, so the function returns at once.
///
/// # Errors
/// Those of [`Connection::execute`], except that an exit of QEMU is success.
pub async fn press_button(
    connection: &mut Connection,
    until: Instant,
) -> Result<Powerdown, MonitorError> {
    match press_until_down(connection, until).await {
        Err(MonitorError::Closed) => Ok(Powerdown::Down),
        other => other,
    }
}

async fn press_until_down(
    connection: &mut Connection,
    until: Instant,
) -> Result<Powerdown, MonitorError> {
    if !status(connection).await?.running {
        return Ok(Powerdown::NoAnswer);
    }
    let mut interval = FIRST_PRESS_INTERVAL;
    loop {
        connection.execute(&qmp::system_powerdown {}).await?;
        let next = until.min(Instant::now() + interval);
        interval = MAX_PRESS_INTERVAL.min(interval * 2);
        let shutdown = |event: &super::Event| matches!(event.kind(), EventKind::Shutdown { .. });
        if connection.wait_event(shutdown, next).await?.is_some() {
            return Ok(Powerdown::Down);
        }
        if Instant::now() >= until {
            return Ok(Powerdown::NoAnswer);
        }
    }
}

/// Tells QEMU to exit at once: it flushes images and does not ask the guest. QEMU has not exited
/// yet when this returns.
///
/// # Errors
/// Those of [`Connection::execute`], except that an exit of QEMU before its reply is success.
pub async fn quit(connection: &mut Connection) -> Result<(), MonitorError> {
    match connection.execute(&qmp::quit {}).await {
        Err(MonitorError::Closed) => Ok(()),
        other => other.map(drop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmp::testing::{Guest, Image, test_deadline};

    #[test]
    fn button_is_pressed_again_until_the_guest_listens() {
        let mut guest = Guest::new(Image::Answering, 0);
        let mut monitor = guest.monitor();
        assert!(monitor.run(async |c| status(c).await).unwrap().is_prelaunch());
        monitor.run(async |c| cont(c).await).unwrap();
        assert_eq!(
            monitor.run(async |c| press_button(c, test_deadline()).await).unwrap(),
            Powerdown::Down
        );
        assert_eq!(guest.wait(), Some(0));
    }

    #[test]
    fn guest_that_ignores_the_button_stays_up_until_quit() {
        let mut guest = Guest::booted(Image::Mute, 0);
        let mut monitor = guest.monitor();
        let soon = Instant::now() + Duration::from_millis(300);
        assert_eq!(
            monitor.run(async |c| press_button(c, soon).await).unwrap(),
            Powerdown::NoAnswer
        );
        assert!(monitor.run(async |c| status(c).await).unwrap().running);
        monitor.run(async |c| reset(c).await).unwrap();
        guest.wait_for("BOOTSECTOR-OK");
        monitor.run(async |c| quit(c).await).unwrap();
        assert_eq!(guest.wait(), Some(0));
    }

    #[test]
    fn machine_whose_qemu_has_exited_is_down() {
        let mut guest = Guest::booted(Image::Answering, 0);
        let mut monitor = guest.monitor();
        guest.type_byte(b'q');
        assert_eq!(guest.wait(), Some(0));
        assert_eq!(
            monitor.run(async |c| press_button(c, test_deadline()).await).unwrap(),
            Powerdown::Down
        );
    }
}
