//! `bosh-qemu-cpi host install` and `host uninstall`: sets another machine up as a host, or undoes
//! that, over the operator's own `ssh`.
//!
//! `host setup` on that machine does the work. This file copies the program there, shows the
//! operator the plan and asks for consent.

use std::fs::File;
use std::io::{self, BufRead, IsTerminal, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::cli;
use crate::config::transport::PublicKey;
use crate::error::{Error, ErrorKind, IoContext, Result};

/// Copies the program to the machine, prints the plan of `host setup` there, and runs it if the
/// operator agrees. Returns false if the operator declines.
///
/// # Errors
/// [`ErrorKind::Host`] with the machine's error output.
pub fn install(install: &cli::Install, output: &mut dyn Write) -> Result<bool> {
    let key = install.key.as_deref().map(super::authorize::key).transpose()?;
    let machine = Machine::of(&install.machine);
    let copy = |config| machine.copy("the configuration", config, "600");
    let config = install.host_config.as_deref().map(copy).transpose()?;
    let done = machine.run("log in with ssh", "id -un").and_then(|user| {
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

/// Removes the program and its units from the machine, asking as [`install`] does.
///
/// # Errors
/// As [`install`].
pub fn uninstall(arguments: &cli::Machine, output: &mut dyn Write) -> Result<bool> {
    set_up(&Machine::of(arguments), arguments, " --remove", output)
}

/// Copies the program to the machine, runs its `host setup` with `options` after consent, and
/// removes the copy.
fn set_up(
    machine: &Machine<'_>,
    arguments: &cli::Machine,
    options: &str,
    output: &mut dyn Write,
) -> Result<bool> {
    let own = std::env::current_exe().map_err(|e| Error::os("find this program", e))?;
    let source = arguments.program.as_deref().unwrap_or(&own);
    let program = machine.copy("the program", source, "700")?;
    let done = run_with_consent(machine, arguments, &program, options, output);
    let cleaned = machine.remove(&program);
    done.and_then(|done| cleaned.map(|()| done))
}

fn run_with_consent(
    machine: &Machine<'_>,
    arguments: &cli::Machine,
    program: &str,
    options: &str,
    output: &mut dyn Write,
) -> Result<bool> {
    // A dynamic program cannot even print its version if the machine lacks its libraries.
    machine.run("start the program", &format!("{program} --version")).map_err(|error| {
        error.hint(
            "the program must be a static one for Linux on x86_64: pass the BOSH release's with \
             --program",
        )
    })?;
    let is_root = machine.run("log in with ssh", "id -u")?.trim() == "0";
    let sudo = if is_root { "" } else { "sudo -n " };
    let root = arguments.root.as_deref().map(|root| format!(" --root {}", quoted(root)));
    let root = root.unwrap_or_default();
    let setup = format!("{sudo}{program} host setup{root}{options}");
    let plan = machine.run("plan the setup", &format!("{setup} --plan"))?;
    let mut print =
        |text: &str| output.write_all(text.as_bytes()).map_err(|e| Error::os("print the plan", e));
    print(&format!("on {}:\n{plan}", arguments.target))?;
    if !arguments.yes && !ask_operator()? {
        print("nothing was changed\n")?;
        return Ok(false);
    }
    let done = machine.run("carry out the plan", &setup)?;
    print(&format!("done:\n{done}"))?;
    Ok(true)
}

/// Asks the operator at the terminal. Returns true for a yes.
///
/// # Errors
/// [`ErrorKind::BadRequest`] if standard input is not a terminal.
fn ask_operator() -> Result<bool> {
    if !io::stdin().is_terminal() {
        let message = "cannot ask for confirmation: standard input is not a terminal";
        return Err(Error::new(ErrorKind::BadRequest, message)
            .hint("pass --yes to continue without asking"));
    }
    let mut terminal = io::stderr();
    let _ = write!(terminal, "Continue? [y/N] ");
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer).map_err(|e| Error::os("read the answer", e))?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

/// A machine that the operator can log in to with ssh.
struct Machine<'a> {
    target: &'a str,
    ssh: &'a str,
}

impl<'a> Machine<'a> {
    fn of(arguments: &'a cli::Machine) -> Self {
        Self { target: &arguments.target, ssh: &arguments.ssh }
    }

    /// Copies `file` to a new file in the machine's /tmp with the octal `mode`. `what` names the
    /// file in errors. Returns the new path.
    fn copy(&self, what: &str, file: &Path, mode: &str) -> Result<String> {
        let content = File::open(file).at("read", file)?;
        let script = format!(
            "f=$(mktemp /tmp/bosh-qemu-cpi.XXXXXXXX) && cat > \"$f\" && chmod {mode} \"$f\" && \
             echo \"$f\""
        );
        let path = self
            .run_with_input(&format!("copy {what}"), &script, Stdio::from(content))?
            .trim()
            .to_owned();
        let tail = path.strip_prefix("/tmp/bosh-qemu-cpi.").unwrap_or_default();
        if tail.is_empty() || !tail.chars().all(|c| c.is_ascii_alphanumeric()) {
            let message = format!("'{}' did not print the path of the copied file", self.target);
            return Err(Error::new(ErrorKind::Host, message)
                .hint("remove what prints text at login on it, such as an 'echo' in ~/.bashrc"));
        }
        Ok(path)
    }

    /// Removes a copied file from the machine.
    fn remove(&self, path: &str) -> Result<()> {
        self.run("clean up", &format!("rm -f {path}")).map(drop)
    }

    /// Runs the shell script on the machine and returns its standard output. `what` names the
    /// step in errors.
    fn run(&self, what: &str, script: &str) -> Result<String> {
        self.run_with_input(what, script, Stdio::null())
    }

    fn run_with_input(&self, what: &str, script: &str, input: Stdio) -> Result<String> {
        let mut words = self.ssh.split_ascii_whitespace();
        let program = words.next().unwrap_or("ssh");
        let mut command = Command::new(program);
        command.args(words).args(["--", self.target, script]).stdin(input).stderr(Stdio::piped());
        let output = command.output().map_err(|e| Error::io("start", Path::new(program), e))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        let reason = match stderr.strip_prefix("Error: ").unwrap_or(&stderr) {
            "" => output.status.to_string(),
            reason => reason.to_owned(),
        };
        Err(Error::new(ErrorKind::Host, format!("'{}': {reason}", self.target)).during(what))
    }
}

/// Quotes `word` for the machine's POSIX shell.
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
