//! The configuration's keys about other hosts: how calls reach them, and what remote callers may do
//! here.

use std::path::PathBuf;

use serde::Serialize;
use serde_json::Value;

use crate::schema::{Expected, Problem, Property, Redacted, SchemaError, Whole};
use crate::{choice, document};

document! {
    /// The way of calls to the host that runs the VMs.
    pub struct Transport {
        /// `local`: this machine is the host. `unix`: through a socket of this machine, which
        /// `bosh-qemu-cpi host serve` serves. `ssh`: to another machine, with OpenSSH's `ssh`.
        kind: TransportKind = TransportKind::Local;
        /// `unix`: path of the socket.
        socket: PathBuf = "/run/bosh-qemu-cpi.sock".into();
        /// `ssh`: name or address of the host. Required.
        host: Option<HostName>;
        /// `ssh`: port of the host's sshd.
        port: Whole<1, 65535> = Whole::of(22);
        /// `ssh`: the user on the host.
        user: UserName = UserName("root".to_owned());
        /// `ssh`: a private key in OpenSSH's format, without a passphrase. Required.
        private_key: Redacted<Option<String>>;
        /// `ssh`: the host's public key, as in its `/etc/ssh/ssh_host_ed25519_key.pub`. A host with
        /// another key is refused. Required.
        host_key: Option<PublicKey>;
        /// `ssh`: most calls that share one connection, at most the `MaxSessions` of the host's
        /// sshd. Further calls open another connection.
        sessions: Whole<1, 512> = Whole::of(10);
    }
}

choice! {
    /// Kind of a transport.
    pub enum TransportKind ("\"local\", \"unix\" or \"ssh\"") {
        /// No transport: this machine is the host.
        Local = "local",
        /// A socket of this machine.
        Unix = "unix",
        /// OpenSSH.
        Ssh = "ssh",
    }
}

document! {
    /// One of several hosts.
    pub struct HostEntry {
        /// Name of the host in messages. The host's new cids contain a tag of the name, so never
        /// give the name to another host.
        name: HostName;
        /// The way of calls to the host.
        transport: Transport;
        /// Whether the host gets no new VMs, except those whose disks are on it.
        draining: bool = false;
    }
}

document! {
    /// Permissions of callers that connect through `bosh-qemu-cpi host serve`.
    pub struct RemoteCallers {
        /// Directories with files that remote callers may use as images of light stemcells.
        image_dirs: Vec<PathBuf>;
    }
}

impl Transport {
    /// Refuses an `ssh` transport without its required keys.
    ///
    /// # Errors
    /// Names the missing key.
    pub fn ensure_valid(&self) -> Result<(), SchemaError> {
        let missing = |key: &str, expected: Expected| SchemaError {
            path: key.to_owned(),
            problem: Problem::Missing(expected),
        };
        if self.kind == TransportKind::Ssh {
            self.host.as_ref().ok_or_else(|| missing("host", HostName::EXPECTED))?;
            self.private_key
                .0
                .as_ref()
                .ok_or_else(|| missing("private_key", Expected::secret("a private key")))?;
            self.host_key.as_ref().ok_or_else(|| missing("host_key", PublicKey::EXPECTED))?;
        }
        Ok(())
    }
}

/// Declares a name that is safe as an argument of a program: it does not begin like an option.
macro_rules! word {
    ($(#[$doc:meta])* $name:ident, $max:literal, $others:pat, $expected:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        pub struct $name(String);

        impl $name {
            /// The name, if `text` is valid.
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
            const EXPECTED: Expected = Expected::text($expected);

            fn from_json(value: &Value) -> Result<Self, SchemaError> {
                let name = value.as_str().and_then(Self::parse);
                name.ok_or_else(|| SchemaError::value(Self::EXPECTED, value))
            }
        }
    };
}

word! {
    /// Name or address of a host.
    HostName, 253, b'.' | b'-' | b'_' | b':', "a host's name or address"
}

word! {
    /// Name of a user.
    UserName, 32, b'.' | b'-' | b'_', "a user's name"
}

/// A public key in OpenSSH's format, without options and comment: `ssh-ed25519 AAAA…`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PublicKey(String);

impl PublicKey {
    /// The key in `line`, without its comment.
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

    /// Type and key.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Property for PublicKey {
    // Not public: a private key may stand here by mistake.
    const EXPECTED: Expected = Expected::secret("a public key such as \"ssh-ed25519 AAAA…\"");

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
    fn names_that_look_like_options_or_two_words_are_refused() {
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
    fn ssh_without_a_required_key_is_refused() {
        let lack =
            |value| Transport::from_json(&value).unwrap().ensure_valid().unwrap_err().to_string();
        assert_eq!(
            lack(json!({"kind": "ssh"})),
            "host: missing; expected a host's name or address"
        );
        assert_eq!(
            lack(json!({"kind": "ssh", "host": "h", "private_key": "k"})),
            "host_key: missing; expected a public key such as \"ssh-ed25519 AAAA…\""
        );
        assert!(Transport::from_json(&json!({"kind": "unix"})).unwrap().ensure_valid().is_ok());
    }
}
