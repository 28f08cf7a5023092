//! `host install` and `host uninstall` on another machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use nix::unistd::{Uid, User};

use super::Pair;

/// A machine whose files are below a directory of the test.
struct Machine {
    pair: Pair,
    root: PathBuf,
}

impl Machine {
    fn new() -> Option<Self> {
        let pair = Pair::new()?;
        // The operator's own key has no forced command.
        pair.sshd.trust();
        let root = pair.host.path("machine");
        fs::create_dir(&root).unwrap();
        fs::create_dir_all(root.join(below(&keys())).parent().unwrap().parent().unwrap()).unwrap();
        Some(Self { pair, root })
    }

    fn command(&self, words: &[&str]) -> Output {
        let sshd = &self.pair.sshd;
        let known = self.pair.director.path("known");
        fs::write(&known, format!("{} {}", sshd.address(), sshd.read("host.pub"))).unwrap();
        let ssh = format!(
            "ssh -F none -o BatchMode=yes -o IdentitiesOnly=yes -i {} -o UserKnownHostsFile={}",
            sshd.key().display(),
            known.display()
        );
        let mut command = Command::new(env!("CARGO_BIN_EXE_bosh-qemu-cpi"));
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command.args([
            "host",
            words[0],
            &format!("root@{}", sshd.address()),
            "--ssh",
            &ssh,
            "--root",
        ]);
        command.arg(&self.root).args(&words[1..]);
        self.pair
            .director
            .namespace()
            .run(|| command.stdin(std::process::Stdio::null()).output().unwrap())
    }

    fn ok(&self, words: &[&str]) -> String {
        let output = self.command(words);
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn refused(&self, words: &[&str]) -> String {
        let output = self.command(words);
        assert!(!output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.root.join(path)).unwrap()
    }

    fn all(&self) -> Vec<String> {
        fn walk(dir: &std::path::Path, found: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(dir).unwrap().flatten() {
                let path = entry.path();
                if path.is_dir() { walk(&path, found) } else { found.push(path) }
            }
        }
        let mut found = Vec::new();
        walk(&self.root, &mut found);
        let mut names: Vec<_> = found
            .iter()
            .map(|path| path.strip_prefix(&self.root).unwrap().display().to_string())
            .collect();
        names.sort();
        names
    }
}

/// The file in which sshd looks for root's keys.
fn keys() -> PathBuf {
    User::from_uid(Uid::from_raw(0)).unwrap().expect("root").dir.join(".ssh/authorized_keys")
}

/// A path relative to the machine's directory.
fn below(path: &Path) -> String {
    path.strip_prefix("/").unwrap().display().to_string()
}

const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ director@director";
const NEXT_KEY: &str = "ssh-ed25519 AAAANEXTNzaC1lZDI1NTE5AAAAIJ director@director";

#[test]
fn install_then_uninstall_restores_the_machine() {
    let Some(machine) = Machine::new() else { return };
    let other = "ssh-rsa AAAAother operator\n";
    let (keys, keys_path) = (below(&keys()), keys().display().to_string());
    fs::create_dir(machine.root.join(&keys).parent().unwrap()).unwrap();
    fs::write(machine.root.join(&keys), other).unwrap();
    let config = machine.pair.director.path("host.json");
    // A configuration that no other test uses.
    let host_config =
        format!("{{\"restart\": \"never\", \"deadlines\": {{\"info\": {}}}}}", std::process::id());
    fs::write(&config, &host_config).unwrap();
    let config = config.display().to_string();
    // Without a terminal for the question, the plan is printed and nothing is changed.
    let before = machine.all();
    assert!(machine.refused(&["install", "--key", KEY]).contains("--yes"));
    assert_eq!(machine.all(), before);

    let said = machine.ok(&["install", "--key", KEY, "--host-config", &config, "--yes"]);
    assert!(
        said.contains("+ /usr/local/bin/bosh-qemu-cpi\n")
            && said.contains(&format!("+ the key in {keys_path}")),
        "{said}"
    );
    let installed = fs::read(machine.root.join("usr/local/bin/bosh-qemu-cpi")).unwrap();
    assert!(installed == fs::read(env!("CARGO_BIN_EXE_bosh-qemu-cpi")).unwrap());
    assert_eq!(machine.read("etc/bosh-qemu-cpi/cpi.json"), host_config);
    assert!(machine.read("etc/systemd/system/bosh-qemu-cpi.socket").contains("Accept=yes"));
    let lines = machine.read(&keys);
    let line = "restrict,command=\"/usr/local/bin/bosh-qemu-cpi host serve\" ssh-ed25519 \
                AAAAC3NzaC1lZDI1NTE5AAAAIJ";
    assert!(lines.starts_with(other) && lines.contains(line), "{lines}");
    // The temporary files of the transfer are removed.
    let brought = fs::read_dir("/tmp").unwrap().flatten().map(|entry| entry.path());
    let mut brought =
        brought.filter(|path| path.to_string_lossy().starts_with("/tmp/bosh-qemu-cpi."));
    assert!(
        !brought.any(|path| fs::read(path).is_ok_and(|content| content == host_config.as_bytes()))
    );

    let said = machine.ok(&["install", "--key", KEY, "--yes"]);
    assert!(
        said.contains("= /usr/local/bin/bosh-qemu-cpi\n") && said.contains("= the key in"),
        "{said}"
    );

    // A new key replaces the old one.
    let said = machine.ok(&["install", "--key", NEXT_KEY, "--yes"]);
    assert!(said.contains(&format!("~ the key in {keys_path}, in place of …")), "{said}");
    let lines = machine.read(&keys);
    assert!(
        lines.starts_with(other) && !lines.contains(line) && lines.contains("AAAANEXT"),
        "{lines}"
    );
    // An installation without a key keeps the old one.
    let said = machine.ok(&["install", "--yes"]);
    assert!(said.contains(&format!("= the key in {keys_path}")), "{said}");
    machine.ok(&["uninstall", "--yes"]);
    assert_eq!(machine.all(), [keys.as_str()]);
    assert_eq!(machine.read(&keys), other);
    assert!(machine.refused(&["uninstall", "--yes"]).contains("nothing is installed here"));
}

#[test]
fn install_over_foreign_file_is_refused() {
    let Some(machine) = Machine::new() else { return };
    let unit = machine.root.join("etc/systemd/system/bosh-qemu-cpi.service");
    fs::create_dir_all(unit.parent().unwrap()).unwrap();
    fs::write(&unit, "another program's").unwrap();
    let refusal = machine.refused(&["install", "--key", KEY, "--yes"]);
    assert!(
        refusal.contains("/etc/systemd/system/bosh-qemu-cpi.service")
            && refusal.contains("not installed by this program"),
        "{refusal}"
    );
    assert_eq!(machine.all(), ["etc/systemd/system/bosh-qemu-cpi.service"]);
    fs::remove_file(&unit).unwrap();
    machine.ok(&["install", "--key", KEY, "--yes"]);
    // The operator has changed the file since.
    fs::write(&unit, "changed").unwrap();
    assert!(machine.refused(&["install", "--yes"]).contains("not installed by this program"));
    let said = machine.ok(&["uninstall", "--yes"]);
    assert!(
        said.contains("! /etc/systemd/system/bosh-qemu-cpi.service was modified, so it stays"),
        "{said}"
    );
    let keys = keys();
    assert_eq!(
        machine.all(),
        ["etc/systemd/system/bosh-qemu-cpi.service".to_owned(), below(&keys)]
    );
    // The same key is there without the forced command.
    fs::write(machine.root.join(below(&keys)), KEY).unwrap();
    fs::remove_file(&unit).unwrap();
    let refusal = machine.refused(&["install", "--key", KEY, "--yes"]);
    assert!(refusal.contains(&format!("the key in {}", keys.display())), "{refusal}");
}

#[test]
fn install_program_that_does_not_run_is_refused() {
    let Some(machine) = Machine::new() else { return };
    let program = machine.pair.director.path("program");
    fs::write(&program, "#!/nowhere/interpreter\n").unwrap();
    let refusal =
        machine.refused(&["install", "--program", &program.display().to_string(), "--yes"]);
    assert!(refusal.contains("must be a static one"), "{refusal}");
    assert_eq!(machine.all(), Vec::<String>::new());
}

#[test]
fn install_with_transport_in_host_config_is_refused() {
    let Some(machine) = Machine::new() else { return };
    let config = machine.pair.director.path("host.json").display().to_string();
    fs::write(&config, r#"{"transport": {"kind": "unix"}}"#).unwrap();
    let refusal = machine.refused(&["install", "--host-config", &config, "--yes"]);
    assert!(
        refusal.contains("plan the setup") && refusal.contains("sends calls to other hosts"),
        "{refusal}"
    );
    // The refusal names the option that the operator means.
    assert!(machine.refused(&["install", "--config", &config, "--yes"]).contains("--host-config"));
    assert_eq!(machine.all(), Vec::<String>::new());
}

#[test]
fn install_over_failing_ssh_names_the_step() {
    let command = |ssh: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bosh-qemu-cpi"));
        let output = command
            .args(["host", "install", "root@nowhere", "--yes", "--ssh", ssh])
            .output()
            .unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    assert_eq!(command("false"), "Error: log in with ssh: 'root@nowhere': exit status: 1\n");
    assert!(command("/nowhere/ssh -v").contains("start '/nowhere/ssh'"));
}
