//! The installation of this program on a machine: its files, the ssh key that may call it, its
//! systemd units. A manifest lists what was installed, so that a removal touches nothing else.
//!
//! ```text
//!   files to install ──┐
//!                      ├─ plan: a step for each ──► apply: installed.json first, then the file
//!   files on disk ─────┘        │
//!                               └ a file that was not installed is in the way: nothing is changed
//! ```

mod authorized_key;
mod manifest;

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::unistd::Group;

pub use self::authorized_key::AuthorizedKey;
use self::manifest::{MANIFEST, Manifest};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::store::atomic;

/// The group whose members may use the socket.
pub const GROUP: &str = "bosh-qemu-cpi";
/// Where the program is installed.
pub const PROGRAM: &str = "/usr/local/bin/bosh-qemu-cpi";
/// The unit that starts and stops all VMs, and the socket for callers.
const UNITS: [&str; 2] = ["bosh-qemu-cpi.service", "bosh-qemu-cpi.socket"];

/// A file to install.
pub struct InstallFile {
    /// Absolute path.
    pub path: PathBuf,
    /// Content.
    pub content: Vec<u8>,
    /// Permission bits.
    pub mode: u32,
}

/// What to install on the machine.
pub struct Installation {
    /// `/`, or another directory in tests.
    pub root: PathBuf,
    /// The files.
    pub files: Vec<InstallFile>,
    /// An ssh key that may call the CPI.
    pub authorized: Option<AuthorizedKey>,
    /// A user other than root who may use the socket.
    pub member: Option<String>,
}

/// What [`Installation::apply`] does for one part of the installation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Nothing: the part is installed.
    Keep(String),
    /// Install the part.
    Add(String),
    /// Replace an older version of the part.
    Replace(String),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Keep(what) => write!(f, "= {what}"),
            Self::Add(what) => write!(f, "+ {what}"),
            Self::Replace(what) => write!(f, "~ {what}"),
        }
    }
}

impl Installation {
    /// Returns the systemd units of a host, from `contrib/systemd`.
    pub fn units() -> Vec<InstallFile> {
        let unit = |name: &str, text: &str| InstallFile {
            path: Path::new("/etc/systemd/system").join(name),
            content: text.as_bytes().to_vec(),
            mode: 0o644,
        };
        vec![
            unit(UNITS[0], include_str!("../../../contrib/systemd/bosh-qemu-cpi.service")),
            unit(UNITS[1], include_str!("../../../contrib/systemd/bosh-qemu-cpi.socket")),
            unit(
                "bosh-qemu-cpi@.service",
                include_str!("../../../contrib/systemd/bosh-qemu-cpi@.service"),
            ),
        ]
    }

    /// Returns the steps of the installation, in order.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] naming all files and keys that are in the way and were not
    /// installed.
    pub fn plan(&self) -> Result<Vec<Step>> {
        let manifest = Manifest::read(&self.root)?;
        let (mut steps, mut foreign) = (Vec::new(), Vec::new());
        for file in &self.files {
            match self.step_of(file, &manifest)? {
                Some(step) => steps.push(step),
                None => foreign.push(file.path.display().to_string()),
            }
        }
        let others = |key: &&AuthorizedKey| {
            self.authorized.as_ref().is_none_or(|authorized| authorized.file != key.file)
        };
        steps.extend(manifest.keys.iter().filter(others).map(|key| Step::Keep(key.to_string())));
        if let Some(authorized) = &self.authorized {
            match authorized.step(&self.root, &manifest.older(authorized))? {
                Some(step) => steps.push(step),
                None => foreign.push(authorized.to_string()),
            }
        }
        if !foreign.is_empty() {
            let message =
                format!("in the way, and not installed by this program: {}", foreign.join(", "));
            return Err(Error::new(ErrorKind::Conflict, message).hint(
                "nothing was changed; move these files away, \
                 or undo the changes made since their installation",
            ));
        }
        if self.has_systemd() {
            if !has_group()? {
                steps.push(Step::Add(format!("group {GROUP}")));
            }
            steps.extend(
                self.member.iter().map(|user| Step::Add(format!("user {user} in group {GROUP}"))),
            );
            steps.push(Step::Add(format!("systemctl enable --now {}", UNITS.join(" "))));
        }
        Ok(steps)
    }

    /// Returns the step for `file`; `None` if another file is in its place.
    fn step_of(&self, file: &InstallFile, manifest: &Manifest) -> Result<Option<Step>> {
        let path = self.on_disk(&file.path);
        let name = file.path.display().to_string();
        if !atomic::entry_exists(&path) {
            return Ok(Some(Step::Add(name)));
        }
        if !path.is_file() {
            return Ok(None);
        }
        let present = Digest::of_file(&path)?;
        Ok(match present {
            same if same == Digest::of(&file.content) => Some(Step::Keep(name)),
            old if manifest.has(&file.path, &old) => Some(Step::Replace(name)),
            _ => None,
        })
    }

    /// Carries out the steps of [`Installation::plan`].
    ///
    /// # Errors
    /// As [`Installation::plan`]; else what failed to be written or run.
    pub fn apply(&self) -> Result<()> {
        self.plan()?;
        let mut manifest = Manifest::read(&self.root)?;
        for file in &self.files {
            manifest.add(&file.path, Digest::of(&file.content));
            manifest.write(&self.root)?;
            let path = self.on_disk(&file.path);
            let dir = path.parent().expect("a file is in a directory");
            std::fs::create_dir_all(dir).at("make directory", dir)?;
            atomic::write_as(&path, &file.content, file.mode, None)?;
            manifest.set_installed(&file.path, Digest::of(&file.content));
        }
        manifest.write(&self.root)?;
        if let Some(authorized) = &self.authorized {
            let older = manifest.older(authorized);
            manifest.keys.insert(authorized.clone());
            manifest.write(&self.root)?;
            authorized.add(&self.root, &older)?;
            manifest.keys.retain(|key| !older.contains(key));
            manifest.write(&self.root)?;
        }
        if !self.has_systemd() {
            return Ok(());
        }
        if !has_group()? {
            manifest.made_group = true;
            manifest.write(&self.root)?;
            run("groupadd", &["--system", GROUP])?;
        }
        if let Some(user) = &self.member {
            run("usermod", &["--append", "--groups", GROUP, user])?;
        }
        run("systemctl", &["daemon-reload"])?;
        run("systemctl", &["enable", "--now", UNITS[0], UNITS[1]])
    }

    fn on_disk(&self, path: &Path) -> PathBuf {
        below(&self.root, path)
    }

    fn has_systemd(&self) -> bool {
        has_systemd(&self.root)
    }
}

/// Removes everything that was installed and returns a line about each part. Parts that were
/// changed since their installation stay.
///
/// # Errors
/// [`ErrorKind::Host`] if nothing is installed, or a part cannot be removed.
pub fn remove(root: &Path) -> Result<Vec<String>> {
    let manifest = Manifest::read(root)?;
    if manifest.is_empty() {
        let path = below(root, Path::new(MANIFEST));
        return Err(Error::new(
            ErrorKind::Host,
            format!("nothing is installed here: there is no '{}'", path.display()),
        ));
    }
    let mut report = Vec::new();
    if has_systemd(root) {
        run("systemctl", &["disable", "--now", UNITS[1]])?;
        // Stopping this unit powers off all VMs, but the caller has made sure that there are none.
        run("systemctl", &["disable", "--now", UNITS[0]])?;
    }
    for key in &manifest.keys {
        report.push(key.remove(root)?);
    }
    for (file, digests) in &manifest.files {
        let path = below(root, file);
        let name = file.display();
        if !atomic::entry_exists(&path) {
            continue;
        }
        if path.is_file() && digests.contains(&Digest::of_file(&path)?) {
            atomic::remove_file(&path)?;
            report.push(format!("- {name}"));
        } else {
            report.push(format!("! {name} was modified, so it stays"));
        }
    }
    if has_systemd(root) {
        run("systemctl", &["daemon-reload"])?;
        if manifest.made_group && has_group()? {
            run("groupdel", &[GROUP])?;
            report.push(format!("- group {GROUP}"));
        }
    }
    Manifest::remove(root)?;
    Ok(report)
}

/// Returns the absolute `path` below `root`.
fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

/// Returns whether systemd units can be started: not below a `root` of a test.
fn has_systemd(root: &Path) -> bool {
    root == Path::new("/") && Path::new("/run/systemd/system").is_dir()
}

fn has_group() -> Result<bool> {
    let group =
        Group::from_name(GROUP).map_err(|e| Error::os(format!("look for group '{GROUP}'"), e))?;
    Ok(group.is_some())
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program).args(arguments).output();
    let output = output.map_err(|e| Error::os(format!("run {program}"), e))?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let message = format!("{program} {}: {}", arguments.join(" "), stderr.trim());
    Err(Error::new(ErrorKind::Host, message))
}
