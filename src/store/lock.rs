//! Locks between CPI processes: `flock` on files under `locks/`, released by the kernel when the holder dies.
//!
//! Order, so that nobody waits in a circle: stemcell, snapshot, disk, vm, memory, boot, network, space, claims, metadata
//! ([`Rank`]). The last four are held for milliseconds, around one change or one look. A lock file lives as long
//! as the object it stands for: whoever removes the object [retires](Guard::unlink) the lock.

use std::cell::RefCell;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::ErrorKind::{AlreadyExists, IsADirectory, NotFound};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::crash;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::patience::within;
use crate::store::atomic;

/// What a lock stands for, in the order locks are taken.
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
    /// The host's memory, while it is decided who gets it.
    Memory,
    /// One of the host's boot slots.
    Boot,
    /// A bridge of this host and its rules.
    Network,
    /// The space on this host's filesystems, from a look at it until a record takes some.
    Space,
    /// What VMs have claimed: addresses and ports.
    Reservations,
    /// A persistent disk's metadata, which is written while others work on the disk.
    Metadata,
}

impl Rank {
    /// All of them.
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

    /// The word in the lock file's name.
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
    /// Ranks this thread holds; checked in debug builds, where the tests run.
    static HELD: RefCell<Vec<Rank>> = const { RefCell::new(Vec::new()) };
}

/// A held lock; dropping it releases it.
#[derive(Debug)]
pub struct Guard {
    file: File,
    path: PathBuf,
    rank: Rank,
    is_new: bool,
}

impl Guard {
    /// Takes the lock `path`, waiting until `deadline` for its holder.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] naming the holder's pid.
    pub fn acquire(path: PathBuf, rank: Rank, deadline: Instant) -> Result<Self> {
        HELD.with_borrow(|held| {
            debug_assert!(held.iter().all(|h| *h <= rank), "{rank:?} after {held:?}")
        });
        let (file, is_new) = loop {
            let (file, is_new) = open(&path)?;
            let file = match file.try_lock() {
                Ok(()) => file,
                Err(TryLockError::WouldBlock) => wait(file, &path, deadline)?,
                Err(TryLockError::Error(error)) => return Err(Error::io("lock", &path, error)),
            };
            // The holder before us may have retired the file: then we hold a lock on nothing anybody can open.
            if is_still_at(&file, &path) {
                break (file, is_new);
            }
        };
        HELD.with_borrow_mut(|held| held.push(rank));
        let guard = Self { file, path, rank, is_new };
        guard.sign();
        crash::point!("lock of a {} taken", rank.as_str());
        Ok(guard)
    }

    /// Whether there was no file of the lock before.
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// The same lock for a process started now: it is held until both have closed it (flock(2)). So a launch keeps the
    /// VM's lock even if the call that ordered it is killed.
    pub fn share(&self) -> Result<File> {
        self.file.try_clone().at("share lock", &self.path)
    }

    /// Removes the lock file and releases the lock: the object is gone for good.
    pub fn unlink(self) -> Result<()> {
        atomic::remove_file(&self.path)?;
        crash::point!("lock of a {} retired", self.rank.as_str());
        Ok(())
    }

    /// The same lock, for what has no life beyond its being held.
    pub fn into_short_lock(self) -> ShortLock {
        ShortLock(Some(self))
    }

    /// Leaves our pid for whoever times out waiting. A full filesystem must not keep anybody from deleting.
    fn sign(&self) {
        let mut file = &self.file;
        let signed = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()));
        if let Err(error) = signed {
            tracing::debug!(%error, lock = %self.path.display(), "can not sign the lock");
        }
    }
}

/// A lock that nobody had when it was looked at, and nobody gets as long as this lives, unless it had no file yet. For
/// who only looks: nothing is written.
#[derive(Debug)]
pub struct TryLock(Option<File>);

impl TryLock {
    /// Whether the lock has a file.
    pub fn has_file(&self) -> bool {
        self.0.is_some()
    }

    /// Looks at the lock `path`; `None` if somebody has it.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if what is there is no lock; what the filesystem says.
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
                    return Err(Error::io("look at lock", path, error));
                }
                Ok(()) if is_still_at(&file, path) => return Ok(Some(Self(Some(file)))),
                Ok(()) => {}
            }
        }
    }
}

/// A lock whose file goes when it is released.
#[derive(Debug)]
pub struct ShortLock(Option<Guard>);

impl Drop for ShortLock {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.0.take().map(Guard::unlink) {
            tracing::debug!(error = error.report(), "a lock file stays, for the next to lock");
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

/// The lock's file, and whether it was made for that.
fn open(path: &Path) -> Result<(File, bool)> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    loop {
        match options.open(path) {
            Err(error) if error.kind() == NotFound && !atomic::is_symlink(path) => {}
            file => return file.map(|file| (file, false)).map_err(|error| unusable(path, error)),
        }
        match options.clone().create_new(true).open(path) {
            // Somebody was faster.
            Err(error) if error.kind() == AlreadyExists => {}
            // A backup may leave out what is empty.
            Err(error) if error.kind() == NotFound => {
                atomic::make_dir(path.parent().expect("a lock is in a directory"))?;
            }
            file => return file.map(|file| (file, true)).map_err(|error| unusable(path, error)),
        }
    }
}

/// Why the lock can not be opened. One that is no file was not made by us.
fn unusable(path: &Path, error: std::io::Error) -> Error {
    let is_none = path.symlink_metadata().is_ok_and(|meta| !meta.is_file());
    let error = Error::io("open lock", path, error);
    if !is_none {
        return error;
    }
    error
        .with_kind(ErrorKind::Corrupt)
        .hint("it is no file, as a lock is: remove it and repeat the call")
}

fn is_still_at(file: &File, path: &Path) -> bool {
    let (Ok(ours), Ok(named)) = (file.metadata(), path.metadata()) else { return false };
    (ours.dev(), ours.ino()) == (named.dev(), named.ino())
}

/// Waits in the kernel, in a thread of its own, because flock(2) knows no timeout. A thread that is still waiting
/// when we give up drops the lock as soon as it gets it, or dies with this short-lived process.
fn wait(file: File, path: &Path, deadline: Instant) -> Result<File> {
    if deadline <= Instant::now() {
        return Err(still_held(path));
    }
    match within(deadline, move || file.lock().map(|()| file)) {
        Some(locked) => locked.at("lock", path),
        None => Err(still_held(path)),
    }
}

fn still_held(path: &Path) -> Error {
    let message = format!("lock '{}' is still held by process {}", path.display(), holder(path));
    Error::new(ErrorKind::Timeout, message)
        .hint("wait for that call to end, or see what it is doing with `ps`; a dead process holds no lock")
}

fn holder(path: &Path) -> String {
    last_holder(path).map_or_else(|| "unknown".to_owned(), |pid| pid.to_string())
}

/// The process that signed the lock last.
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
    fn the_second_waits_and_names_the_first() {
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
    fn a_look_sees_who_has_a_lock_and_makes_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.x");
        assert!(TryLock::at(&path).unwrap().is_some());
        assert!(!path.exists(), "nothing was written");
        let guard = Guard::acquire(path.clone(), Rank::Vm, later()).unwrap();
        assert!(TryLock::at(&path).unwrap().is_none(), "somebody has it");
        drop(guard);
        let glances = [TryLock::at(&path).unwrap().unwrap(), TryLock::at(&path).unwrap().unwrap()];
        assert_eq!(
            Guard::acquire(path.clone(), Rank::Vm, soon()).unwrap_err().kind(),
            ErrorKind::Timeout
        );
        drop(glances);
        // Who gave up waiting may have it for a moment yet.
        Guard::acquire(path, Rank::Vm, later()).unwrap().unlink().unwrap();
    }

    #[test]
    fn a_lock_knows_whether_it_was_there() {
        let dir = tempfile::tempdir().unwrap();
        // Its directory need not be.
        let path = dir.path().join("locks/vm.x");
        let guard = Guard::acquire(path.clone(), Rank::Vm, later()).unwrap();
        assert!(guard.is_new());
        drop(guard);
        assert!(!Guard::acquire(path.clone(), Rank::Vm, later()).unwrap().is_new());
        assert_eq!(last_holder(&path), Some(std::process::id() as i32));
    }

    #[test]
    fn what_is_no_file_is_no_lock() {
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
    fn whoever_waited_for_a_retired_lock_gets_a_fresh_one() {
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
