use proptest::prelude::*;

use super::*;
use crate::image::testing::{qemu_img, sample};

/// A valid image: version 3, 64 KiB clusters, 1 GiB, L1 table at the fourth cluster.
fn sound() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    crate::image::qcow2::create(&path, Bytes(1 << 30), None).unwrap().sync().unwrap();
    std::fs::read(path).unwrap()
}

fn refused(at: usize, bytes: &[u8]) -> String {
    let mut image = sound();
    image[at..at + bytes.len()].copy_from_slice(bytes);
    Header::parse(&image).unwrap_err().to_string()
}

#[test]
fn parse_headers_that_qemu_img_writes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    let read = |options: &str, size: &str| {
        qemu_img(
            ["create", "-u", "-fqcow2", "-o", options, path.to_str().unwrap(), size]
                .map(AsRef::as_ref),
        );
        crate::image::testing::header(&path)
    };
    let old = read("compat=0.10", "5G");
    assert_eq!((old.version, old.virtual_size, old.refcount_bits), (2, Bytes(5 << 30), 16));
    assert_eq!((old.cluster_bits, old.l1_entries, old.l1_entries_needed()), (16, 10, 10));
    let new = read("cluster_size=2M,refcount_bits=64,compression_type=zstd,extended_l2=on", "1M");
    assert_eq!((new.version, new.cluster_bits, new.refcount_bits), (3, 21, 64));
    assert!(new.compression == Compression::Zstd && new.extended_l2 && new.encryption.is_none());
    let overlay = read("backing_file=/a/b,backing_fmt=vmdk", "1M");
    assert_eq!(overlay.backing_file.as_deref(), Some("/a/b"));
    assert_eq!(overlay.backing_format.as_deref(), Some("vmdk"));
    let data_file = dir.path().join("data");
    assert!(read(&format!("data_file={}", data_file.display()), "1M").external_data_file);
    let mut encrypted = sound();
    encrypted[35] = 2;
    assert_eq!(Header::parse(&encrypted).unwrap().encryption, Some(Encryption::Luks));
}

#[test]
fn every_field_is_checked() {
    assert!(Header::parse(&sound()).is_ok());
    assert_eq!(refused(0, b"QFI\0"), "no qcow2 magic");
    assert_eq!(refused(7, &[4]), "qcow2 header field 'version' is 4: 2 and 3 are known");
    for (at, bytes, field) in [
        (23, &[8][..], "cluster_bits"),
        (23, &[22], "cluster_bits"),
        (24, &[1], "size"),
        (35, &[3], "crypt_method"),
        (36, &[0xff], "l1_size"),
        (36, &[0, 0, 0, 1], "l1_size"),
        (47, &[1], "l1_table_offset"),
        (55, &[1], "refcount_table_offset"),
        (59, &[0], "refcount_table_clusters"),
        (56, &[0xff], "refcount_table_clusters"),
        (99, &[7], "refcount_order"),
        (103, &[96], "header_length"),
        (100, &[1], "header_length"),
        (104, &[1], "compression_type"),
        (79, &[8], "compression_type"),
        (14, &[1, 0, 0, 0, 4, 0], "backing_file_size"),
    ] {
        let message = refused(at, bytes);
        assert!(message.contains(&format!("'{field}'")), "{field}: {message}");
    }
    assert_eq!(refused(76, &[0, 0, 0, 0x20]), "qcow2 incompatible features 0x20 are unknown");
    assert!(refused(8, &[0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 5]).contains("backing file name"));
    assert!(
        refused(8, &[0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 5]).contains("outside the 65536 bytes")
    );
    assert!(
        refused(112, &[1, 2, 3, 4, 0, 1, 0, 0]).contains("ends early"),
        "an extension longer than its cluster"
    );
    assert!(Header::parse(&sound()[..111]).is_ok(), "the padding is not needed");
    assert_eq!(
        Header::parse(&sound()[..99]),
        Err(HeaderError::Truncated { needed: 100, have: 99 })
    );
    let header = Header::parse(&sound()).unwrap();
    assert!(header.check_offsets(4 << 16).is_ok());
    let outside = header.check_offsets(3 << 16).unwrap_err().to_string();
    assert_eq!(
        outside,
        "the L1 table of the qcow2 header lies at 196608, outside the 196608 bytes of the file"
    );
}

proptest! {
    #[test]
    fn random_bytes_never_panic(
        mut bytes in prop::collection::vec(any::<u8>(), 0..300),
        version in 2..=3u8
    ) {
        let _ = Header::parse(&bytes);
        bytes.splice(..8.min(bytes.len()), *b"QFI\xfb\0\0\0\0");
        bytes[7] = version;
        let _ = Header::parse(&bytes);
    }

    #[test]
    fn changed_header_never_panics(
        changes in prop::collection::vec((0..200usize, any::<u8>()), 1..6)
    ) {
        let mut image = sample().to_vec();
        changes.into_iter().for_each(|(at, byte)| image[at] = byte);
        if let Ok(header) = Header::parse(&image) {
            let _ = header.check_offsets(image.len() as u64);
            prop_assert!(header.virtual_size <= MiB::MAX.bytes());
            prop_assert!(u64::from(header.l1_entries) >= header.l1_entries_needed());
        }
    }
}
