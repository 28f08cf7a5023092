//! Damaged files other than records. `audit` reports each once, calls that need the file name it,
//! and other calls work.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use bosh_qemu_cpi::cid::{DiskCid, VmCid};
use serde_json::{Value, json};

use crate::faults::damaged_records::Fixture;
use crate::support::host::{Host, text};
use crate::support::vm_list::list_when_all_answer;

/// Kinds of damage: what replaces a file or a link.
const WAYS: [&str; 5] =
    ["garbage", "empty", "a directory", "a link to nothing", "a link to itself"];

fn replace_by(path: &Path, how: &str) {
    match how {
        "garbage" => fs::write(path, "half a fi\u{0}").unwrap(),
        "empty" => fs::write(path, "").unwrap(),
        "a directory" => fs::create_dir(path).unwrap(),
        "a link to nothing" => symlink("/nowhere/at/all", path).unwrap(),
        "a link to itself" => symlink(path.file_name().unwrap(), path).unwrap(),
        _ => unreachable!(),
    }
}

/// A file that is replaced by something else until it is repaired.
struct Damaged {
    path: PathBuf,
    aside: PathBuf,
}

impl Damaged {
    fn new(path: &Path, aside: PathBuf, how: &str) -> Self {
        fs::rename(path, &aside).unwrap();
        replace_by(path, how);
        Self { path: path.to_owned(), aside }
    }

    fn repair(self) {
        if self.path.symlink_metadata().is_ok_and(|meta| meta.is_dir()) {
            fs::remove_dir(&self.path).unwrap();
        }
        fs::rename(&self.aside, &self.path).unwrap();
    }
}

/// A call that needs the file, and the kinds of damage with which it still works.
type Need = (&'static str, Value, &'static [&'static str]);

/// A file that the test damages.
struct Target {
    path: PathBuf,
    /// Kind and subject of the finding that `audit` reports, and the kinds of damage without a
    /// finding.
    finding: Option<(&'static str, String, &'static [&'static str])>,
    needs: Vec<Need>,
}

const NEVER: &[&str] = &[];
/// The damages that leave a regular file, for files whose content does not matter.
const ANY_FILE: &[&str] = &["garbage", "empty"];

struct Targets {
    /// A VM whose guest has powered itself off.
    off: VmCid,
    /// A running VM.
    logged: VmCid,
    encrypted: DiskCid,
    locked: DiskCid,
    noted: DiskCid,
    targets: Vec<Target>,
}

impl Targets {
    fn new(fixture: &Fixture) -> Self {
        let host = &fixture.host;
        let (off, logged) = (host.vm(&fixture.stemcell), host.vm(&fixture.stemcell));
        host.wait_for_console(&off, "BOOTSECTOR-OK", 1);
        host.power_off(&off);
        let encrypted =
            text(&host.ok("create_disk", &json!([8, {"encrypted": true}, null]))).parse().unwrap();
        let (locked, noted) = (host.disk(), host.disk());
        assert!(host.command(&["network", "apply", "lab", "--json"]).0);
        let mut this = Self { off, logged, encrypted, locked, noted, targets: Vec::new() };
        this.targets = this.table(fixture);
        this
    }

    fn table(&self, fixture: &Fixture) -> Vec<Target> {
        let (host, vm) = (&fixture.host, &fixture.vm);
        let (state, exit, events) =
            (host.path("state"), host.paths(&self.off).exit(), host.paths(&self.logged).events());
        let path = |path: &Path| path.to_str().unwrap().to_owned();
        let address = host.record(vm).nics[0].rules.as_ref().unwrap().addresses[0].ip();
        let claim = format!("ip,bosh-nat0,{address},32");
        let mut wants_address = host.vm_arguments(&fixture.stemcell);
        wants_address[3]["net"]["ip"] = json!(address);
        let target = |path: PathBuf, finding, needs| Target { path, finding, needs };
        let (pin, key) = (state.join("networks/bosh-lab0.json"), state.join("disk.key"));
        let uid = state.join("uids").join(host.record(vm).uid.to_string());
        let reported = |kind, what: String| Some((kind, what, NEVER));
        vec![
            target(exit, reported("corrupt", self.off.to_string()), vec![]),
            target(events, None, vec![("reboot_vm", json!([self.logged]), ANY_FILE)]),
            target(pin.clone(), reported("corrupt", path(&pin)), vec![]),
            target(
                state.join("claims").join(&claim),
                reported("unreserved", format!("reservation {claim}")),
                vec![("create_vm", wants_address, NEVER)],
            ),
            target(uid.clone(), reported("unreserved", path(&uid)), vec![]),
            target(
                key.clone(),
                reported("corrupt", path(&key)),
                vec![
                    ("create_disk", json!([8, {"encrypted": true}, null]), NEVER),
                    ("attach_disk", json!([vm, self.encrypted]), NEVER),
                ],
            ),
            target(
                state.join("locks").join(format!("disk.{}", self.locked)),
                Some(("corrupt", format!("lock disk.{}", self.locked), ANY_FILE)),
                vec![("resize_disk", json!([self.locked, 8]), ANY_FILE)],
            ),
            target(host.store().run_dir().join("io-uring.json"), None, vec![]),
        ]
    }

    /// The findings that `audit` must report.
    fn expected(&self, how: &str) -> BTreeSet<(String, String)> {
        let findings = self.targets.iter().filter_map(|target| target.finding.as_ref());
        let reported = findings.filter(|(_, _, not)| !not.contains(&how));
        let reported = reported.map(|(kind, what, _)| ((*kind).to_owned(), what.clone()));
        reported.chain([("unfinished".to_owned(), self.noted.to_string())]).collect()
    }
}

fn findings(host: &Host) -> BTreeSet<(String, String)> {
    let (_, found) = host.command(&["audit", "--json"]);
    let found = found["findings"].as_array().unwrap();
    let reported: BTreeSet<_> =
        found.iter().map(|finding| (text(&finding["kind"]), text(&finding["what"]))).collect();
    assert_eq!(reported.len(), found.len(), "a finding is reported twice: {found:#?}");
    reported
}

/// All files are damaged at once, so that effects of one damage on the others show.
#[test]
fn audit_with_damaged_files_reports_each_once() {
    let lab = json!({"profile": "isolated", "bridge": "bosh-lab0", "subnet": "10.7.0.0/24"});
    let networks = json!({"default": {}, "lab": lab});
    let Some(fixture) = Fixture::with(json!({"networks": networks})) else { return };
    let targets = Targets::new(&fixture);
    let host = &fixture.host;
    assert_eq!(findings(host), BTreeSet::new());
    for how in WAYS {
        let damaged = targets.targets.iter().enumerate().map(|(number, target)| {
            Damaged::new(&target.path, host.path(&format!("aside-{number}")), how)
        });
        let damaged: Vec<_> = damaged.collect();
        let note = host.store().pending_dir().join(&targets.noted);
        replace_by(&note, how);
        assert_eq!(findings(host), targets.expected(how), "{how}");
        for (method, arguments, works) in targets.targets.iter().flat_map(|target| &target.needs) {
            let answer = host.call(method, arguments);
            assert_eq!(answer.outcome.is_ok(), works.contains(&how), "{how}: {method}: {answer:?}");
        }
        fixture.assert_others_work();
        damaged.into_iter().for_each(Damaged::repair);
        if note.is_dir() {
            fs::remove_dir(&note).unwrap();
        }
        assert!(!note.exists(), "{how}: the next create removes the note");
        host.ok("reboot_vm", &json!([targets.logged]));
    }
    assert_eq!(findings(host), BTreeSet::new());
    assert!(host.command(&["network", "remove", "lab", "--json"]).0);
}

/// `schema` names the version of the state directory, the link `state` ties the run directory to
/// it. Calls that change something name the damaged one, `audit` reports it alone, and reading
/// calls work.
#[test]
fn call_with_damaged_schema_or_run_dir_link_is_refused() {
    let Some(host) = Host::new() else { return };
    let (vm, disk) = (host.booted_vm(), host.disk());
    let (schema, link) = (host.path("state/schema"), host.store().run_dir().join("state"));
    for (path, what) in [(&schema, schema.to_str().unwrap()), (&link, "run_dir")] {
        for how in WAYS {
            let damaged = Damaged::new(path, host.path("aside"), how);
            for words in [["gc"].as_slice(), &["host", "start"]] {
                let refused = host.namespace().run(|| host.cpi().args(words).output().unwrap());
                let printed = String::from_utf8_lossy(&refused.stderr).into_owned();
                let other = ["'/nowhere/at/all'", "state_dir 'state'"]
                    .iter()
                    .any(|other| printed.contains(other));
                let named = printed.contains(path.to_str().unwrap()) || other;
                assert!(
                    !refused.status.success() && named && printed.contains("Hint: "),
                    "{how}: {words:?}: {printed}"
                );
            }
            let answer = host.call("create_disk", &json!([8, {}, null]));
            assert!(answer.outcome.is_err(), "{how}: {answer:?}");
            assert_eq!(
                findings(&host),
                BTreeSet::from([("corrupt".to_owned(), what.to_owned())]),
                "{how}"
            );
            assert_eq!(host.ok("has_vm", &json!([vm])), true);
            assert_eq!(host.ok("has_disk", &json!([disk])), true);
            assert_eq!(list_when_all_answer(&host)[0]["state"], "running");
            damaged.repair();
        }
    }
    assert_eq!(findings(&host), BTreeSet::new());
}
