//! `bosh-qemu-cpi host install` and `host uninstall`: another machine is made a host, or is one no longer, over the
//! operator's own `ssh`. All that is done there is `host setup`; here it is brought there and asked about.

use std::fs::File;
use std::io::{self, BufRead, IsTerminal, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::cli::Install;
use crate::config::transport::PublicKey;
use crate::error::{Error, ErrorKind, IoContext, Result};

/// Brings the program to the machine, prints what it would do there, and has it done if that is wanted.
///
/// # Errors
/// [`ErrorKind::Host`] with what the machine says.
pub fn run(install: &Install, remove: bool, output: &mut dyn Write) -> Result<bool> {
    let machine = Machine { target: &install.target, ssh: &install.ssh };
    let own = std::env::current_exe().map_err(|e| Error::os("find this program", e))?;
    let program = machine.bring(install.program.as_deref().unwrap_or(&own), "700")?;
    let config = install.host_config.as_deref().map(|config| machine.bring(config, "600")).transpose()?;
    let done = work(&machine, install, remove, &program, config.as_deref(), output);
    let brought = std::iter::once(&program).chain(&config).map(String::as_str);
    machine.run(&format!("rm -f {}", brought.collect::<Vec<_>>().join(" ")), Stdio::null())?;
    done
}

fn work(
    machine: &Machine<'_>,
    install: &Install,
    remove: bool,
    program: &str,
    config: Option<&str>,
    output: &mut dyn Write,
) -> Result<bool> {
    // What can not even say its version there needs libraries that are not there.
    machine.run(&format!("{program} --version"), Stdio::null()).map_err(|error| {
        error.hint("the program must be a static one for Linux on x86_64: take the release's, with --program")
    })?;
    let is_root = machine.run("id -u", Stdio::null())?.trim() == "0";
    let sudo = if is_root { "" } else { "sudo -n " };
    let mut words = vec![format!("{sudo}{program} host setup")];
    let mut option = |name: &str, value: Option<&str>| {
        words.extend(value.map(|value| format!("--{name} {}", quoted(value))));
    };
    option("root", install.root.as_deref());
    if !remove {
        let key = install.key.as_deref().map(super::authorize::key).transpose()?;
        option("key", key.as_ref().map(PublicKey::as_str));
        let user = machine.run("id -un", Stdio::null())?;
        option("user", Some(user.trim()));
        option("host-config", config);
    }
    if remove {
        words.push("--remove".to_owned());
    }
    let setup = words.join(" ");
    let plan = machine.run(&format!("{setup} --plan"), Stdio::null())?;
    let mut print = |text: &str| output.write_all(text.as_bytes()).map_err(|e| Error::os("print the plan", e));
    print(&format!("on {}:\n{plan}", install.target))?;
    if !install.yes && !confirmed()? {
        print("nothing was changed\n")?;
        return Ok(false);
    }
    let done = machine.run(&setup, Stdio::null())?;
    print(&format!("done:\n{done}"))?;
    Ok(true)
}

/// Whether somebody at a terminal says yes.
fn confirmed() -> Result<bool> {
    if !io::stdin().is_terminal() {
        let message = "nobody is here to be asked";
        return Err(Error::new(ErrorKind::BadRequest, message).hint("say --yes to do it without asking"));
    }
    let mut terminal = io::stderr();
    let _ = write!(terminal, "Go on? [y/N] ");
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer).map_err(|e| Error::os("read the answer", e))?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

/// A machine that the operator can log in to.
struct Machine<'a> {
    target: &'a str,
    ssh: &'a str,
}

impl Machine<'_> {
    /// Copies `file` there; its path.
    fn bring(&self, file: &Path, mode: &str) -> Result<String> {
        let content = File::open(file).at("read", file)?;
        let script =
            format!("f=$(mktemp /tmp/bosh-qemu-cpi.XXXXXXXX) && cat > \"$f\" && chmod {mode} \"$f\" && echo \"$f\"");
        let path = self.run(&script, Stdio::from(content))?.trim().to_owned();
        let tail = path.strip_prefix("/tmp/bosh-qemu-cpi.").unwrap_or_default();
        if tail.is_empty() || !tail.chars().all(|c| c.is_ascii_alphanumeric()) {
            let message = format!("'{}' does not say where it put a file", self.target);
            return Err(Error::new(ErrorKind::Host, message).hint("its shell must print nothing of its own"));
        }
        Ok(path)
    }

    /// What `script` prints there.
    fn run(&self, script: &str, input: Stdio) -> Result<String> {
        let mut words = self.ssh.split_ascii_whitespace();
        let mut command = Command::new(words.next().unwrap_or("ssh"));
        command.args(words).args(["--", self.target, script]);
        let output = command.stdin(input).stderr(Stdio::piped()).output().map_err(|e| Error::os("start ssh", e))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        let said = said.strip_prefix("Error: ").unwrap_or(&said);
        Err(Error::new(ErrorKind::Host, format!("'{}': {said}", self.target)))
    }
}

/// A word for the shell there.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_stays_one_whatever_is_in_it() {
        assert_eq!(quoted("a b$(c)"), "'a b$(c)'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }
}
