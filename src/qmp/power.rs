//! Starting, resetting and stopping the machine inside a running QEMU.
//!
//! On [`Connection`], because the supervisor presses the power button too; a CPI call writes
//! `monitor.run(async |c| power::press_button(c, until).await)`.

use std::time::{Duration, Instant};

use qapi::qmp;

use super::connection::Connection;
use super::error::MonitorError;
use super::event::EventKind;
use super::query::{QueryStatus, Status};

/// Time between two presses, doubled after each up to the longest. Those before the guest listens (firmware, early boot,
/// before systemd-logind) are lost; those after it began to shut down do nothing.
const FIRST_PRESS_INTERVAL: Duration = Duration::from_millis(250);
/// The time between two presses in the end.
pub const MAX_PRESS_INTERVAL: Duration = Duration::from_secs(3);

/// What came of the power button.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Powerdown {
    /// The machine is down; QEMU exits or has exited, unless it was told to stay.
    Down,
    /// The machine was still up when the time was over.
    NoAnswer,
}

/// Whether the machine runs, and if not, why.
///
/// # Errors
/// As [`Connection::execute`].
pub async fn status(connection: &mut Connection) -> Result<Status, MonitorError> {
    connection.execute(&QueryStatus {}).await
}

/// Lets the vCPUs run: after `-S`, a pause, or an I/O error whose cause is gone.
///
/// # Errors
/// As [`Connection::execute`].
pub async fn cont(connection: &mut Connection) -> Result<(), MonitorError> {
    connection.execute(&qmp::cont {}).await.map(drop)
}

/// Resets the machine as its reset button does. Disks stay; a pending unplug is carried out.
///
/// # Errors
/// As [`Connection::execute`].
pub async fn reset(connection: &mut Connection) -> Result<(), MonitorError> {
    connection.execute(&qmp::system_reset {}).await.map(drop)
}

/// Presses the power button, again and again, until the machine is down or `until` has passed. A machine whose
/// vCPUs do not run can not answer and is not waited for.
///
/// # Errors
/// As [`Connection::execute`]; that QEMU goes away is no error here.
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

/// Tells QEMU to exit at once: images are flushed, the guest is not asked. QEMU has not exited yet when this returns.
///
/// # Errors
/// As [`Connection::execute`]; that QEMU goes away before it answers is no error here.
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
    fn the_button_reaches_a_guest_that_was_not_there_at_the_first_press() {
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
    fn a_guest_that_ignores_the_button_stays_up_until_told_otherwise() {
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
    fn a_machine_that_is_gone_is_down() {
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
