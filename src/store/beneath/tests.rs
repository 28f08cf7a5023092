use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::time::{Duration, Instant};

use nix::sys::stat::{Mode as Bits, SFlag, makedev, mknod};
use nix::unistd::mkfifo;

use super::*;
use crate::blocking_call::run_with_timeout;

const TEST_TIMEOUT: Duration = Duration::from_secs(20);

/// A root with the object `disk-a`, and beside it a file that no object has.
fn root() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let (object, secret) = (dir.path().join("pool/disk-a"), dir.path().join("secret"));
    fs::create_dir_all(&object).unwrap();
    fs::write(&secret, "secret").unwrap();
    (dir, object, secret)
}

/// What a call does with a file, with the result's success.
fn refused<T: Send + 'static>(act: impl FnOnce() -> Result<T> + Send + 'static) -> Error {
    let done = run_with_timeout(Instant::now() + TEST_TIMEOUT, act).expect("it does not wait");
    let error = done.err().expect("it is refused");
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{}", error.report());
    error
}

#[test]
fn file_that_is_no_file_of_its_own_is_refused_without_an_open() {
    let (_dir, object, secret) = root();
    let path = object.join("disk.raw");
    type Make = fn(&Path, &Path);
    let kinds: [(&str, Make); 5] = [
        ("symbolic link", |path, secret| symlink(secret, path).unwrap()),
        ("not a regular file", |path, _| mkfifo(path, Bits::S_IRWXU).unwrap()),
        ("not a regular file", |path, _| fs::create_dir(path).unwrap()),
        ("2 names", |path, secret| fs::hard_link(secret, path).unwrap()),
        ("symbolic link", |path, _| symlink("/dev/zero", path).unwrap()),
    ];
    for (why, make) in kinds {
        make(&path, &secret);
        let (one, two) = (path.clone(), path.clone());
        for error in
            [refused(move || file(&one, Expected::Own)), refused(move || read(&two, 1 << 20))]
        {
            let report = error.report();
            assert!(report.contains(why) && report.contains("disk-a/disk.raw'"), "{report}");
        }
        let _ = fs::remove_file(&path).or_else(|_| fs::remove_dir(&path));
        assert_eq!(fs::read(&secret).unwrap(), b"secret");
    }
    let device = mknod(&path, SFlag::S_IFCHR, Bits::S_IRWXU, makedev(1, 5));
    if device.is_ok() {
        let error = refused(move || read(&path, 1 << 20));
        assert!(error.report().contains("not a regular file"), "{}", error.report());
    }
}

#[test]
fn directory_that_is_a_link_is_refused_and_its_target_is_unchanged() {
    let (dir, object, secret) = root();
    let elsewhere = dir.path().join("elsewhere/disk-b");
    fs::create_dir_all(&elsewhere).unwrap();
    fs::write(elsewhere.join("disk.raw"), "data").unwrap();
    fs::remove_dir(&object).unwrap();
    symlink(&elsewhere, &object).unwrap();
    let image = object.join("disk.raw");
    let refused = [
        find(&image, Expected::Own).map(drop),
        metadata(&image).map(drop),
        names(&object).map(drop),
        entry_exists(&image).map(drop),
        create_new(&object.join("new")).map(drop),
        write(&image, b"forged"),
        rename(&object, "disk.raw", "host-none").map(drop),
        hard_link(&image, &elsewhere.join("base.raw")),
        hard_link(&elsewhere.join("disk.raw"), &object.join("base.raw")),
        remove_file(&image),
        make_dir(&object),
        sync_dir(&object),
    ];
    for (step, result) in refused.into_iter().enumerate() {
        let error = result.expect_err(&format!("step {step}"));
        assert_eq!(error.kind(), ErrorKind::Corrupt, "step {step}: {}", error.report());
        assert!(error.report().contains("pool/disk-a"), "step {step}: {}", error.report());
    }
    assert_eq!(fs::read(elsewhere.join("disk.raw")).unwrap(), b"data");
    assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 1);
    assert_eq!(fs::read(secret).unwrap(), b"secret");
}

#[test]
fn object_without_a_directory_has_no_files() {
    let (_dir, object, _) = root();
    let missing = object.with_file_name("disk-b");
    assert!(find(&missing.join("disk.raw"), Expected::Own).unwrap().is_none());
    assert_eq!(names(&missing).unwrap(), [""; 0]);
    assert!(!entry_exists(&missing.join("disk.raw")).unwrap());
    remove_file(&missing.join("disk.raw")).unwrap();
    let error = file(&missing.join("disk.raw"), Expected::Own).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Host);
    for _ in 0..2 {
        make_dir(&missing).unwrap();
        assert_eq!(missing.metadata().unwrap().permissions().mode() & 0o777, 0o700);
    }
}

#[test]
fn root_of_the_operator_may_be_a_link() {
    let (dir, object, _) = root();
    let (link, image) = (dir.path().join("link"), object.join("disk.raw"));
    fs::write(&image, "data").unwrap();
    symlink(dir.path().join("pool"), &link).unwrap();
    assert_eq!(read(&link.join("disk-a/disk.raw"), 4).unwrap(), b"data");
    let light = dir.path().join("light.raw");
    symlink(&image, &light).unwrap();
    assert_eq!(file(&light, Expected::OfOperator).unwrap().metadata().len(), 4);
    let error = file(dir.path(), Expected::OfOperator).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{}", error.report());
}

#[test]
fn content_and_number_of_names_are_bounded() {
    let (_dir, object, _) = root();
    let path = object.join("host-none");
    write(&path, &[7; 100]).unwrap();
    assert_eq!(read(&path, 100).unwrap(), [7; 100]);
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(read(&path, 99).unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(names(&object).unwrap(), ["host-none"], "no temporary file is left");
    File::options().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
    assert_eq!(read(&path, 1 << 20).unwrap_err().kind(), ErrorKind::Corrupt);
    for n in 0..MOST_NAMES {
        fs::write(object.join(n.to_string()), "").unwrap();
    }
    assert_eq!(names(&object).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn stemcells_image_gets_more_names_and_a_link_gets_none() {
    let (dir, object, secret) = root();
    let (image, base) = (object.join("image.raw"), dir.path().join("pool/vm-a/base.raw"));
    fs::create_dir(base.parent().unwrap()).unwrap();
    fs::write(&image, "image").unwrap();
    hard_link(&image, &base).unwrap();
    assert_eq!(file(&base, Expected::Shared).unwrap().metadata().nlink(), 2);
    fs::remove_file(&base).unwrap();
    fs::remove_file(&image).unwrap();
    symlink(&secret, &image).unwrap();
    assert_eq!(hard_link(&image, &base).unwrap_err().kind(), ErrorKind::Corrupt);
    assert!(base.symlink_metadata().is_err(), "nothing is made");
}

#[test]
fn marker_is_made_once_and_not_behind_a_link() {
    let (dir, _, _) = root();
    let (marker, target) = (dir.path().join("pool/marker"), dir.path().join("target"));
    make_marker(&marker).unwrap();
    make_marker(&marker).unwrap();
    fs::remove_file(&marker).unwrap();
    symlink(&target, &marker).unwrap();
    assert_eq!(make_marker(&marker).unwrap_err().kind(), ErrorKind::Corrupt);
    assert!(!target.exists());
    fs::remove_file(&marker).unwrap();
    mkfifo(&marker, Bits::S_IRWXU).unwrap();
    refused(move || make_marker(&marker));
}

#[test]
fn found_file_stays_the_same_when_its_path_names_another() {
    let (_dir, object, secret) = root();
    let path = object.join("disk.raw");
    fs::write(&path, "data").unwrap();
    let found = file(&path, Expected::Own).unwrap();
    fs::remove_file(&path).unwrap();
    symlink(&secret, &path).unwrap();
    let mut text = String::new();
    found.read().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "data");
    assert_eq!(fs::read(crate::sys::inherit::name_in_child(found.handle())).unwrap(), b"data");
}

#[test]
fn new_file_is_removed_unless_it_is_kept_or_published() {
    let (_dir, object, _) = root();
    let path = object.join("image.raw");
    drop(create_new(&path).unwrap());
    assert!(!path.exists());
    drop(create_new(&path).unwrap().keep());
    assert!(path.exists());
    let other = || create_new(&object.join(temporary_name(".import-"))).unwrap();
    assert!(!other().publish(&path).unwrap(), "nothing is replaced");
    fs::remove_file(&path).unwrap();
    assert!(other().publish(&path).unwrap());
    let unnamed = other().unnamed().unwrap();
    assert_eq!(unnamed.metadata().unwrap().nlink(), 0);
    assert_eq!(names(&object).unwrap(), ["image.raw"]);
}
