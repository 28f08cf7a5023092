//! FAT images for config drives: one filesystem without a partition table. The guest finds it by
//! its label.
//!
//! The image is built in memory and written once: a config drive holds a few kilobytes.

use std::collections::BTreeSet;
use std::io::{self, Cursor, Write};
use std::path::Path;

use fatfs::{FileSystem, FormatVolumeOptions, FsOptions, format_volume};

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::image::{UnsyncedFile, create_new, keep, raw};

type Folder<'a, 'b> = fatfs::Dir<'a, Cursor<&'b mut [u8]>>;

/// Size of the smallest image, bytes, and the unit that sizes are rounded to.
const MIB: usize = 1 << 20;
/// Allocation unit assumed when estimating the space for files, bytes. fatfs chooses a smaller one
/// up to 4 GiB.
const CLUSTER: usize = 4096;

/// Writes a FAT filesystem with the label `label` and the files `files` to a new file at `path`,
/// mode 0600. A file's name may contain folders, separated by `/`. The image has at least 1 MiB,
/// and an eighth more than the files need.
///
/// # Errors
/// [`ErrorKind::Internal`] if FAT cannot represent the label or a name; otherwise if `path` exists
/// or cannot be written. No message quotes a file's content: it is secret.
pub fn write_labelled(path: &Path, label: &str, files: &[(&str, &[u8])]) -> Result<UnsyncedFile> {
    let image = image(label, files).map_err(|error| {
        Error::new(ErrorKind::Internal, format!("make the FAT image '{}'", path.display()))
            .because(error)
    })?;
    let new = create_new(path)?;
    new.as_file().set_len(image.len() as u64).at("set the size of", path)?;
    raw::write_sparse(new.as_file(), 0, &image).at("write", path)?;
    Ok(keep(new))
}

fn image(label: &str, files: &[(&str, &[u8])]) -> io::Result<Vec<u8>> {
    let mut image = vec![0; size_for(files)];
    format_volume(
        Cursor::new(&mut image[..]),
        FormatVolumeOptions::new().volume_label(padded(label)?),
    )?;
    let with_root = |image: &mut [u8], act: &dyn Fn(Folder<'_, '_>) -> io::Result<()>| {
        let filesystem = FileSystem::new(Cursor::new(image), FsOptions::new())?;
        act(filesystem.root_dir())?;
        filesystem.unmount()
    };
    with_root(&mut image, &|root| {
        folders(files).into_iter().try_for_each(|name| root.create_dir(name).map(drop))
    })?;
    fix_dot_entries(&mut image);
    with_root(&mut image, &|root| {
        files.iter().try_for_each(|(name, content)| {
            let mut file = root.create_file(name)?;
            file.write_all(content)?;
            file.flush()
        })
    })?;
    Ok(image)
}

/// Every folder that `files` need, parents first.
fn folders<'a>(files: &[(&'a str, &[u8])]) -> BTreeSet<&'a str> {
    files.iter().flat_map(|(name, _)| name.match_indices('/').map(|(at, _)| &name[..at])).collect()
}

/// Moves the entries `.` and `..` to the start of each folder. fatfs 0.3.6 gives them long names,
/// so they are not the folder's first two entries, as FAT requires. `image` holds folders only, so
/// a sector that looks like the start of such a folder is one.
fn fix_dot_entries(image: &mut [u8]) {
    const ENTRY: usize = 32;
    /// First byte of a free entry, in place of the name's first byte.
    const FREE: u8 = 0xe5;
    for sector in image.chunks_mut(512) {
        let named = |at: usize, name: &[u8; 11]| sector[at * ENTRY..].starts_with(name);
        if named(1, b".          ") && named(3, b"..         ") {
            sector.copy_within(ENTRY..2 * ENTRY, 0);
            sector.copy_within(3 * ENTRY..4 * ENTRY, ENTRY);
            sector[2 * ENTRY] = FREE;
            sector[3 * ENTRY] = FREE;
        }
    }
}

/// The label as FAT stores it: upper case, 11 bytes, padded with spaces.
fn padded(label: &str) -> io::Result<[u8; 11]> {
    let allowed = |c: u8| c.is_ascii_uppercase() || c.is_ascii_digit() || b"-_".contains(&c);
    if label.is_empty() || label.len() > 11 || !label.bytes().all(allowed) {
        return Err(io::Error::other(
            "a FAT label has 1 to 11 characters of 'A' to 'Z', '0' to '9', '-' and '_'",
        ));
    }
    let mut padded = [b' '; 11];
    padded[..label.len()].copy_from_slice(label.as_bytes());
    Ok(padded)
}

/// Size in bytes of an image with room for `files`: whole clusters, one more for each folder, the
/// tables (12 to 32 bits a cluster) and an eighth in reserve.
fn size_for(files: &[(&str, &[u8])]) -> usize {
    let contents: usize =
        files.iter().map(|(_, content)| content.len().next_multiple_of(CLUSTER)).sum();
    let needed = contents + (files.len() + folders(files).len()) * CLUSTER;
    (needed + needed / 8 + MIB / 2).next_multiple_of(MIB)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::unix::fs::PermissionsExt;

    use proptest::prelude::*;

    use super::*;

    /// Checks the image with fsck.fat from the package dosfstools, where that is installed.
    fn fsck(image: &Path) {
        const FSCK: &str = "/usr/sbin/fsck.fat";
        if Path::new(FSCK).exists() {
            crate::image::testing::run(FSCK, ["-n".into(), image.into()]);
        }
    }

    fn read_back(path: &Path, name: &str) -> Vec<u8> {
        let filesystem = FileSystem::new(
            File::options().read(true).write(true).open(path).unwrap(),
            FsOptions::new(),
        );
        let mut content = Vec::new();
        filesystem.unwrap().root_dir().open_file(name).unwrap().read_to_end(&mut content).unwrap();
        content
    }

    #[test]
    fn config_drive_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.img");
        let files: [(&str, &[u8]); 3] = [
            ("ec2/latest/meta-data.json", b"{}"),
            ("ec2/latest/user-data", b"{\"agent_id\": \"a\"}"),
            ("ec2/a name longer than eight and three", b""),
        ];
        write_labelled(&path, "CONFIG-2", &files).unwrap().sync().unwrap();
        for (name, content) in files {
            assert_eq!(read_back(&path, name), content);
        }
        fsck(&path);
        let meta = path.metadata().unwrap();
        assert_eq!((meta.len(), meta.permissions().mode() & 0o777), (MIB as u64, 0o600));
        let filesystem = FileSystem::new(
            File::options().read(true).write(true).open(&path).unwrap(),
            FsOptions::new(),
        );
        let filesystem = filesystem.unwrap();
        assert_eq!(filesystem.volume_label(), "CONFIG-2");
        assert_eq!(
            filesystem.read_volume_label_from_root_dir().unwrap().as_deref(),
            Some("CONFIG-2")
        );
        let head = std::fs::read(&path).unwrap();
        let dots = head.chunks(512).filter(|sector| sector.starts_with(b".          ")).count();
        assert_eq!(dots, 2, "each folder starts with '.'");
        assert_eq!(
            (&head[510..512], &head[446..510]),
            (&[0x55, 0xaa][..], &[0; 64][..]),
            "no partition table"
        );
        assert!(write_labelled(&path, "CONFIG-2", &files).unwrap_err().report().contains("exists"));
    }

    #[test]
    fn large_and_many_files_fit() {
        let dir = tempfile::tempdir().unwrap();
        let content: Vec<u8> = (0..11_000_000u32).map(|n| (n % 251) as u8).collect();
        let path = dir.path().join("large.img");
        write_labelled(
            &path,
            "CONFIG-2",
            &[("a/user-data", &content), ("a/other", &content[..70_000])],
        )
        .unwrap()
        .sync()
        .unwrap();
        assert!(read_back(&path, "a/user-data") == content);
        let names: Vec<String> =
            (0..1000).map(|n| format!("folder-{}/file with number {n}", n % 7)).collect();
        let files: Vec<(&str, &[u8])> =
            names.iter().map(|name| (name.as_str(), &content[..5])).collect();
        let path = dir.path().join("many.img");
        write_labelled(&path, "CONFIG-2", &files).unwrap().sync().unwrap();
        assert_eq!(read_back(&path, &names[999]), &content[..5]);
        fsck(&dir.path().join("large.img"));
        fsck(&path);
    }

    #[test]
    fn label_or_name_fat_cannot_hold_is_refused_and_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.img");
        for (label, name) in [
            ("", "a"),
            ("config-2", "a"),
            ("TWELVE-CHARS", "a"),
            ("CONFIG-2", "a*b"),
            ("CONFIG-2", ""),
        ] {
            let refused = write_labelled(&path, label, &[(name, b"secret")]).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Internal, "{label} {name}");
            assert!(!refused.report().contains("secret"));
        }
        assert!(!path.exists());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn files_of_any_size_fit(sizes in prop::collection::vec(0..200_000usize, 0..12)) {
            let content = vec![7; 200_000];
            let names: Vec<String> = (0..sizes.len()).map(|n| format!("d{n}/file")).collect();
            let sized = names.iter().zip(&sizes);
            let files: Vec<_> = sized.map(|(n, s)| (n.as_str(), &content[..*s])).collect();
            image("CONFIG-2", &files).unwrap();
        }
    }
}
