//! Light stemcells: the image is a file that the operator keeps on the host.

use std::path::PathBuf;

use serde_json::{Map, Value};

use crate::digest::Digest;
use crate::document;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::image;
use crate::schema::Property;
use crate::store::record::{Format, Source, VerifiedFile};
use crate::units::Bytes;

document! {
    /// Cloud properties of a light stemcell, which names an image instead of carrying one (format
    /// `qemu-light`).
    pub struct LightStemcell {
        /// Path of the image on the host, qcow2 or raw. VMs are overlays of it; it must not change
        /// or move. A start of a VM from a changed image is refused.
        image_path: PathBuf;
        /// Its SHA-256, 64 hexadecimal digits.
        sha256: Digest;
    }
}

/// The image of a new stemcell.
pub(super) struct NewImage {
    pub format: Format,
    pub virtual_size: Bytes,
    /// The operator's file, of a light stemcell.
    pub path: Option<PathBuf>,
    /// The file that was imported, of any other.
    pub source: Option<Source>,
    /// What was verified of the operator's file.
    pub verified: Option<VerifiedFile>,
}

/// Reads the cloud properties of a light stemcell.
pub(super) fn properties(properties: &Map<String, Value>) -> Result<LightStemcell> {
    let keys = ["image_path", "sha256"].iter().filter_map(|key| properties.get_key_value(*key));
    let given = Value::Object(keys.map(|(k, v)| (k.clone(), v.clone())).collect());
    LightStemcell::from_json(&given).map_err(|e| e.in_request("cloud_properties"))
}

/// Checks the image of a light stemcell. A call from another machine may only name images in the
/// `allowed` directories.
pub(super) fn image(light: &LightStemcell, allowed: Option<&[PathBuf]>) -> Result<NewImage> {
    let path = light.image_path.canonicalize().at("resolve", &light.image_path);
    let is_in = |dir: &PathBuf| {
        let dir = dir.canonicalize().ok();
        dir.is_some_and(|dir| path.as_ref().is_ok_and(|path| path.starts_with(dir)))
    };
    if !allowed.is_none_or(|dirs| dirs.iter().any(is_in)) {
        // The same answer whether or not the file exists: a remote caller must not learn that.
        let message =
            "cloud_properties.image_path: not in one of this host's 'remote_callers.image_dirs'";
        return Err(Error::new(ErrorKind::BadRequest, message)
            .hint("the host's operator allows directories there"));
    }
    let path = path?;
    // Inspected first: reading a pipe or a device might never end.
    let (format, virtual_size) = image::inspect(&path)?;
    // Before the digest: a change while it is computed must not stay unnoticed.
    let verified = VerifiedFile::new(&path.metadata().at("look at", &path)?, light.sha256);
    light.sha256.ensure_matches(&path)?;
    let verified = Some(verified);
    Ok(NewImage { format, virtual_size, path: Some(path), source: None, verified })
}
