//! The format of a stemcell's image, as its cloud properties declare it.

use serde_json::{Map, Value};

use crate::error::{Error, ErrorKind, Result};
use crate::store::record::Format;

/// The format that the stemcell declares. Both openstack variants list both formats; only
/// `disk_format` names the one of the image.
pub(super) fn declared(properties: &Map<String, Value>) -> Result<Option<Format>> {
    match properties.get("disk_format").and_then(Value::as_str) {
        None => Ok(None),
        Some("qcow2") => Ok(Some(Format::Qcow2)),
        Some("raw" | "rawdisk") => Ok(Some(Format::Raw)),
        Some(_) => {
            let message = "cloud_properties.disk_format: expected \"qcow2\" or \"raw\"";
            Err(Error::new(ErrorKind::BadRequest, message).hint("use an openstack-kvm stemcell"))
        }
    }
}
