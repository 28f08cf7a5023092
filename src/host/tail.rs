//! Reads log files that another process writes: the last lines for an error message, or a word once
//! it appears.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use crate::error::{Error, ErrorKind, IoContext, Result};

/// The most bytes of a log that an error message quotes.
const MAX_TAIL_BYTES: u64 = 2048;

/// Returns the last `count` lines of the file, joined with `; `. Control characters are escaped,
/// because guests write some of these files. For a missing or empty file it returns "nothing was
/// written".
pub fn last_lines(path: &Path, count: usize) -> String {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|mut file| {
        let size = file.metadata()?.len();
        file.seek(SeekFrom::Start(size.saturating_sub(MAX_TAIL_BYTES)))?;
        file.take(MAX_TAIL_BYTES).read_to_end(&mut bytes)
    });
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    if read.is_err() || lines.is_empty() {
        return "nothing was written".to_owned();
    }
    let tail = lines[lines.len().saturating_sub(count)..].join("; ");
    tail.chars()
        .flat_map(|c| if c.is_control() { c.escape_default().collect::<Vec<_>>() } else { vec![c] })
        .collect()
}

/// Waits until the file contains `word` at least `times` times. The file must exist.
///
/// # Errors
/// [`ErrorKind::Timeout`] at `deadline`, with the last lines of the file.
pub fn wait_for(path: &Path, word: &str, times: usize, deadline: Instant) -> Result<()> {
    let os = |errno: nix::Error| Error::io("watch", path, errno.into());
    let watch = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).map_err(os)?;
    watch.add_watch(path, AddWatchFlags::IN_MODIFY).map_err(os)?;
    loop {
        let text = std::fs::read(path).at("read", path)?;
        if String::from_utf8_lossy(&text).matches(word).count() >= times {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        if left.is_zero()
            || poll(&mut [PollFd::new(watch.as_fd(), PollFlags::POLLIN)], timeout).map_err(os)? == 0
        {
            let message = format!(
                "'{word}' did not appear in '{}' in time: {}",
                path.display(),
                last_lines(path, 3)
            );
            return Err(Error::new(ErrorKind::Timeout, message));
        }
        // The events only show that the file changed; the loop reads it again.
        watch.read_events().map_err(os)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_lines_escapes_control_characters() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        assert_eq!(last_lines(&path, 2), "nothing was written");
        std::fs::write(&path, "one\r\ntwo\n\n\x1b[31mthree\n").unwrap();
        assert_eq!(last_lines(&path, 2), "two; \\u{1b}[31mthree");
    }

    #[test]
    fn wait_for_returns_when_the_word_appears() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "here\n").unwrap();
        let long = Instant::now() + std::time::Duration::from_secs(20);
        let waiter = std::thread::spawn({
            let path = path.clone();
            move || wait_for(&path, "here", 2, long)
        });
        std::fs::write(&path, "here\nhere\n").unwrap();
        waiter.join().unwrap().unwrap();
        assert_eq!(
            wait_for(&path, "gone", 1, Instant::now()).unwrap_err().kind(),
            ErrorKind::Timeout
        );
    }
}
