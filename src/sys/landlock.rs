//! Landlock rules: which paths a confined program may open. They are made before the fork, where
//! errors can still be reported in full.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetCreatedAttr,
    path_beneath_rules,
};

use crate::config::Hardening;
use crate::error::{Error, ErrorKind, Result};

/// The newest Landlock version whose access rights are used. An older kernel ignores the rights it
/// does not know.
const LANDLOCK: ABI = ABI::V5;

/// Paths a confined program may open.
#[derive(Debug, Default)]
pub struct Paths {
    /// For reading and executing.
    pub read: Vec<PathBuf>,
    /// For reading and writing.
    pub write: Vec<PathBuf>,
}

impl Paths {
    /// Returns the paths that QEMU opens by itself: its libraries, firmware and modules, and the
    /// files that the C library and glib read. None of them is a directory that QEMU could write
    /// to.
    pub fn of_qemu(binary: &Path) -> Self {
        // A QEMU outside /usr has its firmware and libraries beside it: /opt/qemu/bin/… needs
        // /opt/qemu.
        let prefix =
            binary.parent().and_then(Path::parent).filter(|prefix| prefix.parent().is_some());
        let fixed = [
            "/usr",
            "/lib",
            "/lib64",
            "/etc/ld.so.cache",
            "/proc",
            "/sys/devices/system",
            "/dev/urandom",
        ];
        Self {
            read: fixed.iter().map(PathBuf::from).chain(prefix.map(Path::to_owned)).collect(),
            // QEMU uses it to test whether the kernel has open-file-description locks.
            write: vec!["/dev/null".into()],
        }
    }
}

/// Returns the rules as a descriptor. `None` if hardening is off, or is best-effort and the host
/// has no Landlock.
///
/// # Errors
/// [`ErrorKind::Host`] if hardening is strict and the rules cannot be made.
pub(super) fn ruleset(paths: &Paths, hardening: Hardening) -> Result<Option<OwnedFd>> {
    if hardening == Hardening::Off {
        return Ok(None);
    }
    let made = make_ruleset(paths, hardening);
    match (made, hardening) {
        (Ok(fd), _) => Ok(fd),
        (Err(error), Hardening::BestEffort) => {
            tracing::warn!(%error, "this host has no Landlock: QEMU is confined by its user alone");
            Ok(None)
        }
        (Err(error), _) => {
            Err(Error::new(ErrorKind::Host, "make Landlock rules").because(error).hint(
                "Landlock needs Linux 5.13 and `landlock` in the kernel's `lsm=` list; \
                 else set `hardening` to `best-effort`",
            ))
        }
    }
}

fn make_ruleset(
    paths: &Paths,
    hardening: Hardening,
) -> Result<Option<OwnedFd>, landlock::RulesetError> {
    let level = if hardening == Hardening::Strict {
        CompatLevel::HardRequirement
    } else {
        CompatLevel::BestEffort
    };
    let created = Ruleset::default()
        .set_compatibility(level)
        .handle_access(AccessFs::from_all(ABI::V1))?
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .create()?
        // `path_beneath_rules` skips paths that the host does not have.
        .add_rules(path_beneath_rules(&paths.read, AccessFs::from_read(LANDLOCK)))?
        .add_rules(path_beneath_rules(
            &paths.write,
            AccessFs::from_read(LANDLOCK) | AccessFs::WriteFile,
        ))?;
    Ok(created.into())
}
