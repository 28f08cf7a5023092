//! Locks between CPI processes: `flock` on files under `locks/`, released by the kernel when the
//! holder dies.
//!
//! A process takes locks in the order of [`Rank`], so that no two processes wait for each other:
//! stemcell, snapshot, disk, vm, memory, boot, network, space, reservations, metadata. The last
//! four are held for milliseconds, around one read or one change. The removal of an object also
//! [unlinks](Guard::unlink) its lock file.

use std::cell::RefCell;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::ErrorKind::{AlreadyExists, IsADirectory, NotFound};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::blocking_call::run_with_timeout;
use crate::crash;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::store::atomic;

/// The kind of object that a lock protects, in the order in which a process takes locks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rank {
    /// A stemcell.
    Stemcell,
    /// A snapshot.
    Snapshot,
    /// A persistent disk.
    Disk,
    /// A VM.
    Vm,
    /// The host's memory, while a supervisor checks and takes memory for its VM.
    Memory,
    /// One of the host's boot slots.
    Boot,
    /// A bridge of this host, with its nftables rules.
    Network,
    /// The free space of this host's filesystems, from its measurement until a record accounts for
    /// a new image.
    Space,
    /// Reserved addresses and host ports. The lock files are called `claims.<name>`.
    Reservations,
    /// A persistent disk's metadata. Calls write it while another call has the disk's own lock.
    Metadata,
}

impl Rank {
    /// All ranks.
    pub const ALL: [Self; 10] = [
        Self::Stemcell,
        Self::Snapshot,
        Self::Disk,
        Self::Vm,
        Self::Memory,
        Self::Boot,
        Self::Network,
        Self::Space,
        Self::Reservations,
        Self::Metadata,
    ];

    /// The first part of the lock file's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stemcell => "stemcell",
            Self::Snapshot => "snapshot",
            Self::Disk => "disk",
            Self::Vm => "vm",
            Self::Memory => "memory",
            Self::Boot => "boot",
            Self::Network => "network",
            Self::Space => "space",
            Self::Reservations => "claims",
            Self::Metadata => "metadata",
        }
    }
}

thread_local! {
    /// Ranks that this thread holds. Debug builds check the order.
    static HELD: RefCell<Vec<Rank>> = const { RefCell::new(Vec::new()) };
}

/// A held lock. Its drop releases the lock and keeps the file.
#[derive(Debug)]
pub struct Guard {
    file: File,
    path: PathBuf,
    rank: Rank,
    is_new: bool,
}

impl Guard {
    /// Takes the lock `path`. Waits for its holder until `deadline`.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] naming the holder's pid.
    pub fn acquire(path: PathBuf, rank: Rank, deadline: Instant) -> Result<Self> {
        HELD.with_borrow(|held| {
            debug_assert!(held.iter().all(|h| *h <= rank), "{rank:?} after {held:?}");
        });
        let (file, is_new) = loop {
            let (file, is_new) = open(&path)?;
            let file = match file.try_lock() {
                Ok(()) => file,
                Err(TryLockError::WouldBlock) => wait(file, &path, deadline)?,
                Err(TryLockError::Error(error)) => return Err(Error::io("lock", &path, error)),
            };
            // The previous holder may have unlinked the file. Then this lock excludes no other
            // process.
            if is_still_at(&file, &path) {
                break (file, is_new);
            }
        };
        HELD.with_borrow_mut(|held| held.push(rank));
        let guard = Self { file, path, rank, is_new };
        guard.write_pid();
        crash::point!("lock of a {} taken", rank.as_str());
        Ok(guard)
    }

    /// Whether the lock had no file before.
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// The same lock for a child process: it is held until both processes have closed it
    /// (flock(2)). A supervisor keeps the VM's lock this way during a launch, even if its call is
    /// killed.
    pub fn share(&self) -> Result<File> {
        self.file.try_clone().at("share lock", &self.path)
    }

    /// Removes the lock file and releases the lock, because the object no longer exists.
    pub fn unlink(self) -> Result<()> {
        atomic::remove_file(&self.path)?;
        crash::point!("lock of a {} unlinked", self.rank.as_str());
        Ok(())
    }

    /// The same lock, whose drop also removes its file.
    pub fn into_short_lock(self) -> ShortLock {
        ShortLock(Some(self))
    }

    /// Writes this process's pid into the file, for the message of a waiting process that times
    /// out. A failure is only logged: a delete must work on a full filesystem.
    fn write_pid(&self) {
        let mut file = &self.file;
        let written = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()));
        if let Err(error) = written {
            tracing::debug!(%error, lock = %self.path.display(), "cannot write the pid");
        }
    }
}

/// A lock that was free when it was tried, held shared until drop. It writes nothing, so it works
/// on a read-only filesystem. If the lock has no file yet, another process can still take it.
#[derive(Debug)]
pub struct TryLock(Option<File>);

impl TryLock {
    /// Whether the lock had a file.
    pub fn has_file(&self) -> bool {
        self.0.is_some()
    }

    /// Tries the lock `path`; `None` if another process holds it.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if `path` is no regular file. I/O errors.
    pub fn at(path: &Path) -> Result<Option<Self>> {
        loop {
            let file = match File::open(path) {
                Err(error) if error.kind() == NotFound && !atomic::is_symlink(path) => {
                    return Ok(Some(Self(None)));
                }
                file => file.map_err(|error| unusable(path, error))?,
            };
            if file.metadata().is_ok_and(|meta| meta.is_dir()) {
                return Err(unusable(path, IsADirectory.into()));
            }
            match file.try_lock_shared() {
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) => {
                    return Err(Error::io("try lock", path, error));
                }
                Ok(()) if is_still_at(&file, path) => return Ok(Some(Self(Some(file)))),
                Ok(()) => {}
            }
        }
    }
}

/// A held lock whose drop removes its file, for locks that protect no object with a lifetime of its
/// own.
#[derive(Debug)]
pub struct ShortLock(Option<Guard>);

impl Drop for ShortLock {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.0.take().map(Guard::unlink) {
            tracing::debug!(
                error = error.report(),
                "cannot remove the lock file; the next holder uses it"
            );
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        HELD.with_borrow_mut(|held| {
            if let Some(at) = held.iter().rposition(|rank| *rank == self.rank) {
                held.remove(at);
            }
        });
    }
}

/// Opens the lock's file. `true`: this call made it.
fn open(path: &Path) -> Result<(File, bool)> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    loop {
        match options.open(path) {
            Err(error) if error.kind() == NotFound && !atomic::is_symlink(path) => {}
            file => return file.map(|file| (file, false)).map_err(|error| unusable(path, error)),
        }
        match options.clone().create_new(true).open(path) {
            // Another process was faster.
            Err(error) if error.kind() == AlreadyExists => {}
            // A backup may leave out the empty directory.
            Err(error) if error.kind() == NotFound => {
                atomic::make_dir(path.parent().expect("a lock is in a directory"))?;
            }
            file => return file.map(|file| (file, true)).map_err(|error| unusable(path, error)),
        }
    }
}

/// The error for a lock that cannot be opened. Calls make locks as regular files only, so another
/// kind is damage.
fn unusable(path: &Path, error: std::io::Error) -> Error {
    let is_other = path.symlink_metadata().is_ok_and(|meta| !meta.is_file());
    let error = Error::io("open lock", path, error);
    if !is_other {
        return error;
    }
    error
        .with_kind(ErrorKind::Corrupt)
        .hint("it is not a regular file: remove it and repeat the call")
}

fn is_still_at(file: &File, path: &Path) -> bool {
    let (Ok(opened), Ok(named)) = (file.metadata(), path.metadata()) else { return false };
    (opened.dev(), opened.ino()) == (named.dev(), named.ino())
}

/// Waits in the kernel, in a thread, because flock(2) has no timeout. After the deadline the thread
/// keeps waiting: it drops the lock as soon as it gets it, or ends with this short-lived process.
fn wait(file: File, path: &Path, deadline: Instant) -> Result<File> {
    if deadline <= Instant::now() {
        return Err(still_held(path));
    }
    match run_with_timeout(deadline, move || file.lock().map(|()| file)) {
        Some(locked) => locked.at("lock", path),
        None => Err(still_held(path)),
    }
}

fn still_held(path: &Path) -> Error {
    let message = format!("lock '{}' is still held by process {}", path.display(), holder(path));
    Error::new(ErrorKind::Timeout, message).hint(
        "wait for that call to end, or look at the process with `ps`; a dead process holds no lock",
    )
}

fn holder(path: &Path) -> String {
    last_holder(path).map_or_else(|| "unknown".to_owned(), |pid| pid.to_string())
}

/// The pid in the lock file: its current or last holder.
pub(super) fn last_holder(path: &Path) -> Option<i32> {
    let mut text = String::new();
    File::open(path).and_then(|file| file.take(20).read_to_string(&mut text)).ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(50)
    }

    fn later() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[test]
    fn the_second_process_waits_and_names_the_holder() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.x");
        let guard = Guard::acquire(path.clone(), Rank::Vm, later()).unwrap();
        let error = Guard::acquire(path.clone(), Rank::Vm, soon()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout);
        assert!(
            error.report().contains(&format!("process {}", std::process::id())),
            "{}",
            error.report()
        );
        let waiter = std::thread::spawn({
            let path = path.clone();
            move || Guard::acquire(path, Rank::Vm, later()).map(drop)
        });
        drop(guard);
        waiter.join().unwrap().unwrap();
    }

    #[test]
    fn a_try_sees_a_held_lock_and_makes_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.x");
        assert!(TryLock::at(&path).unwrap().is_some());
        assert!(!path.exists(), "nothing was written");
        let guard = Guard::acquire(path.clone(), Rank::Vm, later()).unwrap();
        assert!(TryLock::at(&path).unwrap().is_none(), "it is held");
        drop(guard);
        let tries = [TryLock::at(&path).unwrap().unwrap(), TryLock::at(&path).unwrap().unwrap()];
        assert_eq!(
            Guard::acquire(path.clone(), Rank::Vm, soon()).unwrap_err().kind(),
            ErrorKind::Timeout
        );
        drop(tries);
        // The thread of the acquire that timed out may hold it for a moment.
        Guard::acquire(path, Rank::Vm, later()).unwrap().unlink().unwrap();
    }

    #[test]
    fn a_lock_knows_whether_its_file_is_new() {
        let dir = tempfile::tempdir().unwrap();
        // Its directory need not exist.
        let path = dir.path().join("locks/vm.x");
        let guard = Guard::acquire(path.clone(), Rank::Vm, later()).unwrap();
        assert!(guard.is_new());
        drop(guard);
        assert!(!Guard::acquire(path.clone(), Rank::Vm, later()).unwrap().is_new());
        assert_eq!(last_holder(&path), Some(std::process::id() as i32));
    }

    #[test]
    fn a_lock_that_is_no_regular_file_is_corrupt() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.x");
        let refused = || {
            let errors =
                [Guard::acquire(path.clone(), Rank::Vm, soon()).err(), TryLock::at(&path).err()];
            errors.map(|error| error.expect("refused")).iter().all(|error| {
                error.kind() == ErrorKind::Corrupt && error.report().contains("remove it")
            })
        };
        std::fs::create_dir(&path).unwrap();
        assert!(refused());
        std::fs::remove_dir(&path).unwrap();
        for target in ["vm.x", "/nonexistent/lock"] {
            std::os::unix::fs::symlink(target, &path).unwrap();
            assert!(refused(), "a link to {target}");
            std::fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn waiting_for_an_unlinked_lock_gets_a_new_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.x");
        let guard = Guard::acquire(path.clone(), Rank::Vm, later()).unwrap();
        let waiter = std::thread::spawn({
            let path = path.clone();
            move || Guard::acquire(path, Rank::Vm, later())
        });
        guard.unlink().unwrap();
        let fresh = waiter.join().unwrap().unwrap();
        assert!(is_still_at(&fresh.file, &path));
        fresh.unlink().unwrap();
        assert_eq!(dir.path().read_dir().unwrap().count(), 0);
    }
}
