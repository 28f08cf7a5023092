use std::time::Duration;

use super::*;
use crate::image::testing;

fn test_deadline() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// A script in place of `qemu-img`. Another process writes it: if this process had it open for
/// writing, a thread that forks could make it busy (ETXTBSY).
fn script(dir: &Path, text: &str) -> QemuImg {
    let (draft, path) = (dir.join("draft"), dir.join("script"));
    std::fs::write(&draft, format!("#!/bin/sh\n{text}\n")).unwrap();
    testing::run("install", ["-m700".into(), draft.into(), path.clone().into()]);
    QemuImg::new(path)
}

#[test]
fn create_convert_and_check_with_the_real_program() {
    let dir = tempfile::tempdir().unwrap();
    let (target, copy) = (dir.path().join("b:c.qcow2"), dir.path().join("b.raw"));
    let img = QemuImg::new("qemu-img");
    let new = NewImage {
        path: &target,
        format: Format::Qcow2,
        size: Bytes(2 << 20),
        preallocation: Preallocation::Metadata,
        key: None,
    };
    new.create(&img, test_deadline()).unwrap().sync().unwrap();
    assert_eq!(testing::header(&target).virtual_size, Bytes(2 << 20));
    assert_eq!(img.check(&target, test_deadline()).unwrap(), Check { corruptions: 0, leaks: 0 });
    let converted = beneath::create_new(&copy).unwrap();
    img.convert_file(File::open(&target).unwrap(), &converted, test_deadline()).unwrap();
    assert_eq!(converted.as_file().metadata().unwrap().len(), 2 << 20);
    // Damage: the entry for the first L2 table points to the header.
    let file = File::options().write(true).open(&target).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0; 8], 0x20000).unwrap();
    assert!(img.check(&target, test_deadline()).unwrap().corruptions > 0);
}

#[test]
fn failure_reports_the_last_line_and_the_environment_is_empty() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    let img = script(dir.path(), "echo first >&2; echo \"$1 HOME=$HOME last\" >&2; exit 1");
    let failed = img.check(&path, test_deadline()).unwrap_err();
    assert!(failed.report().ends_with("(exit status: 1): check HOME= last"), "{}", failed.report());
    assert_eq!(failed.kind(), ErrorKind::Host);
    let full = script(dir.path(), "echo 'qemu-img: error: No space left on device' >&2; exit 1");
    assert_eq!(full.check(&path, test_deadline()).unwrap_err().kind(), ErrorKind::NoDiskSpace);
    let absent = QemuImg::new("/nonexistent/qemu-img").check(&path, test_deadline()).unwrap_err();
    assert!(absent.report().contains("Hint: install"), "{}", absent.report());
}

#[test]
fn deadline_kills_a_program_that_hangs_or_prints_without_end() {
    let dir = tempfile::tempdir().unwrap();
    for text in ["exec sleep 1000", "exec sleep 1000 >&- 2>&-", "while :; do echo y; done"] {
        let img = script(dir.path(), text);
        let started = Instant::now();
        let killed =
            img.check(&dir.path().join("x"), started + Duration::from_millis(100)).unwrap_err();
        assert_eq!(killed.kind(), ErrorKind::Timeout, "{}", killed.report());
        assert!(started.elapsed() < Duration::from_secs(30));
    }
}

#[test]
fn endless_output_is_read_but_not_stored() {
    let dir = tempfile::tempdir().unwrap();
    let img = script(dir.path(), "head -c 10000000 /dev/zero | tr '\\0' x >&2; exit 1");
    let failed = img.check(&dir.path().join("x"), test_deadline()).unwrap_err();
    assert!(failed.report().len() < 2000, "{} bytes", failed.report().len());
}
