//! The config drive: a FAT image on a read-only virtio disk, attached for the VM's whole life.
//!
//! The agent of an openstack-kvm stemcell mounts the filesystem with the label `config-2` or
//! `CONFIG-2` (FAT labels are upper case). It reads the settings and `meta-data.json`. Without the
//! latter it queries a metadata server, which does not exist here, and never starts (bosh-agent
//! `config_drive_settings_source.go`). It reads both again at every start and at every disk action.
//! A Director's env has about 6 kB; no limit is near that.

use std::path::Path;

use crate::error::Result;
use crate::image::{UnsyncedFile, fat};

/// The label, by which the guest finds the drive under `/dev/disk/by-label`.
pub const LABEL: &str = "CONFIG-2";
const SETTINGS: &str = "ec2/latest/user-data";
const META_DATA: &str = "ec2/latest/meta-data.json";

/// Writes a config drive with `settings` to `path`, mode 0600.
pub fn write(path: &Path, settings: &[u8]) -> Result<UnsyncedFile> {
    fat::write_labelled(path, LABEL, &[(SETTINGS, settings), (META_DATA, b"{}")])
}
