//! The key of encrypted disks, lent to a running QEMU while it opens one.

use serde_json::json;

use super::Cpi;
use crate::cid::DiskCid;
use crate::error::Result;
use crate::qemu::blockdev::SECRET;
use crate::qmp::error::MonitorError;
use crate::qmp::hotplug::HotplugError;
use crate::qmp::monitor::Monitor;
use crate::store::DiskKey;
use crate::store::disk_key::WRONG_KEY;

impl Cpi {
    /// Runs `opening`, which opens an image of `disk`, while QEMU has the key. The key opens every disk of this host, so QEMU
    /// forgets it again whatever comes of it; the image stays open.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::BadConfig`] when the key is missing, or is not the disk's.
    pub(super) fn with_key<T>(
        &self,
        monitor: &mut Monitor,
        disk: &DiskCid,
        opening: impl FnOnce(&mut Monitor) -> Result<T, HotplugError>,
    ) -> Result<T> {
        // A call that was killed in here left it.
        forget(monitor)?;
        let key = DiskKey::from_config(&self.config);
        let text = key.read()?;
        monitor.raw("object-add", &json!({"qom-type": "secret", "id": SECRET, "data": text.0}))?;
        let opened = opening(monitor);
        let forgotten = forget(monitor);
        let opened = opened.map_err(|error| match &error {
            HotplugError::Monitor(refused) if refused.refused_with(WRONG_KEY) => {
                key.wrong_key_error(Some(disk))
            }
            _ => error.into(),
        })?;
        forgotten?;
        Ok(opened)
    }
}

fn forget(monitor: &mut Monitor) -> Result<(), MonitorError> {
    match monitor.raw("object-del", &json!({"id": SECRET})) {
        Err(error) if !error.refused_with("not found") => Err(error),
        _ => Ok(()),
    }
}
