//! Cloud ids: what the Director stores and hands back.
//!
//! A cid of ours is a prefix and 15 random base32 characters (75 bits), so `disk-…` has exactly 20 characters:
//! the length of a virtio-blk serial and the least the agent's id resolver takes (bosh-agent
//! `id_device_path_resolver.go`). Parsing is validation: whatever parses is safe as one path component and as a
//! QEMU id. A well-formed cid of somebody else's parses too; it simply is not there.

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Longest cid accepted. The Director's column holds 255; ours have at most 24.
const MAX_LENGTH: usize = 128;

/// Why a text is not a cid. Shows at most a few characters of it: it may be hostile, or 300 kB.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CidError {
    /// Nothing, or more than 128 characters.
    #[error("must have 1 to {MAX_LENGTH} characters, has {0}")]
    Length(usize),
    /// A character outside `[A-Za-z0-9._:-]`, or a first one that is no letter or digit.
    #[error(
        "character {0:?} at position {1} is not allowed: letters, digits, '.', '_', ':' and '-', the first a letter or digit"
    )]
    Character(char, usize),
    /// A cid, but none that we would make.
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

/// What tails of cids are made of.
const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
/// How much of it.
const TAIL: usize = 15;

/// 15 characters of `a-z2-7` from the kernel's random source.
fn random_tail() -> String {
    let mut bytes = [0u8; TAIL];
    let filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    // Up to 256 bytes the call neither fails nor stops short once the pool is up: getrandom(2).
    assert_eq!(filled, Ok(bytes.len()), "getrandom");
    bytes.iter().map(|byte| char::from(ALPHABET[usize::from(byte % 32)])).collect()
}

/// What every kind of cid can do: be a name of a directory, a lock, a QEMU object.
pub trait Cid: fmt::Display + AsRef<Path> + Sized {
    /// The word before the dash of those we make.
    const PREFIX: &'static str;
    /// The word for it in names of directories and records.
    const KIND: &'static str = Self::PREFIX;
    /// A new one, never seen before.
    fn random() -> Self;
    /// The text, if it is a cid.
    fn parse(text: &str) -> Result<Self, CidError>;
    /// The text, if it is a cid such as we make.
    ///
    /// # Errors
    /// [`CidError::NotGenerated`] for any other.
    fn parse_generated(text: &str) -> Result<Self, CidError> {
        let tail = text.strip_prefix(Self::PREFIX).and_then(|tail| tail.strip_prefix('-'));
        let is_generated = tail
            .is_some_and(|tail| tail.len() == TAIL && tail.bytes().all(|b| ALPHABET.contains(&b)));
        if is_generated { Self::parse(text) } else { Err(CidError::NotGenerated(Self::PREFIX)) }
    }
    /// The text.
    fn as_str(&self) -> &str;
    /// A new one that bears a trace of `place`, where there are several that things can be.
    fn random_on_host(place: &str) -> Self {
        let random = Self::random();
        let (head, tail) = random.as_str().split_at(Self::PREFIX.len() + 1);
        Self::parse(&format!("{head}{}{}", trace_of(place), &tail[TRACE..]))
            .expect("of the same characters")
    }
    /// Whether it bears the trace of `place`. One that was made elsewhere may do so by chance, 1 in 32768.
    fn is_from_host(&self, place: &str) -> bool {
        is_from_host(self.as_str(), place)
    }
}

/// As [`Cid::is_from_host`], for a cid of any kind.
pub fn is_from_host(cid: &str, place: &str) -> bool {
    cid.split_once('-')
        .is_some_and(|(_, tail)| tail.len() == TAIL && tail.starts_with(&trace_of(place)))
}

/// How much of a tail says where its object is.
const TRACE: usize = 3;

fn trace_of(place: &str) -> String {
    let digest = Sha256::digest(place.as_bytes());
    digest.iter().take(TRACE).map(|byte| char::from(ALPHABET[usize::from(byte % 32)])).collect()
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
    /// A persistent disk. Those we make have exactly 20 characters: the cid is the disk's virtio-blk serial.
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
    fn a_cid_bears_a_trace_of_where_it_was_made_and_is_one_like_any_other() {
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
    fn nothing_that_could_leave_its_directory_parses() {
        for text in [
            "", ".", "..", "../x", "a/b", "/etc", "a\0b", "-x", ".x", "ä", "a b", "a,b", "a'b",
            "a\nb",
        ] {
            assert!(VmCid::parse(text).is_err(), "{text:?}");
        }
        assert_eq!(VmCid::parse(&"x".repeat(300)), Err(CidError::Length(300)));
    }

    #[test]
    fn strangers_parse() {
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
