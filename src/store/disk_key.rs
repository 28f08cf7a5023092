//! The key of this host's encrypted disks: one file, root's alone. Its whole content is the LUKS passphrase, as
//! `qemu-img --object secret,file=…` takes it, so that an operator can open an image without us.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::{Rank, Store, atomic};
use crate::cid::DiskCid;
use crate::config::Config;
use crate::crash;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::schema::Redacted;
use crate::store::{DiskRecord, SnapshotRecord};

/// Its name in the state directory.
const FILE: &str = "disk.key";
/// Random bytes in a key of ours; it is written as twice as many hexadecimal digits, because QEMU wants UTF-8.
const RANDOM: usize = 32;
/// Bytes a key may have. Short ones are what people can remember; nobody needs to.
const LENGTHS: std::ops::RangeInclusive<u64> = 32..=4096;

/// Where the key is.
#[derive(Debug, Clone)]
pub struct DiskKey {
    path: PathBuf,
    ours: bool,
}

impl DiskKey {
    /// The key `config` means: the operator's file, or ours in the state directory.
    pub fn from_config(config: &Config) -> Self {
        match &config.key_file {
            Some(path) => Self { path: path.clone(), ours: false },
            None => Self { path: config.state_dir.join(FILE), ours: true },
        }
    }

    /// The file, for programs that are root. Its content never goes into an argument, an environment, a record or a log.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is in the file.
    ///
    /// # Errors
    /// [`ErrorKind::BadConfig`] if it is not there, or not one a key can be in.
    pub fn read(&self) -> Result<Redacted<String>> {
        let refused = |why: &str| {
            Error::new(ErrorKind::BadConfig, format!("key file '{}' {why}", self.path.display()))
        };
        let file = File::open(&self.path).map_err(|error| {
            refused("can not be read")
                .because(error)
                .hint("restore it from a backup: without it nobody can read the encrypted disks")
        })?;
        let meta = file.metadata().at("look at", &self.path)?;
        if !meta.is_file() || meta.uid() != 0 || meta.permissions().mode() & 0o077 != 0 {
            return Err(refused("must be a plain file that only root can read")
                .hint("chown root, chmod 0600"));
        }
        let mut text = String::new();
        file.take(LENGTHS.end() + 1)
            .read_to_string(&mut text)
            .map_err(|_| refused("must be UTF-8 text"))?;
        if !LENGTHS.contains(&(text.len() as u64)) || text.contains('\0') {
            return Err(refused("must have 32 to 4096 bytes, none of them zero")
                .hint("`openssl rand -hex 32` makes a good one"));
        }
        Ok(Redacted(text))
    }

    /// Makes our key if no disk was encrypted yet, and reads it otherwise.
    ///
    /// # Errors
    /// As [`Self::read`]: also when it is gone but disks need it, because a second key would not open them.
    pub fn create_if_missing(&self, store: &Store, deadline: Instant) -> Result<()> {
        // A link to nothing is a key of an operator whose filesystem is not mounted.
        let is_there = || atomic::entry_exists(&self.path);
        if self.ours && !is_there() {
            let _lock = store.short_lock(Rank::Space, "key", deadline)?;
            if !is_there() && !has_encrypted(store)? {
                self.make()?;
            }
        }
        self.read().map(drop)
    }

    /// Writes a new key, durable and whole. The caller holds the lock, so that what a killed call left is nobody's.
    fn make(&self) -> Result<()> {
        let mut random = [0; RANDOM];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
            .map_err(|e| Error::os("get random bytes for a key", std::io::Error::from(e)))?;
        let digits: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        let new = self.path.with_extension("key.new");
        atomic::remove_file(&new)?;
        let mut file =
            File::options().write(true).create_new(true).mode(0o600).open(&new).at("make", &new)?;
        file.write_all(digits.as_bytes()).and_then(|()| file.sync_all()).at("write", &new)?;
        crash::point!("disk key written");
        std::fs::rename(&new, &self.path).at("make", &self.path)?;
        crash::point!("disk key made");
        atomic::sync_dir(self.path.parent().expect("a file in the state directory"))
    }

    /// What an image says that this key does not open: QEMU's own words are "Invalid password, cannot unlock any keyslot".
    pub fn wrong_key_error(&self, disk: Option<&DiskCid>) -> Error {
        let what = disk.map_or("an encrypted disk".to_owned(), |disk| format!("disk '{disk}'"));
        Error::new(
            ErrorKind::BadConfig,
            format!("the key in '{}' does not open {what}", self.path.display()),
        )
        .hint(
            "the disk was made with another key: put that one back, or name its file in 'key_file'",
        )
    }
}

/// QEMU's words for a wrong key (crypto/block-luks.c, 7.2 to 10.0).
pub const WRONG_KEY: &str = "Invalid password, cannot unlock any keyslot";

/// Whether there is a disk or a snapshot that the key opens.
fn has_encrypted(store: &Store) -> Result<bool> {
    for cid in store.list::<DiskRecord>()? {
        if store
            .read::<DiskRecord>(&cid)?
            .is_some_and(|disk| disk.encrypted && disk.phase != super::Phase::Creating)
        {
            return Ok(true);
        }
    }
    for cid in store.list::<SnapshotRecord>()? {
        if store.read::<SnapshotRecord>(&cid)?.is_some_and(|snapshot| snapshot.disk.encrypted) {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(dir: &Path) -> (DiskKey, Store) {
        (DiskKey { path: dir.join(FILE), ours: true }, Store::new(dir, dir))
    }

    #[test]
    fn a_key_is_made_once_and_is_nobody_elses() {
        let dir = tempfile::tempdir().unwrap();
        let (key, store) = key(dir.path());
        std::fs::create_dir(dir.path().join("locks")).unwrap();
        std::fs::write(dir.path().join("disk.key.new"), "of a call that was killed").unwrap();
        key.create_if_missing(&store, Instant::now()).unwrap();
        let first = key.read().unwrap();
        key.create_if_missing(&store, Instant::now()).unwrap();
        assert_eq!(first, key.read().unwrap());
        assert_eq!((first.0.len(), format!("{first:?}")), (64, "***".to_owned()));
        assert_eq!(key.path().metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(dir.path().read_dir().unwrap().count(), 2, "nothing left beside it but 'locks'");
    }

    #[test]
    fn a_link_to_nothing_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let (key, store) = key(dir.path());
        std::os::unix::fs::symlink("/nowhere/key", key.path()).unwrap();
        assert!(
            key.create_if_missing(&store, Instant::now())
                .unwrap_err()
                .report()
                .contains("can not be read")
        );
        assert!(key.path().is_symlink());
    }

    #[test]
    fn what_others_can_read_or_guess_is_no_key() {
        let dir = tempfile::tempdir().unwrap();
        let (key, _) = key(dir.path());
        for (text, mode, why) in [
            ("x".repeat(64), 0o640, "only root can read"),
            ("hunter2".into(), 0o600, "32 to 4096"),
            ("x".repeat(5000), 0o600, "32 to 4096"),
        ] {
            std::fs::write(key.path(), text).unwrap();
            std::fs::set_permissions(key.path(), std::fs::Permissions::from_mode(mode)).unwrap();
            let refused = key.read().unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::BadConfig);
            assert!(
                refused.report().contains(why) && !refused.report().contains("hunter"),
                "{}",
                refused.report()
            );
        }
    }
}
