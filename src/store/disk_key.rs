//! The key of this host's encrypted disks: one file that only root can read. Its whole content is
//! the LUKS passphrase, as `qemu-img --object secret,file=…` takes it, so that an operator can open
//! an image without the CPI.

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

/// Name of a generated key in the state directory.
const FILE: &str = "disk.key";
/// Random bytes in a generated key. The file has twice as many hexadecimal digits, because QEMU
/// requires UTF-8.
const RANDOM_BYTES: usize = 32;
/// Bytes in a key file. A shorter key would be easy to guess.
const LENGTHS: std::ops::RangeInclusive<u64> = 32..=4096;

/// The key file.
#[derive(Debug, Clone)]
pub struct DiskKey {
    path: PathBuf,
    /// Whether the CPI generates the key; otherwise the operator provides it.
    is_generated: bool,
}

impl DiskKey {
    /// The key file of `config`: the operator's `key_file`, or `disk.key` in the state directory.
    pub fn from_config(config: &Config) -> Self {
        match &config.key_file {
            Some(path) => Self { path: path.clone(), is_generated: false },
            None => Self { path: config.state_dir.join(FILE), is_generated: true },
        }
    }

    /// The file, for child processes that run as root. Its content never goes into an argument, an
    /// environment variable, a record or a log.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The key.
    ///
    /// # Errors
    /// [`ErrorKind::BadConfig`] if the file is missing, readable by other users, or not a key of 32
    /// to 4096 bytes.
    pub fn read(&self) -> Result<Redacted<String>> {
        let refused = |why: &str| {
            Error::new(ErrorKind::BadConfig, format!("key file '{}' {why}", self.path.display()))
        };
        let file = File::open(&self.path).map_err(|error| {
            let may_be_new = !self.is_generated && error.kind() == std::io::ErrorKind::NotFound;
            refused("cannot be read").because(error).hint(if may_be_new {
                "if no disk is encrypted with it yet, make the file: `openssl rand -hex 32` prints \
                 a good key; otherwise restore it from a backup"
            } else {
                "restore it from a backup: the encrypted disks cannot be read without it"
            })
        })?;
        let meta = file.metadata().at("stat", &self.path)?;
        if !meta.is_file() || meta.uid() != 0 || meta.permissions().mode() & 0o077 != 0 {
            return Err(refused("must be a regular file that only root can read")
                .hint(format!("run `chown root {0}` and `chmod 0600 {0}`", self.path.display())));
        }
        let mut text = String::new();
        file.take(LENGTHS.end() + 1)
            .read_to_string(&mut text)
            .map_err(|_| refused("must be UTF-8 text"))?;
        if !LENGTHS.contains(&(text.len() as u64)) || text.contains('\0') {
            return Err(refused("must have 32 to 4096 bytes, none of them zero")
                .hint("`openssl rand -hex 32` prints a good key"));
        }
        Ok(Redacted(text))
    }

    /// Generates the key if it is missing and no disk is encrypted yet, then checks that it can be
    /// read. Does not generate a key for the operator's `key_file`.
    ///
    /// # Errors
    /// As [`Self::read`], also if the key is missing but encrypted disks exist: another key would
    /// not open them.
    pub fn create_if_missing(&self, store: &Store, deadline: Instant) -> Result<()> {
        // A dangling symlink counts: its target may be on a filesystem that is not mounted.
        let exists = || atomic::entry_exists(&self.path);
        if self.is_generated && !exists() {
            let _lock = store.short_lock(Rank::Space, "key", deadline)?;
            if !exists() && !has_encrypted_disks(store)? {
                self.generate()?;
            }
        }
        self.read().map(drop)
    }

    /// Generates the key. Durable when it returns. The caller holds the lock, so a temporary file
    /// is that of a killed call.
    fn generate(&self) -> Result<()> {
        let mut random = [0; RANDOM_BYTES];
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

    /// The error for an image that this key does not open. QEMU reports it as [`WRONG_KEY`].
    pub fn wrong_key_error(&self, disk: Option<&DiskCid>) -> Error {
        let what = disk.map_or("an encrypted disk".to_owned(), |disk| format!("disk '{disk}'"));
        Error::new(
            ErrorKind::BadConfig,
            format!("the key in '{}' does not open {what}", self.path.display()),
        )
        .hint(
            "the disk was made with another key: restore that key, or configure its file as \
             'key_file'",
        )
    }
}

/// QEMU's message for a wrong key (crypto/block-luks.c, QEMU 7.2 to 10.0).
pub const WRONG_KEY: &str = "Invalid password, cannot unlock any keyslot";

/// Whether an encrypted disk or snapshot exists.
fn has_encrypted_disks(store: &Store) -> Result<bool> {
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
        (DiskKey { path: dir.join(FILE), is_generated: true }, Store::new(dir, dir))
    }

    #[test]
    fn a_key_is_generated_once_and_only_root_can_read_it() {
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
        assert_eq!(dir.path().read_dir().unwrap().count(), 2, "no temporary file is left");
    }

    #[test]
    fn a_dangling_symlink_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let (key, store) = key(dir.path());
        std::os::unix::fs::symlink("/nowhere/key", key.path()).unwrap();
        assert!(
            key.create_if_missing(&store, Instant::now())
                .unwrap_err()
                .report()
                .contains("cannot be read")
        );
        assert!(key.path().is_symlink());
    }

    #[test]
    fn a_key_that_others_can_read_or_guess_is_refused() {
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

    #[test]
    fn missing_key_file_of_the_operator_may_be_a_new_one() {
        let hint = |is_generated| {
            let key = DiskKey { path: "/nonexistent/disk.key".into(), is_generated };
            key.read().unwrap_err().hint_text().unwrap().to_owned()
        };
        assert!(hint(false).contains("make the file: `openssl rand -hex 32`"));
        assert!(hint(true).starts_with("restore it from a backup"));
    }
}
