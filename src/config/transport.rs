//! How calls reach the host that runs the VMs, where that is another machine.

use std::path::PathBuf;

use serde::Serialize;
use serde_json::Value;

use crate::schema::{Problem, Property, Redacted, SchemaError, Whole};
use crate::{choice, document};

document! {
    /// How calls reach the host that runs the VMs.
    pub struct Transport {
        /// `local`: this is the host. `unix`: through a socket of this machine, behind which `bosh-qemu-cpi host serve` runs.
        /// `ssh`: with OpenSSH's `ssh`, to another machine.
        kind: TransportKind = TransportKind::Local;
        /// `unix`: the socket.
        socket: PathBuf = "/run/bosh-qemu-cpi.sock".into();
        /// `ssh`: the host's name or address.
        host: Option<HostName>;
        /// `ssh`: the port its sshd listens on.
        port: Whole<1, 65535> = Whole::of(22);
        /// `ssh`: who to be there.
        user: UserName = UserName("root".to_owned());
        /// `ssh`: the private key, as OpenSSH writes it, without a passphrase.
        private_key: Redacted<Option<String>>;
        /// `ssh`: the host's public key, as in its `/etc/ssh/ssh_host_ed25519_key.pub`. No other is accepted.
        host_key: Option<PublicKey>;
        /// `ssh`: calls that share one connection, at most its sshd's `MaxSessions`; more calls open another.
        sessions: Whole<1, 512> = Whole::of(10);
    }
}

choice! {
    /// Ways to a host.
    pub enum TransportKind ("\"local\", \"unix\" or \"ssh\"") {
        /// None: the calls are carried out here.
        Local = "local",
        /// A socket of this machine.
        Unix = "unix",
        /// OpenSSH.
        Ssh = "ssh",
    }
}

document! {
    /// One host of several.
    pub struct HostEntry {
        /// What it is called in messages. Cids begin with a trace of it, so give no host the name of another.
        name: HostName;
        /// How calls reach it.
        transport: Transport;
        /// Whether it gets no new VMs but those whose disks are on it.
        draining: bool = false;
    }
}

document! {
    /// What the host leaves to callers that come through `host serve`.
    pub struct RemoteCallers {
        /// Directories whose files they may name as images of light stemcells.
        image_dirs: Vec<PathBuf>;
    }
}

impl Transport {
    /// What the types alone do not say.
    ///
    /// # Errors
    /// Names the key.
    pub fn validated(&self) -> Result<(), SchemaError> {
        let missing = |key: &str, expected| SchemaError {
            path: key.to_owned(),
            problem: Problem::Missing(expected),
        };
        if self.kind == TransportKind::Ssh {
            self.host.as_ref().ok_or_else(|| missing("host", HostName::EXPECTED))?;
            self.private_key.0.as_ref().ok_or_else(|| missing("private_key", "a private key"))?;
            self.host_key.as_ref().ok_or_else(|| missing("host_key", PublicKey::EXPECTED))?;
        }
        Ok(())
    }
}

/// A word that a program may be given as an argument: it can not be taken for an option.
macro_rules! word {
    ($(#[$doc:meta])* $name:ident, $max:literal, $others:pat, $expected:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        pub struct $name(String);

        impl $name {
            /// The text, if it is one.
            pub fn parse(text: &str) -> Option<Self> {
                let plain = |byte: u8| byte.is_ascii_alphanumeric();
                let good = text.bytes().next().is_some_and(plain)
                    && text.len() <= $max
                    && text.bytes().all(|byte| plain(byte) || matches!(byte, $others));
                good.then(|| Self(text.to_owned()))
            }

            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl Property for $name {
            const EXPECTED: &'static str = $expected;

            fn from_json(value: &Value) -> Result<Self, SchemaError> {
                value.as_str().and_then(Self::parse).ok_or_else(|| SchemaError::value(Self::EXPECTED, value))
            }
        }
    };
}

word! {
    /// Name or address of a machine.
    HostName, 253, b'.' | b'-' | b'_' | b':', "a host's name or address"
}

word! {
    /// Name of a user.
    UserName, 32, b'.' | b'-' | b'_', "a user's name"
}

/// A public key in OpenSSH's form, without options and comment: `ssh-ed25519 AAAA…`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PublicKey(String);

impl PublicKey {
    /// The key in `line`, whose comment is left out.
    pub fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        let (kind, key) = (words.next()?, words.next()?);
        let known = ["ssh-", "ecdsa-", "sk-"].iter().any(|prefix| kind.starts_with(prefix));
        let plain = |word: &str, others: &str| {
            word.chars().all(|c| c.is_ascii_alphanumeric() || others.contains(c))
        };
        let good = known && plain(kind, "-@.") && plain(key, "+/=") && key.starts_with("AAAA");
        good.then(|| Self(format!("{kind} {key}")))
    }

    /// Kind and key.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Property for PublicKey {
    const EXPECTED: &'static str = "a public key such as \"ssh-ed25519 AAAA…\"";

    fn from_json(value: &Value) -> Result<Self, SchemaError> {
        value
            .as_str()
            .and_then(Self::parse)
            .ok_or_else(|| SchemaError::value(Self::EXPECTED, value))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_could_be_an_option_or_two_words_is_no_host_and_no_user() {
        for good in ["kvm-1", "10.0.0.5", "fd00::5", "kvm1.example.org"] {
            assert!(HostName::parse(good).is_some(), "{good}");
        }
        for bad in ["", "-oProxyCommand=x", "a b", "a\nb", "a;b", "ö", &"a".repeat(254)] {
            assert!(HostName::parse(bad).is_none() && UserName::parse(bad).is_none(), "{bad}");
        }
        assert!(UserName::parse("bosh_cpi").is_some() && UserName::parse("a@b").is_none());
    }

    #[test]
    fn a_public_key_loses_its_comment_and_is_one_line() {
        let key = PublicKey::parse("ssh-ed25519 AAAAC3Nza+/= root@kvm\n").unwrap();
        assert_eq!(key.as_str(), "ssh-ed25519 AAAAC3Nza+/=");
        for bad in [
            "",
            "AAAA",
            "ssh-ed25519",
            "command=\"x\" ssh-ed25519 AAAA",
            "ssh-rsa BBBB",
            "ssh-rsa AAAA\u{7f}",
        ] {
            assert!(PublicKey::parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn ssh_says_what_it_lacks() {
        let lack =
            |value| Transport::from_json(&value).unwrap().validated().unwrap_err().to_string();
        assert_eq!(
            lack(json!({"kind": "ssh"})),
            "host: missing; expected a host's name or address"
        );
        assert_eq!(
            lack(json!({"kind": "ssh", "host": "h", "private_key": "k"})),
            "host_key: missing; expected a public key such as \"ssh-ed25519 AAAA…\""
        );
        assert!(Transport::from_json(&json!({"kind": "unix"})).unwrap().validated().is_ok());
    }
}
