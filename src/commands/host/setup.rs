//! `bosh-qemu-cpi host setup`: makes this machine a host: the program, units, a key that may call. `host install` has it done
//! on another machine.

use std::io::Write;
use std::path::Path;

use nix::unistd::{Uid, User, geteuid};

use super::authorize;
use crate::cli::Setup;
use crate::commands::this_host;
use crate::config::Document;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::host::installation::{self, Authorized, Installation, PROGRAM, Wanted};
use crate::store::{Store, VmRecord};

/// Where sshd shows who it is.
const HOST_KEY: &str = "/etc/ssh/ssh_host_ed25519_key.pub";

/// Prints what is to be done, and does it if that is all that was wanted.
///
/// # Errors
/// [`ErrorKind::Conflict`] if something that is not ours is in the way.
pub fn run(setup: &Setup, output: &mut dyn Write) -> Result<bool> {
    let mut print =
        |line: &str| writeln!(output, "{line}").map_err(|e| Error::os("print the plan", e));
    if !geteuid().is_root() {
        return Err(
            Error::new(ErrorKind::Host, "only root can set up a host").hint("do it as root")
        );
    }
    if setup.remove {
        return remove(setup, print);
    }
    let installation = installation(setup)?;
    for step in installation.plan()? {
        print(&step.to_string())?;
    }
    if setup.plan {
        return Ok(true);
    }
    installation.apply()?;
    for program in missing() {
        print(&format!("! {program} is missing: apt-get install qemu-system-x86 qemu-utils"))?;
    }
    if let Ok(key) = std::fs::read_to_string(HOST_KEY) {
        let key: Vec<_> = key.split_ascii_whitespace().take(2).collect();
        print(&format!("host_key: {}", key.join(" ")))?;
    }
    if let (Some(_), Some(user)) = (&setup.key, &installation.member) {
        print(&format!("user: {user}"))?;
    }
    Ok(true)
}

fn installation(setup: &Setup) -> Result<Installation> {
    let program = std::env::current_exe().map_err(|e| Error::os("find this program", e))?;
    let content = std::fs::read(&program).at("read", &program)?;
    let mut files = vec![Wanted { path: PROGRAM.into(), content, mode: 0o755 }];
    if let Some(config) = &setup.host_config {
        // A mistake in it is told now, not by the first call.
        this_host::config(Some(config))?;
        let content = std::fs::read(config).at("read", config)?;
        files.push(Wanted { path: crate::config::DEFAULT_FILE.into(), content, mode: 0o600 });
    }
    files.extend(Installation::units());
    let authorized = setup.key.as_deref().map(|key| authorized(setup, key)).transpose()?;
    let member = setup.user.clone().filter(|user| user != "root");
    Ok(Installation { root: setup.root.clone(), files, authorized, member })
}

fn authorized(setup: &Setup, key: &str) -> Result<Authorized> {
    let user = match &setup.user {
        Some(name) => User::from_name(name),
        None => User::from_uid(Uid::from_raw(0)),
    };
    let user = user.map_err(|e| Error::os("look for the user", e))?;
    let name = || setup.user.clone().unwrap_or_default();
    let user = user.ok_or_else(|| {
        Error::new(ErrorKind::BadRequest, format!("there is no user '{}'", name()))
    })?;
    let line = authorize::line(Path::new(PROGRAM), None, &authorize::key(key)?)?;
    Ok(Authorized { file: user.dir.join(".ssh/authorized_keys"), line })
}

/// Programs without which no VM starts.
fn missing() -> impl Iterator<Item = &'static str> {
    ["/usr/bin/qemu-system-x86_64", "/usr/bin/qemu-img"]
        .into_iter()
        .filter(|program| !Path::new(program).exists())
}

fn remove(setup: &Setup, mut print: impl FnMut(&str) -> Result<()>) -> Result<bool> {
    let config = Document::read(None).and_then(|document| document.config())?;
    let vms = Store::from_config(&config).list::<VmRecord>()?.len();
    if vms > 0 && setup.root == Path::new("/") {
        return Err(Error::new(ErrorKind::Conflict, format!("{vms} VMs are on this host")).hint(
            "have BOSH delete them first, or mark the host as draining and recreate them elsewhere",
        ));
    }
    if setup.plan {
        print("everything that was installed is removed; the state directory stays")?;
        return Ok(true);
    }
    for line in installation::remove(&setup.root)? {
        print(&line)?;
    }
    Ok(true)
}
