//! The metadata of a disk: `disks/<cid>/metadata.json`, the object of the last set_disk_metadata.
//!
//! It has its own file and its own lock. A snapshot or a copy of a disk holds the disk's lock for
//! hours and may write the record at its end. So set_disk_metadata does not wait for the copy, and
//! neither overwrites the other's change. Old versions kept the metadata in the record, and it
//! stays there until the next set_disk_metadata.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::{DiskRecord, Store, atomic};
use crate::cid::DiskCid;
use crate::error::{Error, ErrorKind, Result};

impl Store {
    fn disk_metadata_path(&self, disk: &DiskCid) -> PathBuf {
        self.disk_dir(disk).join("metadata.json")
    }

    /// Writes the metadata of an existing disk. The caller's lock keeps the disk from being
    /// deleted. Durable when it returns.
    pub fn write_disk_metadata(&self, disk: &DiskCid, metadata: &Map<String, Value>) -> Result<()> {
        atomic::write_json(&self.disk_metadata_path(disk), metadata)
    }

    /// The metadata of a disk.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] naming the file if it is not a JSON object.
    pub fn disk_metadata(&self, disk: &DiskRecord) -> Result<Map<String, Value>> {
        let path = self.disk_metadata_path(&disk.cid);
        match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map_err(|e| {
                Error::new(ErrorKind::Corrupt, format!("'{}' cannot be used: {e}", path.display()))
                    .hint("remove the file: set_disk_metadata writes it again")
            }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(disk.metadata.clone()),
            Err(error) => Err(Error::io("read", &path, error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_old_records_metadata_counts_until_newer_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(&dir.path().join("state"), &dir.path().join("run"));
        let record = json!({
            "schema": 1, "cid": "disk-aaaaaaaaaaaaaaa", "phase": "ready", "created_at": "",
            "size": 8, "format": "qcow2", "vm": null, "cloud_properties": {}, "metadata": {"owner": "before"},
        });
        let disk: DiskRecord = serde_json::from_value(record).unwrap();
        store.write(&disk).unwrap();
        assert_eq!(store.disk_metadata(&disk).unwrap()["owner"], "before");
        store.write_disk_metadata(&disk.cid, json!({"job": "db"}).as_object().unwrap()).unwrap();
        store.write(&disk).unwrap();
        assert_eq!(
            json!(store.disk_metadata(&disk).unwrap()),
            json!({"job": "db"}),
            "a write of the record does not restore the old metadata"
        );
        std::fs::write(store.disk_metadata_path(&disk.cid), "{").unwrap();
        assert_eq!(store.disk_metadata(&disk).unwrap_err().kind(), ErrorKind::Corrupt);
    }
}
