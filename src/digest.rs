//! SHA-256 digests of bytes and files.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::schema::{Expected, Property, SchemaError};

/// A SHA-256 digest. Its text is 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

/// A text is not a SHA-256 digest. The message does not quote it, because a request may contain it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected a SHA-256 digest: 64 hexadecimal digits, with or without 'sha256:' before them")]
pub struct DigestError;

impl Property for Digest {
    const EXPECTED: Expected = Expected::text("a SHA-256 digest: 64 hexadecimal digits");

    fn from_json(value: &Value) -> Result<Self, SchemaError> {
        let digest = value.as_str().and_then(|text| text.parse().ok());
        digest.ok_or_else(|| SchemaError::value(Self::EXPECTED, value))
    }
}

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        let mut hasher = Hasher::default();
        hasher.update(bytes);
        hasher.finish()
    }

    /// The digest of a file's content.
    pub fn of_file(path: &Path) -> Result<Self> {
        let mut file = File::open(path).at("open", path)?;
        let mut buffer = vec![0; 256 * 1024];
        let mut hasher = Hasher::default();
        loop {
            match file.read(&mut buffer).at("read", path)? {
                0 => return Ok(hasher.finish()),
                count => hasher.update(&buffer[..count]),
            }
        }
    }

    /// Refuses a file with another digest.
    ///
    /// # Errors
    /// [`ErrorKind::BadRequest`]. The message does not contain the file's digest: a caller may not
    /// learn digests of files that it cannot read.
    pub fn ensure_matches(self, path: &Path) -> Result<()> {
        if Self::of_file(path)? == self {
            return Ok(());
        }
        let message = format!("the SHA-256 digest of '{}' is not the given one", path.display());
        Err(Error::new(ErrorKind::BadRequest, message))
    }
}

/// Computes a [`Digest`] incrementally.
#[derive(Default)]
pub struct Hasher(Sha256);

impl Hasher {
    /// Adds the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of all added bytes.
    pub fn finish(self) -> Digest {
        Digest(self.0.finalize().into())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let digits = text.strip_prefix("sha256:").unwrap_or(text).as_bytes();
        let mut bytes = [0; 32];
        if digits.len() != 2 * bytes.len() {
            return Err(DigestError);
        }
        let value =
            |digit: u8| char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok());
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks(2)) {
            *byte = value(pair[0]).ok_or(DigestError)? << 4 | value(pair[1]).ok_or(DigestError)?;
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for Digest {
    type Error = DigestError;

    fn try_from(text: String) -> Result<Self, DigestError> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// FIPS 180-2, appendix B.1.
    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn a_files_digest_is_compared() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "abc").unwrap();
        for spelling in [ABC.to_owned(), ABC.to_uppercase(), format!("sha256:{ABC}")] {
            spelling.parse::<Digest>().unwrap().ensure_matches(file.path()).unwrap();
        }
        std::fs::write(file.path(), "abd").unwrap();
        let refused = ABC.parse::<Digest>().unwrap().ensure_matches(file.path()).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::BadRequest);
        assert!(
            !refused
                .report()
                .contains("a52d159f262b2c6ddb724a61840befc36eb30c88877a4030b65cbe86298449c9")
        );
    }

    #[test]
    fn a_digest_and_its_text_convert_both_ways() {
        assert_eq!(ABC.parse::<Digest>().unwrap().to_string(), ABC);
        for wrong in [
            "",
            "ba78",
            &ABC[1..],
            &format!("{}g", &ABC[1..]),
            &format!("sha1:{ABC}"),
            &"é".repeat(32),
        ] {
            assert_eq!(wrong.parse::<Digest>(), Err(DigestError), "{wrong}");
        }
    }
}
