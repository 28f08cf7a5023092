//! `bosh-qemu-cpi host authorize`: the line of an `authorized_keys` that lets a key call this host, and do nothing else.

use std::io::Write;
use std::path::Path;

use crate::config::transport::PublicKey;
use crate::error::{Error, ErrorKind, IoContext, Result};

/// Prints the line for `key`: a public key, or the file that one is in.
///
/// # Errors
/// [`ErrorKind::BadRequest`] for what is no public key.
pub fn run(config: Option<&Path>, key: &str, output: &mut dyn Write) -> Result<bool> {
    let key = self::key(key)?;
    let program = std::env::current_exe().map_err(|e| Error::os("find this program", e))?;
    let line = line(&program, config, &key)?;
    writeln!(output, "{line}").map_err(|e| Error::os("print the line", e))?;
    Ok(true)
}

/// A public key, or the one in the file `key`.
///
/// # Errors
/// As [`run`].
pub(super) fn key(key: &str) -> Result<PublicKey> {
    PublicKey::parse(key).map_or_else(|| read(Path::new(key)), Ok)
}

fn read(path: &Path) -> Result<PublicKey> {
    let text = std::fs::read_to_string(path).at("read public key", path)?;
    let hint = "give the .pub file of the pair, never the private key";
    PublicKey::parse(&text).ok_or_else(|| {
        Error::new(ErrorKind::BadRequest, format!("'{}' is no public key", path.display()))
            .hint(hint)
    })
}

/// `restrict`: no terminal, no forwarding of anything, no file of the user's run (sshd(8)).
pub(super) fn line(program: &Path, config: Option<&Path>, key: &PublicKey) -> Result<String> {
    let mut words = vec![quoted(program)?];
    if let Some(config) = config {
        words.extend(["--config".to_owned(), quoted(config)?]);
    }
    words.extend(["host", "serve"].map(str::to_owned));
    Ok(format!("restrict,command=\"{}\" {} bosh-qemu-cpi", words.join(" "), key.as_str()))
}

/// A path that needs no quotes, of the shell's or of sshd's.
fn quoted(path: &Path) -> Result<String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+".contains(c);
    let text = path.to_str().filter(|text| text.starts_with('/') && text.chars().all(plain));
    text.map(str::to_owned).ok_or_else(|| {
        let message = format!("'{}' can not stand in authorized_keys", path.display());
        Error::new(ErrorKind::NotSupported, message)
            .hint("give the program and its configuration a plain absolute path")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_starts_one_command_and_the_line_is_one_line() {
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
