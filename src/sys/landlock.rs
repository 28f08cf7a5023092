//! Which paths a confined program may open: Landlock rules, prepared where failing in words is still possible.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetCreatedAttr,
    path_beneath_rules,
};

use crate::config::Hardening;
use crate::error::{Error, ErrorKind, Result};

/// The newest Landlock whose rights are asked for; an older kernel leaves out what it does not know.
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
    /// What QEMU opens by itself: its libraries, firmware and modules, and what the C library and glib look at. No
    /// directory it could write to.
    pub fn of_qemu(binary: &Path) -> Self {
        // A QEMU outside /usr has its firmware and libraries beside it: /opt/qemu/bin/… means /opt/qemu.
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
            // QEMU tries there whether the kernel has open-file-description locks.
            write: vec!["/dev/null".into()],
        }
    }
}

/// The rules as a descriptor; `None` where hardening is off or may do without.
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
        (Err(error), _) => Err(Error::new(ErrorKind::Host, "prepare Landlock rules").because(error).hint(
            "Landlock needs Linux 5.13 and `landlock` in the kernel's `lsm=` list; or set `hardening` to `best-effort`",
        )),
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
        // Rules for paths this host does not have are skipped by `path_beneath_rules`.
        .add_rules(path_beneath_rules(&paths.read, AccessFs::from_read(LANDLOCK)))?
        .add_rules(path_beneath_rules(
            &paths.write,
            AccessFs::from_read(LANDLOCK) | AccessFs::WriteFile,
        ))?;
    Ok(created.into())
}
