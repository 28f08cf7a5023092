//! What BOSH says of a disk: `disks/<cid>/metadata.json`, the object that set_disk_metadata was given, and nothing else.
//!
//! It is a file of its own, with a lock of its own, because a snapshot or a copy of a disk has the disk's lock for hours and
//! may write its record in the end. Neither waits for the other, and neither writes what it knew before over what the other
//! wrote since. A disk that was told nothing since there are such files has its metadata in its record.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::{DiskRecord, Store, atomic};
use crate::cid::DiskCid;
use crate::error::{Error, ErrorKind, Result};

impl Store {
    fn disk_metadata_path(&self, disk: &DiskCid) -> PathBuf {
        self.disk_dir(disk).join("metadata.json")
    }

    /// Writes the metadata of a disk that is there, and that the caller's lock keeps there. Durable when it returns.
    pub fn write_disk_metadata(&self, disk: &DiskCid, metadata: &Map<String, Value>) -> Result<()> {
        atomic::write_json(&self.disk_metadata_path(disk), metadata)
    }

    /// The metadata of a disk.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] naming the file if it can not be understood.
    pub fn disk_metadata(&self, disk: &DiskRecord) -> Result<Map<String, Value>> {
        let path = self.disk_metadata_path(&disk.cid);
        match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map_err(|e| {
                Error::new(ErrorKind::Corrupt, format!("'{}' can not be used: {e}", path.display()))
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
    fn a_record_of_before_has_the_metadata_until_there_is_newer() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(&dir.path().join("state"), &dir.path().join("run"));
        let record = json!({
            "schema": 1, "cid": "disk-aaaaaaaaaaaaaaa", "phase": "ready", "created_at": "", "size": 8, "format": "qcow2",
            "vm": null, "cloud_properties": {}, "metadata": {"owner": "before"},
        });
        let disk: DiskRecord = serde_json::from_value(record).unwrap();
        store.write(&disk).unwrap();
        assert_eq!(store.disk_metadata(&disk).unwrap()["owner"], "before");
        store.write_disk_metadata(&disk.cid, json!({"job": "db"}).as_object().unwrap()).unwrap();
        store.write(&disk).unwrap();
        assert_eq!(
            json!(store.disk_metadata(&disk).unwrap()),
            json!({"job": "db"}),
            "replaced, whoever writes the record"
        );
        std::fs::write(store.disk_metadata_path(&disk.cid), "{").unwrap();
        assert_eq!(store.disk_metadata(&disk).unwrap_err().kind(), ErrorKind::Corrupt);
    }
}
