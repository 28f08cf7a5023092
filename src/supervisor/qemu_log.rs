//! QEMU's standard output and error: a named pipe, from which the supervisor writes `qemu.log`.
//!
//! A guest can make QEMU print without end, for example by using a virtio queue that it has reset.
//! So QEMU has no file to write to, and `qemu.log` has a size limit while it grows.
//!
//! QEMU must never wait for its supervisor. Its end of the pipe is non-blocking: what does not fit
//! into the pipe is lost. While no supervisor reads, each write fails with EPIPE; QEMU ignores the
//! signal SIGPIPE (util/oslib-posix.c) and failed messages. The supervisor that adopts QEMU opens
//! the pipe again by its name. What QEMU printed meanwhile is lost.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use nix::libc::O_NONBLOCK;
use nix::sys::stat::Mode;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;

use super::capped_log::CappedLog;
use crate::error::{Error, IoContext, Result};
use crate::store::{VmPaths, atomic};

/// How long to read the last output of a QEMU that has ended: the pipe still contains it.
const FINAL_OUTPUT_TIMEOUT: Duration = Duration::from_millis(200);
/// Size of one read: a pipe's capacity (pipe(7)).
const READ_SIZE: usize = 64 << 10;

/// Makes the pipe and returns its ends for reading and for QEMU.
pub(super) fn make_pipe(path: &Path) -> Result<(File, File)> {
    atomic::remove_file(path)?;
    nix::unistd::mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR)
        .map_err(|errno| Error::io("make pipe", path, errno.into()))?;
    let reader = open_reader(path)?;
    let mut options = OpenOptions::new();
    let writer = options.write(true).custom_flags(O_NONBLOCK).open(path).at("open pipe", path)?;
    Ok((reader, writer))
}

fn open_reader(path: &Path) -> Result<File> {
    OpenOptions::new().read(true).custom_flags(O_NONBLOCK).open(path).at("open pipe", path)
}

/// The task that writes `qemu.log`, until QEMU has ended.
pub(super) struct QemuLog(Option<JoinHandle<()>>);

impl QemuLog {
    /// Starts to write what QEMU prints into `reader`'s pipe. Must be called in the event loop.
    pub(super) fn record(paths: &VmPaths, reader: File) -> Result<Self> {
        let log = CappedLog::qemu(paths)?;
        let pipe = pipe::Receiver::from_file(reader)
            .map_err(|e| Error::io("read pipe", &paths.qemu_output(), e))?;
        Ok(Self(Some(tokio::spawn(copy(pipe, log)))))
    }

    /// Records the output of a QEMU that another supervisor started. A QEMU of a version without
    /// the pipe writes its log itself.
    pub(super) fn adopt(paths: &VmPaths) -> Result<Self> {
        let path = paths.qemu_output();
        if !path.try_exists().at("find pipe", &path)? {
            return Ok(Self(None));
        }
        Self::record(paths, open_reader(&path)?)
    }

    /// Writes the last output of a QEMU that has ended.
    pub(super) async fn finish(mut self) {
        if let Some(task) = &mut self.0 {
            let _ = tokio::time::timeout(FINAL_OUTPUT_TIMEOUT, task).await;
        }
    }
}

impl Drop for QemuLog {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

async fn copy(mut pipe: pipe::Receiver, mut log: CappedLog) {
    let (mut buffer, mut lost) = (vec![0; READ_SIZE], false);
    while let Ok(length @ 1..) = pipe.read(&mut buffer).await {
        // Goes on after a failure, as on a full filesystem: the pipe must not fill up.
        if let Err(error) = log.append(&buffer[..length])
            && !std::mem::replace(&mut lost, true)
        {
            tracing::warn!(error = error.report(), "output of QEMU is lost");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::supervisor::capped_log::QEMU_MAX_BYTES;

    #[test]
    fn record_of_endless_output_keeps_the_last_lines_within_the_cap() {
        let dir = tempfile::tempdir().unwrap();
        let paths = VmPaths { dir: dir.path().into(), run: dir.path().into() };
        let (reader, mut writer) = make_pipe(&paths.qemu_output()).unwrap();
        let (line, mut dropped) = ([b'x'; 1024], 0);
        // Without a reader the pipe fills up, and the program that prints goes on.
        for _ in 0..100 {
            dropped += u32::from(writer.write(&line).is_err());
        }
        assert!(dropped > 0);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let log = QemuLog::record(&paths, reader).unwrap();
            for _ in 0..4096 {
                while writer.write(&line).is_err() {
                    tokio::task::yield_now().await;
                }
            }
            while writer.write(b"last words\n").is_err() {
                tokio::task::yield_now().await;
            }
            drop(writer);
            log.finish().await;
        });
        let (log, older) = (paths.qemu_log(), paths.dir.join("qemu.log.1"));
        for file in [&log, &older] {
            assert!(file.metadata().unwrap().len() <= QEMU_MAX_BYTES);
        }
        assert!(std::fs::read(&log).unwrap().ends_with(b"last words\n"));
    }
}
