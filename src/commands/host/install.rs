//! `bosh-qemu-cpi host install` and `host uninstall`: another machine is made a host, or is one no longer, over the
//! operator's own `ssh`. All that is done there is `host setup`; here it is brought there and asked about.

use std::fs::File;
use std::io::{self, BufRead, IsTerminal, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::cli;
use crate::config::transport::PublicKey;
use crate::error::{Error, ErrorKind, IoContext, Result};

/// Brings the program to the machine, prints what it would do there, and has it done if that is wanted.
///
/// # Errors
/// [`ErrorKind::Host`] with what the machine says.
pub fn install(install: &cli::Install, output: &mut dyn Write) -> Result<bool> {
    let key = install.key.as_deref().map(super::authorize::key).transpose()?;
    let machine = Machine::of(&install.machine);
    let bring = |config| machine.bring("the configuration", config, "600");
    let config = install.host_config.as_deref().map(bring).transpose()?;
    let done = machine.ask("who logs in there", "id -un").and_then(|user| {
        let options = [
            ("key", key.as_ref().map(PublicKey::as_str)),
            ("user", Some(user.trim())),
            ("host-config", config.as_deref()),
        ];
        let given = options
            .into_iter()
            .filter_map(|(name, value)| Some(format!(" --{name} {}", quoted(value?))));
        set_up(&machine, &install.machine, &given.collect::<String>(), output)
    });
    let cleaned = config.map_or(Ok(()), |config| machine.remove(&config));
    done.and_then(|done| cleaned.map(|()| done))
}

/// Undoes that, in the same way.
///
/// # Errors
/// As [`install`].
pub fn uninstall(asked: &cli::Machine, output: &mut dyn Write) -> Result<bool> {
    set_up(&Machine::of(asked), asked, " --remove", output)
}

/// Has the program do `host setup` there with these options.
fn set_up(
    machine: &Machine<'_>,
    asked: &cli::Machine,
    options: &str,
    output: &mut dyn Write,
) -> Result<bool> {
    let own = std::env::current_exe().map_err(|e| Error::os("find this program", e))?;
    let program = machine.bring("the program", asked.program.as_deref().unwrap_or(&own), "700")?;
    let done = consented(machine, asked, &program, options, output);
    let cleaned = machine.remove(&program);
    done.and_then(|done| cleaned.map(|()| done))
}

fn consented(
    machine: &Machine<'_>,
    asked: &cli::Machine,
    program: &str,
    options: &str,
    output: &mut dyn Write,
) -> Result<bool> {
    // What can not even say its version there needs libraries that are not there.
    machine.ask("start the program there", &format!("{program} --version")).map_err(|error| {
        error.hint("the program must be a static one for Linux on x86_64: take the release's, with --program")
    })?;
    let is_root = machine.ask("who logs in there", "id -u")?.trim() == "0";
    let sudo = if is_root { "" } else { "sudo -n " };
    let root =
        asked.root.as_deref().map(|root| format!(" --root {}", quoted(root))).unwrap_or_default();
    let setup = format!("{sudo}{program} host setup{root}{options}");
    let plan = machine.ask("ask for the plan", &format!("{setup} --plan"))?;
    let mut print =
        |text: &str| output.write_all(text.as_bytes()).map_err(|e| Error::os("print the plan", e));
    print(&format!("on {}:\n{plan}", asked.target))?;
    if !asked.yes && !confirmed()? {
        print("nothing was changed\n")?;
        return Ok(false);
    }
    let done = machine.ask("carry out the plan", &setup)?;
    print(&format!("done:\n{done}"))?;
    Ok(true)
}

/// Whether somebody at a terminal says yes.
fn confirmed() -> Result<bool> {
    if !io::stdin().is_terminal() {
        let message = "nobody is here to be asked";
        return Err(
            Error::new(ErrorKind::BadRequest, message).hint("say --yes to do it without asking")
        );
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

impl<'a> Machine<'a> {
    fn of(asked: &'a cli::Machine) -> Self {
        Self { target: &asked.target, ssh: &asked.ssh }
    }

    /// Copies `file` there, which is `what`; its path.
    fn bring(&self, what: &str, file: &Path, mode: &str) -> Result<String> {
        let content = File::open(file).at("read", file)?;
        let script = format!(
            "f=$(mktemp /tmp/bosh-qemu-cpi.XXXXXXXX) && cat > \"$f\" && chmod {mode} \"$f\" && echo \"$f\""
        );
        let path = self
            .run(&format!("bring {what} there"), &script, Stdio::from(content))?
            .trim()
            .to_owned();
        let tail = path.strip_prefix("/tmp/bosh-qemu-cpi.").unwrap_or_default();
        if tail.is_empty() || !tail.chars().all(|c| c.is_ascii_alphanumeric()) {
            let message = format!("'{}' does not say where it put {what}", self.target);
            return Err(Error::new(ErrorKind::Host, message)
                .hint("its shell must print nothing of its own"));
        }
        Ok(path)
    }

    /// Removes what was brought.
    fn remove(&self, brought: &str) -> Result<()> {
        self.ask("clean up there", &format!("rm -f {brought}")).map(drop)
    }

    /// What `script` prints there; it does `what`.
    fn ask(&self, what: &str, script: &str) -> Result<String> {
        self.run(what, script, Stdio::null())
    }

    fn run(&self, what: &str, script: &str, input: Stdio) -> Result<String> {
        let mut words = self.ssh.split_ascii_whitespace();
        let program = words.next().unwrap_or("ssh");
        let mut command = Command::new(program);
        command.args(words).args(["--", self.target, script]).stdin(input).stderr(Stdio::piped());
        let output = command.output().map_err(|e| Error::io("start", Path::new(program), e))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        let said = match said.strip_prefix("Error: ").unwrap_or(&said) {
            "" => output.status.to_string(),
            said => said.to_owned(),
        };
        Err(Error::new(ErrorKind::Host, format!("'{}': {said}", self.target)).during(what))
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
