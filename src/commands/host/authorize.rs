//! `bosh-qemu-cpi host authorize`: prints the `authorized_keys` line that lets a key call this host
//! and restricts the key to that.

use std::io::Write;
use std::path::Path;

use crate::config::transport::PublicKey;
use crate::error::{Error, ErrorKind, IoContext, Result};

/// Prints the line for `key`, a public key or the path of a file that holds one.
///
/// # Errors
/// [`ErrorKind::BadRequest`] if the file holds no public key, or there is no such file. Only the
/// path of an existing file is repeated: other text may be a private key.
pub fn run(config: Option<&Path>, key: &str, output: &mut dyn Write) -> Result<bool> {
    let key = self::key(key)?;
    let program = std::env::current_exe().map_err(|e| Error::os("find this program", e))?;
    let line = line(&program, config, &key)?;
    writeln!(output, "{line}").map_err(|e| Error::os("print the line", e))?;
    Ok(true)
}

/// Parses `key` as a public key, or else reads the public key from the file of that path.
///
/// # Errors
/// As [`run`].
pub(super) fn key(key: &str) -> Result<PublicKey> {
    PublicKey::parse(key).map_or_else(|| read(Path::new(key)), Ok)
}

fn read(path: &Path) -> Result<PublicKey> {
    let hint = "pass the .pub file of the key pair, never the private key";
    if !path.is_file() {
        let message = "the argument is neither an SSH public key nor the path of a file";
        return Err(Error::new(ErrorKind::BadRequest, message).hint(hint));
    }
    let text = std::fs::read_to_string(path).at("read public key", path)?;
    PublicKey::parse(&text).ok_or_else(|| {
        Error::new(ErrorKind::BadRequest, format!("'{}' is not an SSH public key", path.display()))
            .hint(hint)
    })
}

/// The line for `key`. Its option `restrict` forbids a terminal, every kind of forwarding and the
/// user's `~/.ssh/rc` (sshd(8)); its `command` is the only program the key can start.
///
/// # Errors
/// [`ErrorKind::NotSupported`] for a path that needs quotes.
pub(super) fn line(program: &Path, config: Option<&Path>, key: &PublicKey) -> Result<String> {
    let mut words = vec![unquoted(program)?];
    if let Some(config) = config {
        words.extend(["--config".to_owned(), unquoted(config)?]);
    }
    words.extend(["host", "serve"].map(str::to_owned));
    Ok(format!("restrict,command=\"{}\" {} bosh-qemu-cpi", words.join(" "), key.as_str()))
}

/// Returns the path unchanged if neither the shell nor sshd needs quotes around it.
fn unquoted(path: &Path) -> Result<String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+".contains(c);
    let text = path.to_str().filter(|text| text.starts_with('/') && text.chars().all(plain));
    text.map(str::to_owned).ok_or_else(|| {
        let message = format!("path '{}' cannot be used in authorized_keys", path.display());
        Error::new(ErrorKind::NotSupported, message).hint(
            "move the program or its configuration to an absolute path of letters, digits and \
                 '.', '_', '-', '+'",
        )
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn a_private_key_as_text_is_not_repeated() {
        let body = "b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQ";
        for key in [
            format!("-----BEGIN OPENSSH PRIVATE KEY-----\n{body}\n-----END OPENSSH"),
            body.to_owned(),
            format!("-----BEGIN RSA PRIVATE KEY----- {body}/x+="),
        ] {
            let words = ["bosh-qemu-cpi", "host", "authorize", &key];
            assert!(Cli::try_parse_from(words).is_ok(), "clap would repeat it");
            let error = self::key(&key).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::BadRequest);
            let said = error.report();
            assert!(!said.contains("b3Blbn") && !said.contains("BEGIN"), "{said}");
        }
        // The file of a private key is named, its content is not.
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), body).unwrap();
        let error = self::key(file.path().to_str().unwrap()).unwrap_err().report();
        assert!(error.contains("is not an SSH public key") && !error.contains(body), "{error}");
    }

    #[test]
    fn the_key_starts_one_command_and_the_path_cannot_add_another() {
        let key = PublicKey::parse("ssh-ed25519 AAAAC3 me@here\n").unwrap();
        let program = Path::new("/usr/local/bin/bosh-qemu-cpi");
        assert_eq!(
            line(program, None, &key).unwrap(),
            "restrict,command=\"/usr/local/bin/bosh-qemu-cpi host serve\" ssh-ed25519 AAAAC3 bosh-qemu-cpi"
        );
        let config = Path::new("/etc/bosh-qemu-cpi/other.json");
        assert!(
            line(program, Some(config), &key)
                .unwrap()
                .contains(" --config /etc/bosh-qemu-cpi/other.json host")
        );
        for bad in ["/a b", "/a\"b", "relative", "/a\nb", "/a$(b)"] {
            assert!(line(Path::new(bad), None, &key).is_err(), "{bad}");
        }
    }
}
