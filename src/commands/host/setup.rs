//! `bosh-qemu-cpi host setup`: installs the program, its systemd units and the key that may call
//! this host. `host install` runs it on another machine.

use std::io::Write;
use std::path::Path;

use nix::unistd::{Uid, User};

use super::authorize;
use crate::cli::Setup;
use crate::commands::local;
use crate::config::Document;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::host::installation::{self, AuthorizedKey, InstallFile, Installation, PROGRAM};
use crate::store::{Store, VmRecord};

/// sshd's public host key, which callers pin as `host_key`.
const HOST_KEY: &str = "/etc/ssh/ssh_host_ed25519_key.pub";

/// Prints the steps and, without `--plan`, carries them out.
///
/// # Errors
/// [`ErrorKind::Conflict`] if a file that this program did not install is in the way.
pub fn run(setup: &Setup, output: &mut dyn Write) -> Result<bool> {
    let mut print =
        |line: &str| writeln!(output, "{line}").map_err(|e| Error::os("print the plan", e));
    local::ensure_root()?;
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
    let mut files = vec![InstallFile { path: PROGRAM.into(), content, mode: 0o755 }];
    if let Some(config) = &setup.host_config {
        // Reports a mistake in it now instead of at the first call.
        local::config(Some(config))?;
        let content = std::fs::read(config).at("read", config)?;
        files.push(InstallFile { path: crate::config::DEFAULT_FILE.into(), content, mode: 0o600 });
    }
    files.extend(Installation::units());
    let authorized = setup.key.as_deref().map(|key| authorized(setup, key)).transpose()?;
    let member = setup.user.clone().filter(|user| user != "root");
    Ok(Installation { root: setup.root.clone(), files, authorized, member })
}

fn authorized(setup: &Setup, key: &str) -> Result<AuthorizedKey> {
    let user = match &setup.user {
        Some(name) => User::from_name(name),
        None => User::from_uid(Uid::from_raw(0)),
    };
    let user = user.map_err(|e| Error::os("look up the user", e))?;
    let name = || setup.user.clone().unwrap_or_default();
    let user = user.ok_or_else(|| {
        Error::new(ErrorKind::BadRequest, format!("there is no user '{}'", name()))
    })?;
    let line = authorize::line(Path::new(PROGRAM), None, &authorize::key(key)?)?;
    Ok(AuthorizedKey { file: user.dir.join(".ssh/authorized_keys"), line })
}

/// The missing ones of the programs that every VM needs.
fn missing() -> impl Iterator<Item = &'static str> {
    ["/usr/bin/qemu-system-x86_64", "/usr/bin/qemu-img"]
        .into_iter()
        .filter(|program| !Path::new(program).exists())
}

fn remove(setup: &Setup, mut print: impl FnMut(&str) -> Result<()>) -> Result<bool> {
    let config = Document::read(None).and_then(|document| document.config())?;
    let vms = Store::from_config(&config).list::<VmRecord>()?.len();
    if vms > 0 && setup.root == Path::new("/") {
        let message = format!("this host still has {vms} VMs");
        return Err(Error::new(ErrorKind::Conflict, message).hint(
            "delete them with BOSH first, or set 'draining' for this host and recreate them on \
             others",
        ));
    }
    if setup.plan {
        print("removes everything that 'host setup' installed; the state directory stays")?;
        return Ok(true);
    }
    for line in installation::remove(&setup.root)? {
        print(&line)?;
    }
    Ok(true)
}
