//! Append-only files of limited size: `console.log`, `events.jsonl` and `qemu.log`, which a guest
//! can fill, and `supervisor.log`.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};

use crate::error::{IoContext, Result};
use crate::store::VmPaths;

/// Size limit of `console.log`: a guest can write to its console without end.
const CONSOLE_MAX_BYTES: u64 = 1 << 20;
/// Size limit of `qemu.log`: a guest can make QEMU print without end.
pub(super) const QEMU_MAX_BYTES: u64 = 256 << 10;
/// Size limit of `events.jsonl`: a guest can cause events without end.
const EVENTS_MAX_BYTES: u64 = 256 << 10;
/// Bytes reserved for events, so that those about a full filesystem can be written.
const EVENTS_RESERVED_BYTES: u64 = 16 << 10;
/// Size from which an adopting supervisor begins a new `supervisor.log`. Each supervisor appends at
/// most 64 KiB (`crate::log`).
const SUPERVISOR_MAX_BYTES: u64 = 128 << 10;

/// A file of at most `cap` bytes, and one predecessor `<name>.1` of the same size. The mode is
/// 0600, because an agent's debug log on the console shows its settings.
#[derive(Debug)]
pub(super) struct CappedLog {
    path: PathBuf,
    file: File,
    size: u64,
    cap: u64,
    /// Bytes allocated beyond the end, so that events of a full filesystem can still be written.
    reserve: u64,
    /// Offset up to which bytes are allocated.
    reserved: u64,
}

impl CappedLog {
    /// Opens a VM's `console.log`.
    pub(super) fn console(paths: &VmPaths) -> Result<Self> {
        Self::open(paths.console_log(), CONSOLE_MAX_BYTES, 0)
    }

    /// Opens a VM's `qemu.log`.
    pub(super) fn qemu(paths: &VmPaths) -> Result<Self> {
        Self::open(paths.qemu_log(), QEMU_MAX_BYTES, 0)
    }

    /// Opens a VM's `events.jsonl`.
    pub(super) fn events(paths: &VmPaths) -> Result<Self> {
        Self::open(paths.events(), EVENTS_MAX_BYTES, EVENTS_RESERVED_BYTES)
    }

    /// Opens `path` for appending and allocates `reserve` bytes beyond its end.
    fn open(path: PathBuf, cap: u64, reserve: u64) -> Result<Self> {
        let mut options = OpenOptions::new();
        let file = options
            .read(true)
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&path)
            .at("open log", &path)?;
        let size = file.metadata().at("read the size of", &path)?.len();
        let mut log = Self { path, file, size, cap, reserve, reserved: 0 };
        log.reserve_space();
        Ok(log)
    }

    /// Begins a new line if the last one is incomplete, as after a power cut.
    pub(super) fn begin_line(&mut self) -> Result<()> {
        let mut last = [b'\n'];
        if self.size > 0 {
            self.file.read_exact_at(&mut last, self.size - 1).at("read log", &self.path)?;
        }
        if last == [b'\n'] { Ok(()) } else { self.append(b"\n") }
    }

    /// Appends `bytes`. Begins a new file first if this one would exceed its size.
    pub(super) fn append(&mut self, bytes: &[u8]) -> Result<()> {
        if self.size + bytes.len() as u64 > self.cap && self.size > 0 {
            rotate(&self.path);
            *self = Self::open(self.path.clone(), self.cap, self.reserve)?;
        }
        self.file.write_all(bytes).at("write log", &self.path)?;
        self.size += bytes.len() as u64;
        if self.size + self.reserve / 2 > self.reserved {
            self.reserve_space();
        }
        Ok(())
    }

    fn reserve_space(&mut self) {
        let (from, length) = (self.size as i64, self.reserve as i64);
        // Fails on a full filesystem, and where fallocate(2) is not supported: later lines may be
        // lost.
        if length > 0
            && fallocate(&self.file, FallocateFlags::FALLOC_FL_KEEP_SIZE, from, length).is_ok()
        {
            self.reserved = self.size + self.reserve;
        }
    }
}

/// Renames `path` to `path.1`, so that a start of the VM begins with an empty file.
pub(super) fn rotate(path: &Path) {
    let mut old = path.to_owned().into_os_string();
    old.push(".1");
    // `path` does not exist at the first start. If the rename fails, the log is appended to.
    let _ = std::fs::rename(path, old);
}

/// Renames a `supervisor.log` that earlier supervisors of this run have filled.
pub(super) fn rotate_full_supervisor_log(paths: &VmPaths) {
    let path = paths.supervisor_log();
    if path.metadata().is_ok_and(|file| file.len() >= SUPERVISOR_MAX_BYTES) {
        rotate(&path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn begin_line_ends_an_incomplete_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.jsonl");
        for (before, after) in
            [("", "new\n"), ("one\n", "one\nnew\n"), ("one\nhal", "one\nhal\nnew\n")]
        {
            std::fs::write(&path, before).unwrap();
            let mut log = CappedLog::open(path.clone(), 100, 0).unwrap();
            log.begin_line().unwrap();
            log.append(b"new\n").unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), after);
        }
    }

    #[test]
    fn append_after_a_new_file_could_not_be_made_goes_on() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("vm/console.log");
        std::fs::create_dir(root.path().join("vm")).unwrap();
        let mut log = CappedLog::open(path.clone(), 10, 0).unwrap();
        log.append(b"0123456789").unwrap();
        std::fs::rename(root.path().join("vm"), root.path().join("away")).unwrap();
        assert!(log.append(b"lost").is_err());
        std::fs::create_dir(root.path().join("vm")).unwrap();
        log.append(b"kept").unwrap();
        assert_eq!(std::fs::read_to_string(path).unwrap(), "kept");
    }

    #[test]
    fn append_without_end_leaves_two_files_of_the_cap() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = CappedLog::open(dir.path().join("console.log"), 100, 50).unwrap();
        for _ in 0..1000 {
            log.append(b"0123456789").unwrap();
        }
        let sizes: Vec<_> =
            dir.path().read_dir().unwrap().map(|e| e.unwrap().metadata().unwrap().len()).collect();
        assert_eq!(sizes.len(), 2);
        assert!(sizes.iter().all(|size| *size <= 100), "{sizes:?}");
    }
}
