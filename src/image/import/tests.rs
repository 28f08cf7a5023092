//! Imports of valid images; `invalid` has the rejected ones. `qemu-img` creates the images and
//! compares the results.

mod invalid;

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;
use tar::{Builder, EntryType, Header as TarHeader};

use super::*;
use crate::image::qcow2::{Backing, create};
use crate::image::testing::{qemu_img, run};

/// A program that does not exist, for imports that must not need it.
const NO_QEMU_IMG: &str = "/nonexistent/qemu-img";

/// A directory with a disk in it, and an empty one for imports.
struct World {
    dir: tempfile::TempDir,
    qemu_img: &'static str,
}

impl World {
    /// The disk has 9 MiB and 512 bytes: text, noise, holes and a boot signature.
    fn new() -> Self {
        let world = Self { dir: tempfile::tempdir().unwrap(), qemu_img: NO_QEMU_IMG };
        std::fs::create_dir(world.path("out")).unwrap();
        let mut disk = vec![0u8; (9 << 20) + 512];
        let mut state = 1u32;
        for byte in &mut disk[1 << 20..3 << 20] {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *byte = (state >> 24) as u8;
        }
        let text = b"the quick brown fox jumps over the lazy dog ";
        disk[5_000_000..5_900_000]
            .iter_mut()
            .zip(text.iter().cycle())
            .for_each(|(byte, letter)| *byte = *letter);
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        *disk.last_mut().unwrap() = 1;
        std::fs::write(world.path("disk"), disk).unwrap();
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn disk(&self) -> Vec<u8> {
        std::fs::read(self.path("disk")).unwrap()
    }

    /// The disk as qcow2, created by `qemu-img convert` with `options`.
    fn qcow2(&self, options: &str) -> Vec<u8> {
        let (disk, image) = (self.path("disk"), self.path("qcow2"));
        let words =
            ["convert", "-f", "raw", "-O", "qcow2"].into_iter().chain(options.split_whitespace());
        qemu_img(words.map(AsRef::as_ref).chain([disk.as_os_str(), image.as_os_str()]));
        std::fs::read(image).unwrap()
    }

    /// Imports `content`.
    fn import_as(&self, content: &[u8], declared: Option<Format>) -> Result<Imported> {
        std::fs::write(self.path("image"), content).unwrap();
        let qemu_img = QemuImg::new(self.qemu_img);
        self.job(&qemu_img, declared).run(&mut |_| {})
    }

    fn job<'a>(&self, qemu_img: &'a QemuImg, declared: Option<Format>) -> Import<'a> {
        // Leaking the two paths gives them the lifetime that Import asks for.
        let leak = |name| &*Box::leak(self.path(name).into_boxed_path());
        let deadline = Instant::now() + Duration::from_secs(120);
        let source = Box::leak(Box::new(ImageFile::new(leak("image"))));
        let (target, grant) = (leak("out/image.raw"), &|need| Ok(need));
        Import { source, declared, target, qemu_img, grant, deadline }
    }

    /// Imports `content`, which must result in the disk.
    fn expect_disk(&self, content: &[u8], declared: Option<Format>) {
        let imported =
            self.import_as(content, declared).unwrap_or_else(|error| panic!("{}", error.report()));
        let target = self.path("out/image.raw");
        assert!(std::fs::read(&target).unwrap() == self.disk(), "the imported disk differs");
        let meta = target.metadata().unwrap();
        assert_eq!(meta.permissions().mode() & 0o777, 0o444);
        assert!(meta.blocks() * 512 < 4 << 20, "{} blocks: not sparse", meta.blocks());
        assert_eq!((imported.format, imported.virtual_size), (Format::Raw, Bytes(meta.len())));
        assert_eq!(imported.digest, Digest::of_file(&self.path("image")).unwrap());
        std::fs::remove_file(target).unwrap();
        self.expect_nothing_left();
    }

    /// Imports `content`, which must be rejected. Returns the reason.
    fn reason(&self, content: &[u8], declared: Option<Format>) -> InvalidImage {
        let error = self.import_as(content, declared).unwrap_err();
        self.expect_nothing_left();
        assert!(error.report().contains("Hint: "), "{}", error.report());
        let source = std::error::Error::source(&error).unwrap();
        let reason = source.downcast_ref::<InvalidImage>().unwrap().clone();
        let is_unsupported = |reason: &InvalidImage| {
            matches!(reason, InvalidImage::TooLarge | InvalidImage::SharedCluster(_))
        };
        let expected = match &reason {
            InvalidImage::Member { problem, .. } if is_unsupported(problem) => {
                ErrorKind::NotSupported
            }
            reason if is_unsupported(reason) => ErrorKind::NotSupported,
            _ => ErrorKind::BadRequest,
        };
        assert_eq!(error.kind(), expected, "{}", error.report());
        reason
    }

    fn expect_nothing_left(&self) {
        let left: Vec<_> = std::fs::read_dir(self.path("out")).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

fn gzip(content: &[u8]) -> Vec<u8> {
    let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
    gzip.write_all(content).unwrap();
    gzip.finish().unwrap()
}

/// A tar archive of regular files.
fn tar(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = Builder::new(Vec::new());
    for (name, content) in members {
        archive
            .append_data(&mut header(EntryType::Regular, content.len()), name, *content)
            .unwrap();
    }
    archive.into_inner().unwrap()
}

fn header(kind: EntryType, size: usize) -> TarHeader {
    let mut header = TarHeader::new_gnu();
    header.set_entry_type(kind);
    header.set_size(size as u64);
    header.set_mode(0o644);
    header
}

fn stemcell(image: &[u8]) -> Vec<u8> {
    gzip(&tar(&[("root.img", image)]))
}

#[test]
fn import_of_every_stemcell_layout() {
    let world = World::new();
    let (disk, qcow2) = (world.disk(), world.qcow2("-c -o compat=0.10"));
    for (image, format) in [(&disk, Format::Raw), (&qcow2, Format::Qcow2)] {
        for declared in [None, Some(format)] {
            world.expect_disk(&stemcell(image), declared);
        }
        world.expect_disk(image, None);
        world.expect_disk(&gzip(image), None);
        world.expect_disk(&tar(&[("root.img", image)]), None);
        world.expect_disk(
            &gzip(&tar(&[("notes", b"x"), ("./disk.raw", image), ("z/root.img", b"y")])),
            None,
        );
    }
    let halves = disk.split_at(4_000_001);
    world.expect_disk(&[gzip(halves.0), gzip(halves.1)].concat(), None);
}

#[test]
fn import_of_archives_written_by_tar() {
    let world = World::new();
    std::fs::rename(world.path("disk"), world.path("disk.raw")).unwrap();
    run("truncate", ["-s20M".into(), world.path("disk.raw").into()]);
    std::fs::copy(world.path("disk.raw"), world.path("disk")).unwrap();
    for options in [
        &["-S"][..],
        &["--format=v7"],
        &["--format=posix"],
        &["--format=oldgnu", "-S", "-b1"],
        &["-b2000"],
    ] {
        let fixed = ["-C".into(), world.dir.path().into(), "-czf".into(), world.path("tgz").into()];
        run("tar", options.iter().map(Into::into).chain(fixed).chain(["./disk.raw".into()]));
        world.expect_disk(&std::fs::read(world.path("tgz")).unwrap(), None);
    }
    let posix = ["--format=posix", "-S", "-czf"].map(Into::into);
    let paths = [world.path("tgz").into(), "-C".into(), world.dir.path().into(), "disk.raw".into()];
    run("tar", posix.into_iter().chain(paths));
    let refused = world.reason(&std::fs::read(world.path("tgz")).unwrap(), None);
    assert!(refused.to_string().contains("--format=gnu"), "{refused}");
}

#[test]
fn import_of_every_layout_qemu_img_writes() {
    let mut world = World::new();
    for options in [
        "-o compat=1.1",
        "-c -o compat=1.1",
        "-W -m 16",
        "-c -W -m 16",
        "-o cluster_size=512",
        "-c -o cluster_size=4096",
        "-o cluster_size=2M",
        "-c -o cluster_size=2M",
        "-o preallocation=metadata",
        "-o preallocation=falloc,lazy_refcounts=on",
        "-S 0",
        "-o refcount_bits=1",
    ] {
        world.expect_disk(&stemcell(&world.qcow2(options)), Some(Format::Qcow2));
    }
    for options in ["-o extended_l2=on", "-c -o compression_type=zstd"] {
        world.qemu_img = NO_QEMU_IMG;
        let image = stemcell(&world.qcow2(options));
        assert_eq!(world.import_as(&image, None).unwrap_err().kind(), ErrorKind::Host);
        world.expect_nothing_left();
        world.qemu_img = "qemu-img";
        world.expect_disk(&image, Some(Format::Qcow2));
    }
}

#[test]
fn tables_behind_their_data_are_converted_by_qemu_img() {
    let world = World { qemu_img: "qemu-img", ..World::new() };
    // 20 MiB of data come first. Then the L1 table has to grow, and moves to the end of the file.
    let image = world.path("grown");
    qemu_img(
        ["create", "-fqcow2", "-ocluster_size=4k", image.to_str().unwrap(), "100M"]
            .map(AsRef::as_ref),
    );
    let io = |command: &str| {
        run(
            "qemu-io",
            ["-fqcow2", "-c", command].map(Into::into).into_iter().chain([image.clone().into()]),
        )
    };
    io("write -P 7 0 20M");
    qemu_img(["resize", "-fqcow2", image.to_str().unwrap(), "1T"].map(AsRef::as_ref));
    io("write -P 8 900G 1M");
    let imported = world.import_as(&gzip(&std::fs::read(&image).unwrap()), None).unwrap();
    assert_eq!(imported.virtual_size, Bytes(1 << 40));
    let target = world.path("out/image.raw");
    assert!(target.metadata().unwrap().blocks() * 512 < 24 << 20);
    qemu_img(
        ["compare", "-fqcow2", "-Fraw", image.to_str().unwrap(), target.to_str().unwrap()]
            .map(AsRef::as_ref),
    );
    std::fs::remove_file(target).unwrap();
    world.expect_nothing_left();
}

#[test]
fn raw_disk_is_rounded_up_to_sectors() {
    let world = World::new();
    let imported = world.import_as(&stemcell(&world.disk()[..1000]), None).unwrap();
    assert_eq!(imported.virtual_size, Bytes(1024));
    assert_eq!(world.path("out/image.raw").metadata().unwrap().len(), 1024);
}

#[test]
fn import_never_overwrites_its_target() {
    let world = World::new();
    std::fs::write(world.path("out/image.raw"), "precious").unwrap();
    assert_eq!(world.import_as(&world.disk(), None).unwrap_err().kind(), ErrorKind::Conflict);
    assert_eq!(std::fs::read(world.path("out/image.raw")).unwrap(), b"precious");
}

#[test]
fn import_ends_at_the_deadline_in_every_stage() {
    let world = World::new();
    let hanging = world.path("hanging");
    std::fs::write(world.path("draft"), "#!/bin/sh\nexec sleep 1000\n").unwrap();
    run("install", ["-m700".into(), world.path("draft").into(), hanging.clone().into()]);
    let slow = QemuImg::new(hanging);
    for (image, time) in [
        (stemcell(&world.disk()), 0),
        (stemcell(&world.qcow2("-c -o compression_type=zstd")), 1000),
    ] {
        std::fs::write(world.path("image"), image).unwrap();
        let deadline = Instant::now() + Duration::from_millis(time);
        let error = Import { deadline, ..world.job(&slow, None) }.run(&mut |_| {}).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout, "{}", error.report());
        world.expect_nothing_left();
    }
}

#[test]
fn hole_of_terabytes_ends_at_the_deadline() {
    let world = World::new();
    for name in ["notes", "disk.raw"] {
        run("truncate", ["-s1T".into(), world.path(name).into()]);
        let (from, to) = (world.dir.path(), world.path("image"));
        run("tar", ["-czSf".into(), to.into(), "-C".into(), from.into(), name.into()]);
        let qemu_img = QemuImg::new(NO_QEMU_IMG);
        let job = world.job(&qemu_img, Some(Format::Raw));
        let deadline = Instant::now() + Duration::from_millis(300);
        let error = Import { deadline, ..job }.run(&mut |_| {}).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout, "{}", error.report());
        world.expect_nothing_left();
    }
}

#[test]
fn progress_ends_at_the_size_of_the_file() {
    let world = World::new();
    let content = stemcell(&world.disk());
    std::fs::write(world.path("image"), &content).unwrap();
    let mut reported = Vec::new();
    world.job(&QemuImg::new("qemu-img"), None).run(&mut |bytes| reported.push(bytes)).unwrap();
    assert!(
        reported.is_sorted() && reported.last() == Some(&Bytes(content.len() as u64)),
        "{reported:?}"
    );
}

#[test]
fn import_that_panics_leaves_no_file() {
    let world = World::new();
    std::fs::write(world.path("image"), stemcell(&world.disk())).unwrap();
    let qemu_img = QemuImg::new("qemu-img");
    let job = world.job(&qemu_img, None);
    let run = std::panic::AssertUnwindSafe(|| job.run(&mut |_| panic!("of a test")));
    std::panic::catch_unwind(run).unwrap_err();
    world.expect_nothing_left();
}
