//! The delete that undoes a create.

use std::fmt;

use crate::cid::{Cid, DiskCid, NetworkCid, SnapshotCid, StemcellCid, VmCid};
use crate::cpi::contract::Contract;
use crate::error::{ErrorKind, Result};

/// The delete that undoes a create, with the cid of the created object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Undo {
    /// Undoes create_stemcell.
    DeleteStemcell(StemcellCid),
    /// Undoes create_vm.
    DeleteVm(VmCid),
    /// Undoes create_disk.
    DeleteDisk(DiskCid),
    /// Undoes snapshot_disk.
    DeleteSnapshot(SnapshotCid),
    /// Undoes create_network.
    DeleteNetwork(NetworkCid),
}

impl Undo {
    /// Deletes the object. Succeeds if it does not exist.
    ///
    /// # Errors
    /// Those of the delete method.
    pub fn run(&self, verbs: &dyn Contract) -> Result<()> {
        let deleted = match self {
            Self::DeleteStemcell(cid) => verbs.delete_stemcell(cid),
            Self::DeleteVm(cid) => verbs.delete_vm(cid),
            Self::DeleteDisk(cid) => verbs.delete_disk(cid),
            Self::DeleteSnapshot(cid) => verbs.delete_snapshot(cid),
            Self::DeleteNetwork(cid) => verbs.delete_network(cid),
        };
        match deleted {
            Err(error)
                if matches!(error.kind(), ErrorKind::DiskNotFound | ErrorKind::NetworkNotFound) =>
            {
                Ok(())
            }
            other => other,
        }
    }

    /// The method that deletes the object, and the object's cid, its only argument.
    pub fn call(&self) -> (&'static str, &str) {
        match self {
            Self::DeleteStemcell(cid) => ("delete_stemcell", cid.as_str()),
            Self::DeleteVm(cid) => ("delete_vm", cid.as_str()),
            Self::DeleteDisk(cid) => ("delete_disk", cid.as_str()),
            Self::DeleteSnapshot(cid) => ("delete_snapshot", cid.as_str()),
            Self::DeleteNetwork(cid) => ("delete_network", cid.as_str()),
        }
    }
}

impl fmt::Display for Undo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (method, cid) = self.call();
        write!(f, "{method} '{cid}'")
    }
}
