//! Cloud ids (cids): names of objects that the Director stores and passes to later calls.
//!
//! A generated cid is a prefix and 15 random base32 characters (75 bits). So `disk-…` has exactly
//! 20 characters: the length of a virtio-blk serial, and the shortest that the agent's id resolver
//! accepts (bosh-agent, `id_device_path_resolver.go`). A parsed cid is safe as one path component
//! and as a QEMU id. A valid cid of another CPI parses, too; its object does not exist.

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Longest accepted cid, characters. The Director's column holds 255; a generated cid has at most
/// 24.
const MAX_LENGTH: usize = 128;

/// Reason why a text is not a cid. Its message shows at most one character of the text, which may
/// be hostile or long.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CidError {
    /// The text is empty, or has more than 128 characters.
    #[error("must have 1 to {MAX_LENGTH} characters, has {0}")]
    Length(usize),
    /// The text has a character outside `[A-Za-z0-9._:-]`, or its first one is no letter or digit.
    #[error(
        "character {0:?} at position {1} is not allowed: letters, digits, '.', '_', ':' and '-', \
         the first a letter or digit"
    )]
    Character(char, usize),
    /// The text is a cid, but not one that this CPI generates.
    #[error("must be '{0}-' and {TAIL} characters of 'a' to 'z' and '2' to '7'")]
    NotGenerated(&'static str),
}

fn validate(text: &str) -> Result<(), CidError> {
    if text.is_empty() || text.len() > MAX_LENGTH {
        return Err(CidError::Length(text.len()));
    }
    let allowed = |(i, c): &(usize, char)| {
        c.is_ascii_alphanumeric() || (*i > 0 && matches!(c, '.' | '_' | ':' | '-'))
    };
    match text.char_indices().find(|at| !allowed(at)) {
        Some((i, c)) => Err(CidError::Character(c, i)),
        None => Ok(()),
    }
}

/// Characters of a generated cid's tail.
const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
/// Characters in the tail.
const TAIL: usize = 15;

/// 15 characters of `a-z2-7` from the kernel's random source.
fn random_tail() -> String {
    let mut bytes = [0u8; TAIL];
    let filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    // Once the kernel's pool is ready, requests up to 256 bytes neither fail nor return less:
    // getrandom(2).
    assert_eq!(filled, Ok(bytes.len()), "getrandom");
    bytes.iter().map(|byte| char::from(ALPHABET[usize::from(byte % 32)])).collect()
}

/// A cid, which also names a directory, a lock, a QEMU object.
pub trait Cid: fmt::Display + AsRef<Path> + Sized {
    /// Prefix of generated cids, before the dash.
    const PREFIX: &'static str;
    /// The kind of its object, in names of directories and records.
    const KIND: &'static str = Self::PREFIX;
    /// A new random cid.
    fn random() -> Self;
    /// The cid in `text`.
    fn parse(text: &str) -> Result<Self, CidError>;
    /// The cid in `text`, if this CPI could have generated it.
    ///
    /// # Errors
    /// [`CidError::NotGenerated`] for another cid.
    fn parse_generated(text: &str) -> Result<Self, CidError> {
        let tail = text.strip_prefix(Self::PREFIX).and_then(|tail| tail.strip_prefix('-'));
        let is_generated = tail
            .is_some_and(|tail| tail.len() == TAIL && tail.bytes().all(|b| ALPHABET.contains(&b)));
        if is_generated { Self::parse(text) } else { Err(CidError::NotGenerated(Self::PREFIX)) }
    }
    /// The text.
    fn as_str(&self) -> &str;
    /// A new random cid with a tag of the host's name, for a CPI with several hosts.
    fn random_on_host(host: &str) -> Self {
        let random = Self::random();
        let (head, tail) = random.as_str().split_at(Self::PREFIX.len() + 1);
        Self::parse(&format!("{head}{}{}", host_tag(host), &tail[TAG..]))
            .expect("of the same characters")
    }
    /// Whether it has the tag of the host's name. Another host's cid has the same tag by chance, 1
    /// in 32768.
    fn is_from_host(&self, host: &str) -> bool {
        is_from_host(self.as_str(), host)
    }
}

/// As [`Cid::is_from_host`], for a cid of any kind.
pub fn is_from_host(cid: &str, host: &str) -> bool {
    cid.split_once('-')
        .is_some_and(|(_, tail)| tail.len() == TAIL && tail.starts_with(&host_tag(host)))
}

/// Characters of the tail that are the host's tag.
const TAG: usize = 3;

fn host_tag(host: &str) -> String {
    let digest = Sha256::digest(host.as_bytes());
    digest.iter().take(TAG).map(|byte| char::from(ALPHABET[usize::from(byte % 32)])).collect()
}

macro_rules! cid {
    ($($(#[$doc:meta])* $name:ident = $prefix:literal $(: $kind:literal)?;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl Cid for $name {
            const PREFIX: &'static str = $prefix;
            $(const KIND: &'static str = $kind;)?

            fn random() -> Self {
                Self(format!("{}-{}", $prefix, random_tail()))
            }

            fn parse(text: &str) -> Result<Self, CidError> {
                validate(text).map(|()| Self(text.to_owned()))
            }

            fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl std::str::FromStr for $name {
            type Err = CidError;
            fn from_str(text: &str) -> Result<Self, CidError> {
                Self::parse(text)
            }
        }

        impl TryFrom<String> for $name {
            type Error = CidError;
            fn try_from(text: String) -> Result<Self, CidError> {
                validate(&text).map(|()| Self(text))
            }
        }

        impl From<$name> for String {
            fn from(cid: $name) -> String {
                cid.0
            }
        }

        impl AsRef<Path> for $name {
            fn as_ref(&self) -> &Path {
                Path::new(&self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    )*};
}

cid! {
    /// A stemcell: one imported image.
    StemcellCid = "stemcell";
    /// A VM.
    VmCid = "vm";
    /// A persistent disk. A generated cid has exactly 20 characters: it is the disk's virtio-blk
    /// serial.
    DiskCid = "disk";
    /// A snapshot of a persistent disk.
    SnapshotCid = "snap";
    /// A managed network.
    NetworkCid = "net": "network";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cid_has_its_hosts_tag_and_is_otherwise_random() {
        let disk = DiskCid::random_on_host("kvm-1");
        assert!(
            disk.as_str().len() == 20 && DiskCid::parse_generated(disk.as_str()).is_ok(),
            "{disk}"
        );
        assert!(disk.is_from_host("kvm-1") && !disk.is_from_host("kvm-2"));
        assert_ne!(disk, DiskCid::random_on_host("kvm-1"));
        assert!(!is_from_host("vm-1", "kvm-1") && !is_from_host("", "kvm-1"));
    }

    #[test]
    fn a_disk_cid_fits_a_virtio_serial_exactly() {
        let cid = DiskCid::random();
        assert_eq!(cid.as_str().len(), 20);
        assert_eq!(DiskCid::parse(cid.as_str()), Ok(cid));
    }

    #[test]
    fn a_text_that_could_leave_its_directory_is_refused() {
        for text in [
            "", ".", "..", "../x", "a/b", "/etc", "a\0b", "-x", ".x", "ä", "a b", "a,b", "a'b",
            "a\nb",
        ] {
            assert!(VmCid::parse(text).is_err(), "{text:?}");
        }
        assert_eq!(VmCid::parse(&"x".repeat(300)), Err(CidError::Length(300)));
    }

    #[test]
    fn cids_of_other_cpis_parse() {
        for text in ["vm-0003", "i-0abc", "VM_1.2:3"] {
            assert!(VmCid::parse(text).is_ok(), "{text:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn whatever_parses_is_one_plain_path_component(text in ".{0,140}") {
            if let Ok(cid) = VmCid::parse(&text) {
                let parts: Vec<_> = cid.as_ref().components().collect();
                proptest::prop_assert!(matches!(parts[..], [std::path::Component::Normal(name)] if name == text.as_str()));
            }
        }
    }
}
