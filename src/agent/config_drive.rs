//! The config drive: a FAT image on a read-only virtio disk, there for the VM's whole life.
//!
//! An openstack-kvm stemcell's agent mounts whatever has the label `config-2` or `CONFIG-2` (FAT labels are upper
//! case) and reads two files: the settings, and `meta-data.json`, without which it turns to a metadata server that
//! is not there and never gets up (bosh-agent `config_drive_settings_source.go`). It reads them again at every start
//! and at every disk action. There is no limit near the 6 kB a Director's env has.

use std::path::Path;

use crate::error::Result;
use crate::image::{UnsyncedFile, fat};

/// The label, which the guest finds under `/dev/disk/by-label`.
pub const LABEL: &str = "CONFIG-2";
const SETTINGS: &str = "ec2/latest/user-data";
const META_DATA: &str = "ec2/latest/meta-data.json";

/// Writes the config drive `path`, mode 0600, with `settings` on it.
pub fn write(path: &Path, settings: &[u8]) -> Result<UnsyncedFile> {
    fat::write_labelled(path, LABEL, &[(SETTINGS, settings), (META_DATA, b"{}")])
}
