//! Another machine is made a host, and one no longer.

use std::fs;
use std::path::PathBuf;
use std::process::Output;

use super::Pair;

/// A machine whose files are below a directory of the test's.
struct Machine {
    pair: Pair,
    root: PathBuf,
}

impl Machine {
    fn new() -> Option<Self> {
        let pair = Pair::new()?;
        // The operator's own key may do anything.
        pair.sshd.trust();
        let root = pair.host.path("machine");
        fs::create_dir(&root).unwrap();
        fs::create_dir(root.join("root")).unwrap();
        Some(Self { pair, root })
    }

    fn command(&self, words: &[&str]) -> Output {
        let sshd = &self.pair.sshd;
        let known = self.pair.office.path("known");
        fs::write(&known, format!("{} {}", sshd.address(), sshd.read("host.pub"))).unwrap();
        let ssh = format!(
            "ssh -F none -o BatchMode=yes -o IdentitiesOnly=yes -i {} -o UserKnownHostsFile={}",
            sshd.key().display(),
            known.display()
        );
        let mut command = self.pair.office.cpi();
        command.args(["host", words[0], &format!("root@{}", sshd.address()), "--ssh", &ssh, "--root"]);
        command.arg(&self.root).args(&words[1..]);
        self.pair.office.namespace().run(|| command.stdin(std::process::Stdio::null()).output().unwrap())
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
        let mut names: Vec<_> =
            found.iter().map(|path| path.strip_prefix(&self.root).unwrap().display().to_string()).collect();
        names.sort();
        names
    }
}

const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ director@office";
const NEXT_KEY: &str = "ssh-ed25519 AAAANEXTNzaC1lZDI1NTE5AAAAIJ director@office";

#[test]
fn a_machine_becomes_a_host_and_is_one_no_longer() {
    let Some(machine) = Machine::new() else { return };
    let other = "ssh-rsa AAAAother operator\n";
    fs::create_dir(machine.root.join("root/.ssh")).unwrap();
    fs::write(machine.root.join("root/.ssh/authorized_keys"), other).unwrap();
    let config = machine.pair.office.path("host.json");
    fs::write(&config, "{\"restart\": \"never\"}").unwrap();
    let config = config.display().to_string();
    // Nobody is there to be asked: the plan is printed, and nothing is done.
    let before = machine.all();
    assert!(machine.refused(&["install", "--key", KEY]).contains("--yes"));
    assert_eq!(machine.all(), before);

    let said = machine.ok(&["install", "--key", KEY, "--host-config", &config, "--yes"]);
    assert!(said.contains("+ /usr/local/bin/bosh-qemu-cpi\n") && said.contains("+ the key in /root/.ssh"), "{said}");
    let installed = fs::read(machine.root.join("usr/local/bin/bosh-qemu-cpi")).unwrap();
    assert!(installed == fs::read(env!("CARGO_BIN_EXE_bosh-qemu-cpi")).unwrap());
    assert_eq!(machine.read("etc/bosh-qemu-cpi/cpi.json"), "{\"restart\": \"never\"}");
    assert!(machine.read("etc/systemd/system/bosh-qemu-cpi.socket").contains("Accept=yes"));
    let keys = machine.read("root/.ssh/authorized_keys");
    let line = "restrict,command=\"/usr/local/bin/bosh-qemu-cpi host serve\" ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ";
    assert!(keys.starts_with(other) && keys.contains(line), "{keys}");
    // Nothing of the way there is left.
    assert!(!fs::read_dir("/tmp").unwrap().flatten().any(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        name.starts_with("bosh-qemu-cpi.") && entry.path().is_file() && said.contains(&name)
    }));

    let said = machine.ok(&["install", "--key", KEY, "--yes"]);
    assert!(said.contains("= /usr/local/bin/bosh-qemu-cpi\n") && said.contains("= the key in"), "{said}");

    // Another key takes its place.
    let said = machine.ok(&["install", "--key", NEXT_KEY, "--yes"]);
    assert!(said.contains("~ the key in /root/.ssh/authorized_keys, in place of …"), "{said}");
    let keys = machine.read("root/.ssh/authorized_keys");
    assert!(keys.starts_with(other) && !keys.contains(line) && keys.contains("AAAANEXT"), "{keys}");
    // What is installed without one keeps it.
    let said = machine.ok(&["install", "--yes"]);
    assert!(said.contains("= the key in /root/.ssh/authorized_keys"), "{said}");
    machine.ok(&["uninstall", "--yes"]);
    assert_eq!(machine.all(), ["root/.ssh/authorized_keys"]);
    assert_eq!(machine.read("root/.ssh/authorized_keys"), other);
    assert!(machine.refused(&["uninstall", "--yes"]).contains("nothing is installed here"));
}

#[test]
fn what_is_not_ours_is_neither_replaced_nor_removed() {
    let Some(machine) = Machine::new() else { return };
    let unit = machine.root.join("etc/systemd/system/bosh-qemu-cpi.service");
    fs::create_dir_all(unit.parent().unwrap()).unwrap();
    fs::write(&unit, "somebody's").unwrap();
    let refusal = machine.refused(&["install", "--key", KEY, "--yes"]);
    assert!(refusal.contains("/etc/systemd/system/bosh-qemu-cpi.service") && refusal.contains("not ours"), "{refusal}");
    assert_eq!(machine.all(), ["etc/systemd/system/bosh-qemu-cpi.service"]);
    fs::remove_file(&unit).unwrap();
    machine.ok(&["install", "--key", KEY, "--yes"]);
    // The operator has changed it since.
    fs::write(&unit, "changed").unwrap();
    assert!(machine.refused(&["install", "--yes"]).contains("not ours"));
    let said = machine.ok(&["uninstall", "--yes"]);
    assert!(said.contains("! /etc/systemd/system/bosh-qemu-cpi.service was changed since, and stays"), "{said}");
    assert_eq!(machine.all(), ["etc/systemd/system/bosh-qemu-cpi.service", "root/.ssh/authorized_keys"]);
    // The key has other rights there.
    fs::write(machine.root.join("root/.ssh/authorized_keys"), KEY).unwrap();
    fs::remove_file(&unit).unwrap();
    assert!(machine.refused(&["install", "--key", KEY, "--yes"]).contains("the key in /root/.ssh/authorized_keys"));
}

#[test]
fn a_program_that_does_not_run_there_is_not_installed() {
    let Some(machine) = Machine::new() else { return };
    let program = machine.pair.office.path("program");
    fs::write(&program, "#!/nowhere/interpreter\n").unwrap();
    let refusal = machine.refused(&["install", "--program", &program.display().to_string(), "--yes"]);
    assert!(refusal.contains("must be a static one"), "{refusal}");
    assert_eq!(machine.all(), Vec::<String>::new());
}
