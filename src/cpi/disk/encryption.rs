//! The key of encrypted disks, which a running QEMU has only while it opens one.

use serde_json::json;

use crate::cid::DiskCid;
use crate::cpi::context::Context;
use crate::error::Result;
use crate::qemu::blockdev::SECRET;
use crate::qmp::error::MonitorError;
use crate::qmp::hotplug::HotplugError;
use crate::qmp::monitor::Monitor;
use crate::store::DiskKey;
use crate::store::disk_key::WRONG_KEY;

/// Runs `open`, which opens an image of `disk`, while QEMU has the key. The key opens every disk of
/// this host, so it is removed from QEMU whether or not `open` succeeds; the image stays open.
///
/// # Errors
/// [`ErrorKind::BadConfig`](crate::error::ErrorKind::BadConfig) if the key is missing or does not
/// open the disk.
pub(super) fn with_key<T>(
    cx: &Context,
    monitor: &mut Monitor,
    disk: &DiskCid,
    open: impl FnOnce(&mut Monitor) -> Result<T, HotplugError>,
) -> Result<T> {
    // A call that was killed below has left it.
    remove_key(monitor)?;
    let key = DiskKey::from_config(&cx.config);
    let text = key.read()?;
    monitor.raw("object-add", &json!({"qom-type": "secret", "id": SECRET, "data": text.0}))?;
    let opened = open(monitor);
    let removed = remove_key(monitor);
    let opened = opened.map_err(|error| match &error {
        HotplugError::Monitor(refused) if refused.refused_with(WRONG_KEY) => {
            key.wrong_key_error(Some(disk))
        }
        _ => error.into(),
    })?;
    removed?;
    Ok(opened)
}

fn remove_key(monitor: &mut Monitor) -> Result<(), MonitorError> {
    match monitor.raw("object-del", &json!({"id": SECRET})) {
        Err(error) if !error.refused_with("not found") => Err(error),
        _ => Ok(()),
    }
}
