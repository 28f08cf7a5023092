//! Images that import must reject.

use super::super::invalid_image::LIGHT_STEMCELL_HINT;
use super::*;

#[test]
fn truncated_image_is_rejected_at_any_length() {
    let world = World::new();
    for image in [world.disk(), world.qcow2("-c -o compat=0.10")] {
        let (archive, compressed) = (tar(&[("root.img", &image)]), stemcell(&image));
        for cut in [1, 3, 9, 600, compressed.len() / 2] {
            let truncated = &compressed[..compressed.len() - cut];
            assert_eq!(world.reason(truncated, None), InvalidImage::Truncated("the gzip data"));
        }
        for cut in [1025, 2000, archive.len() / 2] {
            let refused = world.reason(&archive[..archive.len() - cut], None).to_string();
            assert!(refused.contains("truncated"), "{refused}");
        }
        assert_eq!(
            world.reason(&archive[..archive.len() - 1024], None),
            InvalidImage::Truncated("the tar archive")
        );
    }
    let image = world.qcow2("-o compat=1.1");
    assert!(matches!(
        world.reason(&image[..image.len() - (1 << 20)], None),
        InvalidImage::Damaged(_)
    ));
    let world = World { qemu_img: "qemu-img", ..world };
    let image = world.qcow2("-o extended_l2=on");
    assert!(matches!(
        world.reason(&image[..image.len() - (1 << 20)], None),
        InvalidImage::Damaged(_)
    ));
    let InvalidImage::Member { problem, .. } = world.reason(&stemcell(&image[..100_000]), None)
    else {
        panic!()
    };
    assert!(matches!(*problem, InvalidImage::Header(HeaderError::Outside { .. })), "{problem}");
}

#[test]
fn damaged_gzip_data_is_rejected() {
    let world = World::new();
    let sound = stemcell(&world.disk());
    for at in [4 << 10, sound.len() / 2, sound.len() - 6] {
        let mut damaged = sound.clone();
        damaged[at] ^= 0x10;
        world.reason(&damaged, None);
    }
    assert!(matches!(
        world.reason(&[&sound[..], b"and something more"].concat(), None),
        InvalidImage::Gzip(_)
    ));
}

#[test]
fn archive_may_be_followed_by_padding_only() {
    let world = World::new();
    let archive = tar(&[("root.img", &world.disk())]);
    world.expect_disk(&gzip(&[&archive[..], &[0; 10240]].concat()), None);
    assert_eq!(
        world.reason(&gzip(&[&archive[..], &[0; 10240], b"x"].concat()), None),
        InvalidImage::Trailing
    );
    assert_eq!(world.reason(&gzip(&archive.repeat(2)), None), InvalidImage::Trailing);
}

#[test]
fn archive_without_exactly_one_image_is_rejected() {
    let world = World::new();
    let disk = world.disk();
    let ovf = gzip(&tar(&[("image.ovf", b"x"), ("image.mf", b"x"), ("image-disk1.vmdk", b"KDMV")]));
    assert_eq!(
        world.reason(&ovf, None),
        InvalidImage::NoImage("image.ovf, image.mf, image-disk1.vmdk".into())
    );
    assert_eq!(
        world.reason(&gzip(&tar(&[("a/root.img", &disk)])), None),
        InvalidImage::NoImage("a/root.img".into())
    );
    let two = gzip(&tar(&[("root.img", &disk), ("disk.raw", &disk)]));
    assert_eq!(world.reason(&two, None), InvalidImage::TwoImages("disk.raw".into()));
    let member =
        InvalidImage::Member { name: "root.img".into(), problem: Box::new(InvalidImage::NoSize) };
    assert_eq!(world.reason(&stemcell(b""), None), member);
}

#[test]
fn archive_with_unsafe_members_is_rejected() {
    let world = World::new();
    let archive = |kind: EntryType, name: &[u8]| {
        let mut header = header(kind, 0);
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        header.set_link_name("/etc/passwd").unwrap();
        header.set_cksum();
        [header.as_bytes().as_slice(), &tar(&[("root.img", &world.disk())])].concat()
    };
    for name in ["/root.img", "../root.img", "a/../../root.img"] {
        let refused = world.reason(&gzip(&archive(EntryType::Regular, name.as_bytes())), None);
        assert_eq!(refused, InvalidImage::MemberPath(name.into()));
    }
    for (kind, what) in [
        (EntryType::Symlink, "symbolic link"),
        (EntryType::Link, "hard link"),
        (EntryType::Block, "device"),
        (EntryType::Fifo, "pipe"),
        (EntryType::new(b'V'), "file of unknown type"),
    ] {
        let refused = world.reason(&gzip(&archive(kind, b"root.img")), None);
        assert_eq!(refused, InvalidImage::MemberKind { name: "root.img".into(), kind: what });
    }
    let refused =
        world.reason(&gzip(&archive(EntryType::Symlink, b"\x1b[31m\xff")), None).to_string();
    assert!(refused.contains("\\u{1b}[31m"), "{refused}");
}

#[test]
fn endless_member_name_is_rejected_before_it_fills_the_memory() {
    let world = World::new();
    let mut bomb = header(EntryType::GNULongName, 1 << 30);
    bomb.set_cksum();
    let mut content = GzEncoder::new(Vec::new(), Compression::fast());
    content.write_all(bomb.as_bytes()).unwrap();
    content.write_all(&vec![b'a'; 64 << 20]).unwrap();
    let refused = world.reason(&content.finish().unwrap(), None).to_string();
    assert!(refused.contains("more than 4 MiB"), "{refused}");
}

#[test]
fn format_that_is_not_the_declared_one_is_rejected() {
    let world = World::new();
    let (disk, qcow2) = (world.disk(), world.qcow2(""));
    for (image, declared, found) in
        [(&disk, Format::Qcow2, Format::Raw), (&qcow2, Format::Raw, Format::Qcow2)]
    {
        assert_eq!(world.reason(image, Some(declared)), InvalidImage::Declared { declared, found });
    }
    assert_eq!(world.reason(b"hello", None), InvalidImage::Unknown);
    assert_eq!(
        world.reason(b"KDMV and more", Some(Format::Raw)),
        InvalidImage::Foreign("a VMDK image (VMware)")
    );
    assert_eq!(
        world.reason(&gzip(&gzip(&disk)), None),
        InvalidImage::Foreign("gzip data within gzip data")
    );
    assert_eq!(world.import_as(b"hello", Some(Format::Raw)).unwrap().virtual_size, Bytes(512));
}

#[test]
fn qcow2_features_that_need_other_files_are_rejected() {
    let world = World::new();
    let path = world.path("overlay");
    create(&path, Bytes(1 << 20), Some(Backing { file_name: "/etc/shadow", format: Format::Raw }))
        .unwrap()
        .sync()
        .unwrap();
    let refused = world.reason(&std::fs::read(&path).unwrap(), None);
    assert_eq!(refused, InvalidImage::Feature("has a backing file: flatten it first"));
    std::fs::remove_file(&path).unwrap();

    let data_file = format!("data_file={}", world.path("data").display());
    let path = path.to_str().unwrap();
    qemu_img(["create", "-fqcow2", "-o", &data_file, path, "1M"].map(AsRef::as_ref));
    let refused = world.reason(&std::fs::read(path).unwrap(), None);
    assert_eq!(refused, InvalidImage::Feature("keeps its data in another file"));

    let mut image = world.qcow2("-o compat=1.1");
    image[72] = 0x80; // incompatible feature bit 63
    assert_eq!(world.reason(&image, None), InvalidImage::Header(HeaderError::Features(1 << 63)));
    image[72] = 0;
    image[79] = 2; // corrupt
    assert_eq!(world.reason(&image, None), InvalidImage::Feature("is marked corrupt"));
    image[79] = 0;
    image[35] = 2; // LUKS
    assert_eq!(world.reason(&image, None), InvalidImage::Feature("is encrypted"));
    image[35] = 0;
    image[24..32].copy_from_slice(&[0; 8]);
    assert_eq!(world.reason(&image, None), InvalidImage::NoSize);
    image[24] = 1; // 64 PiB and more
    assert!(matches!(
        world.reason(&image, None),
        InvalidImage::Header(HeaderError::Field { field: "size", .. })
    ));
}

#[test]
fn image_larger_than_the_limit_is_rejected() {
    let world = World::new();
    let mut absurd = header(EntryType::Regular, 65 << 40);
    absurd.set_path("root.img").unwrap();
    absurd.set_cksum();
    let archive = [absurd.as_bytes().as_slice(), &world.disk()].concat();
    let problem = Box::new(InvalidImage::TooLarge);
    assert_eq!(
        world.reason(&gzip(&archive), None),
        InvalidImage::Member { name: "root.img".into(), problem }
    );

    let path = world.path("large");
    let path = path.to_str().unwrap();
    for options in ["compat=1.1", "compression_type=zstd", "extended_l2=on"] {
        qemu_img(["create", "-fqcow2", "-o", options, path, "64T"].map(AsRef::as_ref));
        let image = std::fs::read(path).unwrap();
        assert_eq!(world.reason(&image, None), InvalidImage::TooLarge, "{options}");
    }
}

/// A qcow2 file of 512 MiB whose L2 entries all name one cluster.
fn shared_cluster(world: &World, options: &str) -> Vec<u8> {
    let path = world.path("bomb");
    let options = format!("cluster_size=64k,{options}");
    let path = path.to_str().unwrap();
    qemu_img(["create", "-fqcow2", "-o", &options, path, "512M"].map(AsRef::as_ref));
    let mut image = std::fs::read(path).unwrap();
    image.resize(image.len().next_multiple_of(1 << 16), 0);
    let header = Header::parse(&image).unwrap();
    for table in 0..header.l1_entries_needed() as usize {
        let (l2, at) = (image.len() as u64, header.l1_offset as usize + 8 * table);
        image[at..at + 8].copy_from_slice(&(1 << 63 | l2).to_be_bytes());
        let data = (1 << 63 | (l2 + (1 << 16))).to_be_bytes();
        let bitmap = u64::from(u32::MAX).to_be_bytes();
        for _ in 0..header.l2_entries() {
            image.extend(data);
            image.extend(header.extended_l2.then_some(bitmap).into_iter().flatten());
        }
    }
    image.extend(vec![7; 1 << 16]);
    image
}

#[test]
fn cluster_that_many_entries_name_is_refused_before_it_fills_the_filesystem() {
    let world = World { qemu_img: NO_QEMU_IMG, ..World::new() };
    for options in ["compat=0.10", "compression_type=zstd", "extended_l2=on"] {
        let image = gzip(&shared_cluster(&world, options));
        assert!(image.len() < 32 << 10, "{} bytes", image.len());
        let reason = world.reason(&image, None);
        assert!(matches!(reason, InvalidImage::SharedCluster(_)), "{options}: {reason}");
    }
}

#[test]
fn image_that_grows_beyond_the_granted_space_is_refused() {
    let mut world = World::new();
    let bomb = gzip(&[0x55, 0xaa].repeat(16 << 20));
    world.qemu_img = "qemu-img";
    let zstd = world.qcow2("-c -o compression_type=zstd");
    let (plain, packed) = (world.qcow2(""), stemcell(&world.qcow2("-c")));
    for image in [bomb, zstd, plain, packed] {
        std::fs::write(world.path("image"), &image).unwrap();
        let left = std::cell::Cell::new(2u64 << 20);
        let grant = |need: Bytes| {
            let granted = need.get().next_multiple_of(1 << 20);
            let full = || Error::new(ErrorKind::NoDiskSpace, "no more space");
            left.set(left.get().checked_sub(granted).ok_or_else(full)?);
            Ok::<_, Error>(Bytes(granted))
        };
        let qemu_img = QemuImg::new("qemu-img");
        let job = Import { grant: &grant, ..world.job(&qemu_img, None) };
        let error = job.run(&mut |_| {}).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoDiskSpace, "{}", error.report());
        world.expect_nothing_left();
    }
}

#[test]
fn full_filesystem_error_names_the_space_needed() {
    let world = World::new();
    let full = File::options().write(true).open("/dev/full").unwrap();
    std::fs::write(world.path("image"), stemcell(&world.disk())).unwrap();
    let qemu_img = QemuImg::new(NO_QEMU_IMG);
    let job = world.job(&qemu_img, None);
    let output = Output::new(&full, &|need| Ok(need));
    let failure = job.read(&output, &mut |_| {}).unwrap_err();
    let error = job.error(failure, &output);
    assert_eq!(error.kind(), ErrorKind::NoDiskSpace, "{}", error.report());
    assert!(
        error.report().contains("the image needs up to 9437696 bytes, '/"),
        "{}",
        error.report()
    );
    assert!(error.report().ends_with("iB free"), "{}", error.report());
}

#[test]
fn empty_image_is_reported_as_a_light_stemcell() {
    let world = World::new();
    let error = world.import_as(b"", None).unwrap_err();
    let image = world.path("image");
    let expected = format!(
        "the image '{}' is refused: it is empty (0 bytes), as in a light stemcell\n\
         Hint: {LIGHT_STEMCELL_HINT}",
        image.display()
    );
    assert_eq!(error.report(), expected);
}

#[test]
fn source_that_is_not_a_file_is_rejected_without_waiting() {
    let world = World::new();
    let qemu_img = QemuImg::new("qemu-img");
    run("mkfifo", [world.path("image").into()]);
    let error = world.job(&qemu_img, None).run(&mut |_| {}).unwrap_err();
    assert!(error.report().contains("not a regular file"), "{}", error.report());
    std::fs::remove_file(world.path("image")).unwrap();
    assert_eq!(world.job(&qemu_img, None).run(&mut |_| {}).unwrap_err().kind(), ErrorKind::Host);
    world.expect_nothing_left();
}
