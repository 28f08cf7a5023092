//! Which shared ssh connection a call's session runs on.
//!
//! ```text
//!   <TMPDIR or /tmp>/bosh-qemu-cpi-<uid>/     mode 0700
//!     <digest>.slots                         byte n is locked by the call that has session n
//!     <digest>.<n>.start                     locked by the call that makes connection n
//!     <digest>.<n>                           ssh's control socket of connection n
//! ```
//!
//! OpenSSH itself shares connections (`ControlMaster=auto`, `ControlPersist`). Its master process
//! is no child of any call: parent 1, a session of its own, and no descriptor of the call
//! (OpenSSH 9.2). So a killed call does not end the sessions of other calls.
//!
//! This file only chooses the `ControlPath`, because one path for all calls loses calls:
//!
//! - sshd refuses sessions beyond `MaxSessions` (10), and ssh then opens a connection for each
//!   refused session. 32 calls at once make 22 more connections, of which `MaxStartups`
//!   (10:30:100) drops some: 3 to 6 of 32 calls failed (OpenSSH 9.2). So at most
//!   `transport.sessions` calls share one path.
//! - Calls that find no master all connect by themselves: 6 to 9 of 32 failed. So one call makes
//!   the connection and the others wait for it.
//!
//! The kernel drops a call's locks with the call's process.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::unistd::geteuid;

use crate::blocking_call::run_with_timeout;
use crate::error::{IoContext, Result};

/// The most connections to one host. Calls beyond their sessions have connections of their own.
const MAX_CONNECTIONS: u64 = 16;

/// Time a master has to greet on its control socket. A running master needs under 1 ms. A call that
/// takes a slow master for a stopped one only makes a connection of its own.
const MASTER_GREETING_TIMEOUT: Duration = Duration::from_millis(500);

/// Time a call waits for another call to make the connection: ssh's `ConnectTimeout` and some for
/// the login. After it the call connects by itself.
const MASTER_START_TIMEOUT: Duration = Duration::from_secs(12);

/// The longest path of a control socket, in bytes. A Unix socket's path has at most 107 bytes, and
/// ssh first binds `<path>.<16 characters>`.
const MAX_SOCKET_PATH: usize = 107 - 17;

/// Room in a control socket's path for its file name: `/<16 hex digits>.<number>`.
const MAX_FILE_NAME: usize = "/0123456789abcdef.15".len();

/// The shared connection of one call.
pub(super) struct SharedConnection {
    /// ssh's control socket, for its `ControlPath`.
    pub control_path: PathBuf,
    /// Whether earlier calls made the connection. Else this call's ssh makes it.
    pub exists: bool,
    /// The locked byte of the session's number.
    _slot: File,
    /// The lock on making the connection, until the host's greeting.
    start: Option<File>,
}

impl SharedConnection {
    /// Lets waiting calls join: the connection exists.
    pub fn established(&mut self) {
        self.start = None;
    }
}

/// Chooses the shared connection for a call to the host that `digest` identifies, with `sessions`
/// calls on each connection. Waits until `deadline` at most for another call that makes it.
///
/// Returns `None` if the call needs a connection of its own: no suitable directory, all sessions in
/// use, or a stopped master.
///
/// # Errors
/// I/O errors of the lock files.
pub(super) fn choose(
    digest: &str,
    sessions: u64,
    deadline: Instant,
) -> Result<Option<SharedConnection>> {
    let Some(dir) = directory() else { return Ok(None) };
    let file = |suffix: String| dir.join(format!("{digest}.{suffix}"));
    let slots = file("slots".to_owned());
    let slot = lock_slot(&slots, sessions * MAX_CONNECTIONS).at("lock a session in", &slots)?;
    let Some((slot, number)) = slot else { return Ok(None) };
    let connection = number / sessions;
    let control_path = file(connection.to_string());
    let mut start = None;
    let mut master = probe(&control_path);
    if master == Master::None {
        start = lock_start(file(format!("{connection}.start")), deadline)?;
        master = probe(&control_path);
    }
    let exists = match master {
        Master::Running => true,
        Master::None => false,
        Master::Stopped => {
            let socket = control_path.display();
            tracing::warn!(
                "the ssh that has the control socket '{socket}' does not answer: this call \
                 connects by itself; end that ssh (`fuser '{socket}'` prints its pid)"
            );
            return Ok(None);
        }
    };
    let start = start.filter(|_| !exists);
    Ok(Some(SharedConnection { control_path, exists, _slot: slot, start }))
}

/// Returns the directory of control sockets, which only this user can open; `None` if there is no
/// such directory with a short enough path.
fn directory() -> Option<PathBuf> {
    let temporary = std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/tmp"), PathBuf::from);
    let uid = geteuid().as_raw();
    [temporary.as_path(), Path::new("/tmp")].into_iter().find_map(|parent| {
        let dir = parent.join(format!("bosh-qemu-cpi-{uid}"));
        (is_usable(&dir) && create_private(&dir, uid).is_ok()).then_some(dir)
    })
}

/// Returns whether control sockets in `dir` have paths that ssh can use. ssh runs in `/`, and
/// expands `%` and `${…}` in a `ControlPath`.
fn is_usable(dir: &Path) -> bool {
    let bytes = dir.as_os_str().as_bytes();
    dir.is_absolute()
        && bytes.len() + MAX_FILE_NAME <= MAX_SOCKET_PATH
        && !bytes.iter().any(|byte| matches!(byte, b'%' | b'$'))
}

/// Creates `dir` with mode 0700. Accepts an existing directory only if `uid` owns it and no other
/// user can access it.
fn create_private(dir: &Path, uid: u32) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        created => return created,
    }
    let meta = dir.symlink_metadata()?;
    let is_private = meta.is_dir() && meta.uid() == uid && meta.mode() & 0o077 == 0;
    if is_private { Ok(()) } else { Err(io::ErrorKind::PermissionDenied.into()) }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// Locks the first unlocked of the first `count` bytes of `path`, and returns its number. `None` if
/// all are locked.
fn lock_slot(path: &Path, count: u64) -> io::Result<Option<(File, u64)>> {
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
            Err(Errno::EAGAIN | Errno::EACCES) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

/// Locks `path` while no other call makes the connection. `None` if one still does at the deadline:
/// this call then connects, too, which costs only time.
fn lock_start(path: PathBuf, deadline: Instant) -> Result<Option<File>> {
    let deadline = deadline.min(Instant::now() + MASTER_START_TIMEOUT);
    let shown = path.clone();
    let locked = run_with_timeout(deadline, move || {
        let file = open(&path)?;
        file.lock().map(|()| file)
    });
    locked.transpose().at("lock", &shown)
}

/// The ssh process behind a control socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Master {
    /// It greets.
    Running,
    /// It accepts connections in the kernel's queue, but does not greet: it is stopped, or hangs.
    Stopped,
    /// There is no process, or no socket.
    None,
}

/// Returns the state of the master behind `control_path`. A master sends a hello to each client at
/// once (OpenSSH's PROTOCOL.mux), so a client without one would hang.
fn probe(control_path: &Path) -> Master {
    let socket = control_path.to_owned();
    let greeted = run_with_timeout(Instant::now() + MASTER_GREETING_TIMEOUT, move || {
        let Ok(mut stream) = UnixStream::connect(socket) else { return Master::None };
        match stream.read_exact(&mut [0; 4]) {
            Ok(()) => Master::Running,
            Err(_) => Master::None,
        }
    });
    greeted.unwrap_or(Master::Stopped)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn control_sockets_are_in_a_private_directory_with_a_short_path() {
        let dir = tempfile::tempdir().unwrap();
        let uid = geteuid().as_raw();
        let own = dir.path().join("own");
        create_private(&own, uid).unwrap();
        create_private(&own, uid).unwrap();
        assert_eq!(own.metadata().unwrap().mode() & 0o7777, 0o700);
        assert!(create_private(&own, uid + 1).is_err(), "another user's");
        std::fs::set_permissions(&own, PermissionsExt::from_mode(0o750)).unwrap();
        assert!(create_private(&own, uid).is_err(), "open to a group");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        assert!(create_private(&link, uid).is_err(), "a symbolic link");

        let longest = format!("/{}", "x".repeat(MAX_SOCKET_PATH - MAX_FILE_NAME - 1));
        assert!(is_usable(Path::new(&longest)) && !is_usable(Path::new(&format!("{longest}x"))));
        for unusable in ["relative", "/100%", "/${HOME}"] {
            assert!(!is_usable(Path::new(unusable)), "{unusable}");
        }
    }

    #[test]
    fn a_path_of_the_longest_length_is_bound_with_the_suffix_of_ssh() {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let rest = MAX_SOCKET_PATH - dir.path().as_os_str().len() - 1;
        let path = dir.path().join(format!("{}.{}", "x".repeat(rest), "y".repeat(16)));
        assert_eq!(path.as_os_str().len(), 107);
        UnixListener::bind(path).unwrap();
    }

    #[test]
    fn sessions_have_numbers_of_their_own_until_all_are_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("slots");
        let (first, zero) = lock_slot(&path, 2).unwrap().unwrap();
        let (_second, one) = lock_slot(&path, 2).unwrap().unwrap();
        assert_eq!((zero, one), (0, 1));
        assert!(lock_slot(&path, 2).unwrap().is_none());
        drop(first);
        assert_eq!(lock_slot(&path, 2).unwrap().unwrap().1, 0);
    }

    #[test]
    fn only_a_master_that_greets_is_running() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        assert_eq!(probe(&path), Master::None);
        let listener = UnixListener::bind(&path).unwrap();
        let began = Instant::now();
        assert_eq!(probe(&path), Master::Stopped);
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
        std::thread::scope(|threads| {
            threads.spawn(|| {
                // The first client is the one that gave up.
                let _ = listener.accept().unwrap().0.write_all(b"late");
                listener.accept().unwrap().0.write_all(&[0, 0, 0, 8]).unwrap();
            });
            assert_eq!(probe(&path), Master::Running);
        });
        drop(listener);
        assert_eq!(probe(&path), Master::None, "a socket without a process");
    }
}
