//! Which state directory something in the kernel belongs to.

use std::fmt;
use std::os::unix::fs::MetadataExt;

use super::Store;
use crate::error::{IoContext, Result};

/// A word for one state directory: its filesystem's number and its own. What bears it lives in the kernel and is gone after
/// a reboot, so both stay what they are for as long as it matters; a copy of the directory is another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner(String);

impl Owner {
    /// The word, of hexadecimal digits and a dot.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Store {
    /// The word for this state directory, which must be there.
    pub fn owner(&self) -> Result<Owner> {
        let meta = self.state_dir().metadata().at("look at", self.state_dir())?;
        Ok(Owner(format!("{:x}.{:x}", meta.dev(), meta.ino())))
    }
}
