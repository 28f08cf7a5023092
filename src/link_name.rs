//! Names of network links.

use std::fmt;

use serde::{Deserialize, Serialize};

/// IFNAMSIZ without the NUL (`linux/if.h`).
const MAX_LENGTH: usize = 15;

/// Name of a bridge or tap: 1 to 15 characters of `[A-Za-z0-9._-]`, the first a letter or digit.
///
/// The kernel allows more. A name that parses here is also one plain path component below
/// `/proc/sys`, and needs no quotes in a shell or in nft's syntax.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LinkName(String);

/// The error for a text that is no [`LinkName`]. It does not repeat the text, which may be hostile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "a link name has 1 to {MAX_LENGTH} letters, digits, '.', '_' and '-', \
     the first a letter or digit"
)]
pub struct LinkNameError;

impl LinkName {
    /// Parses a link name.
    ///
    /// # Errors
    /// [`LinkNameError`].
    pub fn parse(text: &str) -> Result<Self, LinkNameError> {
        let plain = |byte: &u8| byte.is_ascii_alphanumeric();
        let is_valid = text.len() <= MAX_LENGTH
            && text.as_bytes().first().is_some_and(plain)
            && text.bytes().all(|byte| plain(&byte) || matches!(byte, b'.' | b'_' | b'-'));
        if is_valid { Ok(Self(text.to_owned())) } else { Err(LinkNameError) }
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for LinkName {
    type Error = LinkNameError;
    fn try_from(text: String) -> Result<Self, LinkNameError> {
        Self::parse(&text)
    }
}

impl From<LinkName> for String {
    fn from(name: LinkName) -> String {
        name.0
    }
}

impl fmt::Display for LinkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_break_the_kernel_or_a_path_are_refused() {
        for text in
            ["", ".", "..", "-a", "a/b", "a b", "a:1", "a%d", "a\0", "ä", "a\n", "sixteen-letters-"]
        {
            assert_eq!(LinkName::parse(text), Err(LinkNameError), "{text:?}");
        }
        for text in ["br0", "eth0.100", "fifteen-letters", "bosh_nat-0"] {
            assert_eq!(LinkName::parse(text).unwrap().as_str(), text);
        }
    }
}
