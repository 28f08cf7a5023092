//! This program on a machine: its files, the key that may call it, the units that start it. What is installed is written down,
//! so that it can be undone and nothing else be touched.
//!
//! ```text
//!   wanted ──┐
//!            ├─ plan: what each file needs ──► apply ──► installed.json, before each file it names
//!   on disk ─┘            │ a file that is not ours is in the way: refused, before anything is done
//! ```

mod authorized;
mod manifest;

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::unistd::Group;

pub use self::authorized::Authorized;
use self::manifest::{MANIFEST, Manifest};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::store::atomic;

/// Who may use the socket.
pub const GROUP: &str = "bosh-qemu-cpi";
/// Where the program is put.
pub const PROGRAM: &str = "/usr/local/bin/bosh-qemu-cpi";
/// The unit that starts and stops all VMs, and the socket for callers.
const UNITS: [&str; 2] = ["bosh-qemu-cpi.service", "bosh-qemu-cpi.socket"];

/// A file that belongs to the installation.
pub struct Wanted {
    /// Where.
    pub path: PathBuf,
    /// Its content.
    pub content: Vec<u8>,
    /// Its mode.
    pub mode: u32,
}

/// What is to be on the machine.
pub struct Installation {
    /// `/`, or where a test has it.
    pub root: PathBuf,
    /// Its files.
    pub files: Vec<Wanted>,
    /// A key that may call it.
    pub authorized: Option<Authorized>,
    /// A user who is not root and may use the socket.
    pub member: Option<String>,
}

/// What one part of it needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// It is there.
    Keep(String),
    /// It is not.
    Add(String),
    /// An older one of ours is there.
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
    /// The units of a host, as `contrib/systemd` has them.
    pub fn units() -> Vec<Wanted> {
        let unit = |name: &str, text: &str| Wanted {
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

    /// What is to be done, in order.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] naming all that is in the way and not ours.
    pub fn plan(&self) -> Result<Vec<Step>> {
        let manifest = Manifest::read(&self.root)?;
        let (mut steps, mut strangers) = (Vec::new(), Vec::new());
        for file in &self.files {
            match self.step_of(file, &manifest)? {
                Some(step) => steps.push(step),
                None => strangers.push(file.path.display().to_string()),
            }
        }
        let others = |key: &&Authorized| {
            self.authorized.as_ref().is_none_or(|authorized| authorized.file != key.file)
        };
        steps.extend(manifest.keys.iter().filter(others).map(|key| Step::Keep(key.to_string())));
        if let Some(authorized) = &self.authorized {
            match authorized.step(&self.root, &manifest.older(authorized))? {
                Some(step) => steps.push(step),
                None => strangers.push(authorized.to_string()),
            }
        }
        if !strangers.is_empty() {
            let message = format!("not ours, and in the way: {}", strangers.join(", "));
            return Err(Error::new(ErrorKind::Conflict, message)
                .hint("nothing was changed; move them away, or undo what changed them since they were installed"));
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

    /// `None` if the file that is there is somebody else's.
    fn step_of(&self, file: &Wanted, manifest: &Manifest) -> Result<Option<Step>> {
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

    /// Does what [`Installation::plan`] says.
    ///
    /// # Errors
    /// As it, and what writing can bring.
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
            manifest.is_there(&file.path, Digest::of(&file.content));
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

/// Removes what was installed; what was changed since is left and told.
///
/// # Errors
/// [`ErrorKind::Host`] if nothing is installed, or something can not be removed.
pub fn remove(root: &Path) -> Result<Vec<String>> {
    let manifest = Manifest::read(root)?;
    if manifest.is_empty() {
        let path = below(root, Path::new(MANIFEST));
        return Err(Error::new(
            ErrorKind::Host,
            format!("nothing is installed here: there is no '{}'", path.display()),
        ));
    }
    let mut told = Vec::new();
    if has_systemd(root) {
        run("systemctl", &["disable", "--now", UNITS[1]])?;
        // Stopped, the other would power off all VMs, of which there are none.
        run("systemctl", &["disable", "--now", UNITS[0]])?;
    }
    for key in &manifest.keys {
        told.push(key.remove(root)?);
    }
    for (file, digests) in &manifest.files {
        let path = below(root, file);
        let name = file.display();
        if !atomic::entry_exists(&path) {
            continue;
        }
        if path.is_file() && digests.contains(&Digest::of_file(&path)?) {
            atomic::remove_file(&path)?;
            told.push(format!("- {name}"));
        } else {
            told.push(format!("! {name} was changed since, and stays"));
        }
    }
    if has_systemd(root) {
        run("systemctl", &["daemon-reload"])?;
        if manifest.made_group && has_group()? {
            run("groupdel", &[GROUP])?;
            told.push(format!("- group {GROUP}"));
        }
    }
    Manifest::forget(root)?;
    Ok(told)
}

/// The absolute `path` below `root`.
fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

/// Whether units can be started: not below a root that is no machine's.
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
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::new(ErrorKind::Host, format!("{program} {}: {}", arguments.join(" "), said.trim())))
}
