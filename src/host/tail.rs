//! The end of a log, for an error message.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

/// No more than this of a log gets into a message.
const MOST: u64 = 2048;

/// The last `count` lines of the file, joined with `; `, control characters escaped: guests write some of these files.
/// An absent or empty file reads as "nothing was written".
pub fn last_lines(path: &Path, count: usize) -> String {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|mut file| {
        let size = file.metadata()?.len();
        file.seek(SeekFrom::Start(size.saturating_sub(MOST)))?;
        file.take(MOST).read_to_end(&mut bytes)
    });
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    if read.is_err() || lines.is_empty() {
        return "nothing was written".to_owned();
    }
    let tail = lines[lines.len().saturating_sub(count)..].join("; ");
    tail.chars().flat_map(|c| if c.is_control() { c.escape_default().collect::<Vec<_>>() } else { vec![c] }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_without_control_characters() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        assert_eq!(last_lines(&path, 2), "nothing was written");
        std::fs::write(&path, "one\r\ntwo\n\n\x1b[31mthree\n").unwrap();
        assert_eq!(last_lines(&path, 2), "two; \\u{1b}[31mthree");
    }
}
