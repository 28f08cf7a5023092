//! What tests of this module share: QEMU's own tools as the judge.

use std::ffi::{OsStr, OsString};
use std::process::Command;

/// Runs `program` to its end, which must be a success, and returns what it said.
pub fn run(program: &str, args: impl IntoIterator<Item = OsString>) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program}: {said}{complained}");
    said.into_owned()
}

/// Runs `qemu-img`.
pub fn qemu_img<'a>(args: impl IntoIterator<Item = &'a OsStr>) -> String {
    run("qemu-img", args.into_iter().map(OsStr::to_owned))
}
