//! Files that a child opens again: by its own descriptor, which needs no capability. The
//! descriptors of a parent that is not dumpable need CAP_SYS_PTRACE.

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// Lets the program of `command` inherit `files`, under [`name_in_child`]. They must stay open
/// until it has started. Programs that start meanwhile do not inherit them.
#[allow(unsafe_code)]
pub fn inherit(command: &mut Command, files: &[&File]) {
    let files: Vec<RawFd> = files.iter().map(|file| file.as_raw_fd()).collect();
    // SAFETY: between fork and exec only async-signal-safe calls are allowed: fcntl(2) is one, and
    // nothing is allocated. The child has a copy of each descriptor.
    unsafe {
        command.pre_exec(move || {
            for file in &files {
                fcntl(BorrowedFd::borrow_raw(*file), FcntlArg::F_SETFD(FdFlag::empty()))?;
            }
            Ok(())
        })
    };
}

/// The name under which a program that inherits `file` opens it.
pub fn name_in_child(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn inherit_lets_only_its_program_open_the_file() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"data").unwrap();
        let cat = |files: &[&File]| {
            let mut command = Command::new("cat");
            inherit(&mut command, files);
            command.arg(name_in_child(&file)).output().unwrap()
        };
        assert_eq!(cat(&[&file]).stdout, b"data");
        assert!(!cat(&[]).status.success());
    }
}
