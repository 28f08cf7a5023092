//! Pins: networks that exist without VMs, made by `network apply` or create_network.
//!
//! `networks/<bridge>.json` has the segment of one bridge, as a VM's record has it. So a start of a
//! VM can make the bridge again after a reboot, and a removal does not depend on the current
//! configuration. Written under the network's lock.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::layout::SCHEMA;
use super::record::Segment;
use super::{Store, atomic};
use crate::error::{Error, ErrorKind, Result};
use crate::link_name::LinkName;

/// The content of `networks/<bridge>.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Pin {
    schema: u32,
    segment: Segment,
}

impl Store {
    fn pin_path(&self, bridge: &LinkName) -> PathBuf {
        self.state_dir().join("networks").join(format!("{bridge}.json"))
    }

    /// Keeps the segment's bridge after its last VM is deleted. Durable when it returns.
    pub fn pin(&self, segment: &Segment) -> Result<()> {
        let path = self.pin_path(&segment.bridge);
        // State directories of old versions have no such directory.
        atomic::make_dir(path.parent().expect("a pin is in a directory"))?;
        let pin = Pin { schema: SCHEMA, segment: segment.clone() };
        atomic::write_json(&path, &pin)
    }

    /// Ends the pin: the bridge is removed with its last VM. Durable when it returns.
    pub fn unpin(&self, bridge: &LinkName) -> Result<()> {
        let path = self.pin_path(bridge);
        if !atomic::entry_exists(&path) {
            return Ok(());
        }
        atomic::remove_file(&path)?;
        atomic::sync_dir(path.parent().expect("a pin is in a directory"))
    }

    /// Whether the bridge exists without VMs.
    pub fn is_pinned(&self, bridge: &LinkName) -> bool {
        atomic::entry_exists(&self.pin_path(bridge))
    }

    /// The segments of all pins, sorted by bridge. Other names in the directory are left out. A
    /// damaged pin is left out with a warning, so that the other networks work.
    pub fn pins(&self) -> Result<Vec<Segment>> {
        let readable = self.read_pins()?.into_iter().filter_map(|(_, pin)| {
            pin.inspect_err(|error| tracing::warn!(error = error.report(), "pin left out")).ok()
        });
        Ok(readable.collect())
    }

    /// The files of damaged pins, with the error of each.
    pub fn damaged_pins(&self) -> Result<Vec<(PathBuf, Error)>> {
        Ok(self
            .read_pins()?
            .into_iter()
            .filter_map(|(path, pin)| Some((path, pin.err()?)))
            .collect())
    }

    /// Path and segment of each pin, sorted by bridge.
    fn read_pins(&self) -> Result<Vec<(PathBuf, Result<Segment>)>> {
        let dir = self.state_dir().join("networks");
        let names = atomic::names(&dir)?.into_iter();
        let mut bridges: Vec<_> =
            names.filter_map(|name| LinkName::parse(name.strip_suffix(".json")?).ok()).collect();
        bridges.sort();
        let pin = |bridge: LinkName| {
            let path = self.pin_path(&bridge);
            let pin = read(&path, &bridge);
            (path, pin)
        };
        Ok(bridges.into_iter().map(pin).collect())
    }
}

fn read(path: &Path, bridge: &LinkName) -> Result<Segment> {
    let corrupt = |why: &str| {
        Error::new(ErrorKind::Corrupt, format!("pin '{}' cannot be used: {why}", path.display()))
            .hint("remove the file, then run `bosh-qemu-cpi network apply`")
    };
    let text = std::fs::read(path).map_err(|error| corrupt(&error.to_string()))?;
    let pin: Pin = serde_json::from_slice(&text).map_err(|error| corrupt(&error.to_string()))?;
    if pin.schema > SCHEMA || pin.segment.bridge != *bridge {
        return Err(corrupt("it is of a newer version, or the pin of another bridge"));
    }
    Ok(pin.segment)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::record::Keeper;

    fn segment(bridge: &str) -> Segment {
        let bridge = LinkName::parse(bridge).unwrap();
        Segment {
            network: "lab".into(),
            bridge,
            mtu: None,
            vlan: None,
            isolated: false,
            keeper: Keeper::Operator,
        }
    }

    #[test]
    fn pins_are_listed_sorted_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path(), dir.path());
        let (one, two) = (segment("br0"), segment("br1"));
        assert_eq!(store.pins().unwrap(), []);
        store.unpin(&one.bridge).unwrap();
        store.pin(&two).unwrap();
        store.pin(&one).unwrap();
        std::fs::write(dir.path().join("networks/a longer name than a link's.json"), "").unwrap();
        std::fs::write(dir.path().join("networks/br2.json"), "{}").unwrap();
        std::os::unix::fs::symlink("/nowhere", dir.path().join("networks/br3.json")).unwrap();
        assert_eq!(store.pins().unwrap(), [one.clone(), two]);
        let damaged = store.damaged_pins().unwrap();
        assert_eq!(
            damaged.iter().map(|(path, _)| path.file_stem().unwrap()).collect::<Vec<_>>(),
            ["br2", "br3"]
        );
        assert!(damaged.iter().all(|(_, error)| error.kind() == ErrorKind::Corrupt));
        let dangling = LinkName::parse("br3").unwrap();
        assert!(store.is_pinned(&dangling), "a dangling symlink counts");
        store.unpin(&dangling).unwrap();
        assert!(!store.is_pinned(&dangling));
        store.unpin(&one.bridge).unwrap();
        assert!(!store.is_pinned(&one.bridge));
        assert_eq!(
            read(&dir.path().join("networks/br2.json"), &one.bridge).unwrap_err().kind(),
            ErrorKind::Corrupt
        );
    }
}
