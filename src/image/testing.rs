//! Helpers for this module's tests: QEMU's own tools check the results.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use crate::image::qcow2::Header;
use crate::store::beneath::{self, Expected};

/// Runs `program`, which must succeed, and returns its standard output.
pub fn run(program: &str, args: impl IntoIterator<Item = OsString>) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let (stdout, stderr) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program}: {stdout}{stderr}");
    stdout.into_owned()
}

/// Runs `qemu-img`.
pub fn qemu_img<'a>(args: impl IntoIterator<Item = &'a OsStr>) -> String {
    run("qemu-img", args.into_iter().map(OsStr::to_owned))
}

/// A small qcow2 file, version 3, with plain, compressed and zero clusters of 4 KiB.
pub fn sample() -> &'static [u8] {
    static SAMPLE: OnceLock<Vec<u8>> = OnceLock::new();
    SAMPLE.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sample");
        let path = path.to_str().unwrap();
        qemu_img(["create", "-fqcow2", "-ocluster_size=4k", path, "5M"].map(AsRef::as_ref));
        let commands =
            ["write -P 1 8k 12k", "write -c -P 2 64k 16k", "write -z 32k 8k", "write -P 3 4M 4k"];
        let commands = commands.into_iter().flat_map(|command| ["-c", command]);
        run("qemu-io", ["-fqcow2"].into_iter().chain(commands).chain([path]).map(Into::into));
        std::fs::read(path).unwrap()
    })
}

/// The header of the qcow2 image at `path`.
pub fn header(path: &Path) -> Header {
    Header::read(&beneath::file(path, Expected::Own).unwrap()).unwrap()
}
