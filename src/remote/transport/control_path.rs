//! Connections that calls share: the first makes one, which stays for ten minutes after the last.
//!
//! ```text
//!   <TMPDIR or /tmp>/bosh-qemu-cpi-<uid>/        0700
//!     <target>.slots                            byte n is locked by a call that has session n
//!     <target>.<n>.start                        locked while connection n is made
//!     <target>.<n>                              ssh's control socket of connection n
//! ```
//!
//! sshd lets a connection have `MaxSessions` sessions, so calls take a numbered one each, and connection n carries the
//! sessions from n × `sessions` on. Locks go with the process that has them. The connection is nobody's child: a call that is
//! killed takes no other with it.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::unistd::geteuid;

use super::session::Broken;
use super::ssh::Target;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::patience::within;

/// Connections to one target at most; calls beyond their sessions have a connection of their own.
const CONNECTIONS: u64 = 16;

/// How long ssh is waited for to take a call.
const ANSWERS: Duration = Duration::from_secs(2);

/// How long a connection stays without a call, seconds.
const STAYS: u64 = 600;

/// The longest path of a control socket: ssh adds 17 characters of its own to it for a moment (`ssh -S`, 107 in all).
const LONGEST: usize = 88;

/// A session on a connection that may carry others.
pub(super) struct Shared {
    /// ssh's control socket.
    pub socket: PathBuf,
    /// Holds the session's number.
    _slot: File,
}

/// Takes a session on a connection to `target`, which is made if there is none. `None` where connections can not be shared:
/// then each call makes its own.
///
/// # Errors
/// If no connection can be made.
pub(super) fn share(target: &Target, deadline: Instant) -> Result<Option<Shared>> {
    let Some(dir) = directory() else { return Ok(None) };
    let of = |suffix: String| dir.join(format!("{}.{suffix}", target.identity));
    if of("00".to_owned()).as_os_str().len() > LONGEST {
        return Ok(None);
    }
    let slots = of("slots".to_owned());
    let Some((slot, number)) =
        take(&slots, target.sessions * CONNECTIONS).at("share a connection by", &slots)?
    else {
        return Ok(None);
    };
    let connection = number / target.sessions;
    let socket = of(connection.to_string());
    if !answers(&socket) {
        let start = of(format!("{connection}.start"));
        let waited = within(deadline, move || {
            let file = open(&start)?;
            file.lock().map(|()| file)
        });
        let _start = waited
            .unwrap_or_else(|| Err(io::ErrorKind::TimedOut.into()))
            .at("wait for", &socket)?;
        if !answers(&socket) {
            connect(target, &socket, deadline)?;
        }
    }
    Ok(Some(Shared { socket, _slot: slot }))
}

/// The directory of control sockets: this user's alone.
fn directory() -> Option<PathBuf> {
    let temporary = std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/tmp"), PathBuf::from);
    let uid = geteuid().as_raw();
    [temporary.as_path(), Path::new("/tmp")].into_iter().find_map(|parent| {
        let dir = parent.join(format!("bosh-qemu-cpi-{uid}"));
        let fits =
            dir.as_os_str().len() + 24 <= LONGEST && !dir.as_os_str().as_bytes().contains(&b'%');
        (fits && make_own(&dir, uid).is_ok()).then_some(dir)
    })
}

/// Makes `dir`, or sees that what is there was made by this user and is nobody else's to write to.
fn make_own(dir: &Path, uid: u32) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        made => return made,
    }
    let meta = dir.symlink_metadata()?;
    let own = meta.is_dir() && meta.uid() == uid && meta.mode() & 0o077 == 0;
    if own { Ok(()) } else { Err(io::ErrorKind::PermissionDenied.into()) }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// Locks the first byte of `path` below `count` that nobody has locked.
fn take(path: &Path, count: u64) -> io::Result<Option<(File, u64)>> {
    let file = open(path)?;
    for number in 0..count {
        let byte = libc::flock {
            l_type: libc::F_WRLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: number as libc::off_t,
            l_len: 1,
            l_pid: 0,
        };
        match fcntl(&file, FcntlArg::F_OFD_SETLK(&byte)) {
            Ok(_) => return Ok(Some((file, number))),
            Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

/// Whether a connection is behind `socket`. One whose ssh was stopped lets callers wait once its queue is full.
fn answers(socket: &Path) -> bool {
    let socket = socket.to_owned();
    within(Instant::now() + ANSWERS, move || UnixStream::connect(socket).is_ok()).unwrap_or(false)
}

/// Makes a connection that stays behind `socket`.
fn connect(target: &Target, socket: &Path, deadline: Instant) -> Result<()> {
    // Of a connection that was killed.
    let _ = std::fs::remove_file(socket);
    let mut command = target.command()?;
    command
        .args(["-M", "-N", "-f", "-o", &format!("ControlPersist={STAYS}")])
        .arg("-S")
        .arg(socket);
    command.arg("--").arg(&target.host);
    // It goes on in the background, and must not hold what a caller waits for.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let made = within(deadline, move || command.status());
    match made {
        None => Err(Error::new(ErrorKind::Timeout, "connect: the host does not answer")),
        Some(Err(error)) => Err(super::ssh::not_started(error)),
        Some(Ok(status)) if status.success() => Ok(()),
        Some(Ok(status)) => {
            let silent =
                || Broken { cause: format!("ssh failed and said nothing ({status})"), hint: None };
            Err(target.why(Some(status), "").unwrap_or_else(silent).into_error("connect"))
        }
    }
}
