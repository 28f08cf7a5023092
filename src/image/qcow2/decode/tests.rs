use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::error::IoContext;
use crate::image::testing::sample;

fn decode_bytes(image: &[u8]) -> Result<File, DecodeError> {
    let target = tempfile::tempfile().unwrap();
    let header = Header::parse(image).unwrap();
    let path = std::path::Path::new("target");
    let mut write = |offset, data: &[u8]| target.write_all_at(data, offset).at("write", path);
    let deadline = Instant::now() + Duration::from_secs(60);
    decode(&header, image, &mut write, deadline).map(|()| target)
}

/// Changes the L2 entry of the sample's first cluster with data.
fn with_l2_entry(change: impl FnOnce(&mut [u8], u64)) -> Result<File, DecodeError> {
    let mut image = sample().to_vec();
    let number = |at: u64| u64::from_be_bytes(image[at as usize..][..8].try_into().unwrap());
    let l2 = number(Header::parse(&image).unwrap().l1_offset) & entry::OFFSET;
    let (at, value) = (l2 as usize + 2 * 8, number(l2 + 2 * 8));
    assert_ne!(value & entry::OFFSET, 0);
    change(&mut image[at..at + 8], value);
    decode_bytes(&image)
}

fn damage(result: Result<File, DecodeError>) -> String {
    match result {
        Err(error @ DecodeError::Damaged { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn decode_plain_compressed_and_zero_clusters() {
    let target = decode_bytes(sample()).unwrap();
    let mut disk = vec![0; 5 << 20];
    let length = target.metadata().unwrap().len() as usize;
    target.read_exact_at(&mut disk[..length], 0).unwrap();
    for (from, length, byte) in
        [(0, 8, 0), (8, 12, 1), (20, 44, 0), (64, 16, 2), (80, 4016, 0), (4096, 4, 3)]
    {
        assert!(disk[from << 10..(from + length) << 10].iter().all(|b| *b == byte), "{from} KiB");
    }
}

#[test]
fn invalid_l2_entries_are_damage() {
    let set = |value: u64| with_l2_entry(|entry, _| entry.copy_from_slice(&value.to_be_bytes()));
    assert!(damage(set(1 << 40)).starts_with("a cluster ends at byte 0x10000000000"));
    assert!(damage(set(entry::COMPRESSED | 1 << 40)).starts_with("a compressed cluster"));
    assert!(damage(set(4096 + 512)).starts_with("an entry that names no cluster"));
    assert!(
        damage(with_l2_entry(|entry, _| entry[7] |= 2)).starts_with("an entry with reserved bits")
    );
    assert!(
        damage(with_l2_entry(|entry, _| entry[0] |= 4)).starts_with("an entry with reserved bits")
    );
}

#[test]
fn cluster_that_two_entries_name_is_refused() {
    let refused =
        with_l2_entry(|entry, value| entry.copy_from_slice(&(value + 4096).to_be_bytes()));
    assert!(matches!(refused, Err(DecodeError::Shared(_))), "{refused:?}");
}

#[test]
fn tables_that_share_an_l2_table_end_at_the_queue_limit() {
    // 64 GiB of 512-byte clusters need 2,097,152 L1 entries. All of them refer to the same L2
    // table.
    let mut image = vec![0; 512];
    image[..104].copy_from_slice(&sample()[..104]);
    image[8..20].fill(0);
    image[23] = 9;
    image[24..32].copy_from_slice(&(64u64 << 30).to_be_bytes());
    image[36..40].copy_from_slice(&(1u32 << 21).to_be_bytes());
    image[40..48].copy_from_slice(&512u64.to_be_bytes());
    image[48..56].copy_from_slice(&512u64.to_be_bytes());
    image[103] = 104;
    let l2 = 512 + (8u64 << 21);
    image.extend((0..1 << 21).flat_map(|_| l2.to_be_bytes()));
    image.extend([0; 512]);
    assert!(matches!(decode_bytes(&image), Err(DecodeError::NotStreamable(_))));
}

#[test]
fn data_before_the_window_is_not_streamable() {
    let mut image = sample().to_vec();
    let header = Header::parse(&image).unwrap();
    // Moves the L1 table to the end of the file, further than the window reaches back.
    let table = image[header.l1_offset as usize..][..header.l1_entries as usize * 8].to_vec();
    image.resize(4 * MIN_LOOKBACK, 0);
    image[40..48].copy_from_slice(&(4 * MIN_LOOKBACK as u64).to_be_bytes());
    image.extend(table);
    assert!(matches!(decode_bytes(&image), Err(DecodeError::NotStreamable(_))));
}

#[test]
fn decode_ends_at_the_deadline() {
    let header = Header::parse(sample()).unwrap();
    let late = decode(&header, sample(), &mut |_, _| Ok(()), Instant::now());
    assert!(matches!(late, Err(DecodeError::Deadline)));
}

proptest! {
    #[test]
    fn changed_images_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)
    ) {
        let mut image = sample().to_vec();
        changes.into_iter().for_each(|(at, byte)| *at.get_mut(&mut image) = byte);
        if Header::parse(&image).is_ok() {
            let _ = decode_bytes(&image);
        }
    }

    #[test]
    fn changed_tables_never_panic(
        changes in prop::collection::vec((0..4096usize, any::<u64>()), 1..20)
    ) {
        let mut image = sample().to_vec();
        let header = Header::parse(&image).unwrap();
        let start = header.l1_offset as usize / 8;
        for (at, value) in changes {
            let at = (start + at) * 8;
            if let Some(entry) = image.get_mut(at..at + 8) {
                entry.copy_from_slice(&value.to_be_bytes());
            }
        }
        let _ = decode_bytes(&image);
    }

    #[test]
    fn truncated_images_never_panic(length in any::<prop::sample::Index>()) {
        let image = sample();
        let cut = &image[..length.index(image.len())];
        if Header::parse(cut).is_ok() {
            let _ = decode_bytes(cut);
        }
    }
}
