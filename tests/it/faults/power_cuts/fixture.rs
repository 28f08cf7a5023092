//! The host of the power-cut tests, and the checks after each cut.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fs, panic};

use bosh_qemu_cpi::cid::{Cid, DiskCid, NetworkCid, VmCid};
use bosh_qemu_cpi::store::record::{NetworkRecord, StemcellRecord};
use bosh_qemu_cpi::store::{DiskRecord, Phase, Record, SnapshotRecord, VmRecord};
use serde_json::{Value, json};

use crate::support::answer::Answer;
use crate::support::host::{Host, request, vm_cid};
use crate::support::images::assert_pattern;
use crate::support::power_cut::Step;
use crate::support::power_cut::filesystem_model::{
    Cut, Entry, FilesystemModel, Loss, Tree, cuts, restore,
};
use crate::support::power_cut::recorder::record;

/// A host with a stemcell, a stopped VM with an attached disk, and a free disk.
pub struct Fixture {
    pub host: Host,
    pub stemcell: String,
    pub vm: VmCid,
    pub attached: DiskCid,
    pub free: DiskCid,
}

impl Fixture {
    pub fn new() -> Option<Self> {
        Self::on(Host::new()?)
    }

    /// The same with all images in a pool.
    pub fn in_a_pool() -> Option<Self> {
        let host = Host::new()?;
        fs::create_dir(host.path("pool")).unwrap();
        let pool = json!({"path": host.path("pool")});
        host.reconfigure(|config| {
            config["pools"] = json!({ "fast": pool });
            for defaults in ["vm_defaults", "disk_defaults"] {
                config[defaults] = json!({"pool": "fast"});
            }
            config["stemcell_pool"] = json!("fast");
        });
        Self::on(host)
    }

    fn on(host: Host) -> Option<Self> {
        let stemcell = host.stemcell();
        let vm = host.vm(&stemcell);
        host.wait_for_console(&vm, "BOOTSECTOR-OK", 1);
        let (attached, free) = (host.disk(), host.disk());
        host.ok("attach_disk", &json!([vm, attached]));
        host.power_off(&vm);
        Some(Self { host, stemcell, vm, attached, free })
    }

    /// Records one run of `method`, then cuts the power at each of its steps with each kind of
    /// loss. If the call had answered, `acknowledged` checks the result before anything else
    /// changes the host.
    pub fn cut_at_each_step(&self, method: &str, arguments: &Value, acknowledged: impl Fn(&Value)) {
        let host = &self.host;
        let root = host.path("");
        let root = root.as_path();
        host.lose_power();
        let (before, baseline) = (FilesystemModel::of(root), host.leaks());
        let (output, steps) = host
            .namespace()
            .run(|| record(host.cpi(), request(method, arguments).as_bytes(), root));
        host.track_vms(&String::from_utf8_lossy(&output.stdout));
        let result = Answer::of(&output).result().clone();
        let (cuts, after) = (cuts(&before, &steps, root), FilesystemModel::of(root).now());
        match method {
            "create_vm" => drop(host.ok("delete_vm", &json!([vm_cid(&result)]))),
            "create_network" => drop(host.ok("delete_network", &json!([result[0]]))),
            _ => {}
        }
        for cut in &cuts {
            restore(&cut.tree, root);
            host.lose_power();
            let at = format!(
                "{method}: {:?} lost after {} of {} steps",
                cut.loss,
                cut.done,
                steps.len()
            );
            let at = cut
                .done
                .checked_sub(1)
                .map_or(at.clone(), |last| format!("{at}, the last {:.200?}", steps[last]));
            let checked = panic::catch_unwind(panic::AssertUnwindSafe(|| {
                self.assert_intact(cut, &before.now(), &after, method, arguments);
                if cut.answered {
                    acknowledged(&result);
                }
                self.assert_recovers(cut, method, arguments, &baseline);
            }));
            checked.unwrap_or_else(|_| panic!("{at}"));
        }
        restore(&before.now(), root);
        print(method, &steps, cuts.len());
    }

    /// Asserts that other objects are unchanged and that every object in phase `ready` has all its
    /// images.
    fn assert_intact(
        &self,
        cut: &Cut,
        before: &Tree,
        after: &Tree,
        method: &str,
        arguments: &Value,
    ) {
        let touched = |path: &Path| {
            arguments.to_string().contains(path.iter().nth(2).unwrap().to_str().unwrap())
        };
        let objects = |path: &&Path| {
            path.starts_with("state")
                && path.iter().count() == 4
                && !path.starts_with("state/locks")
        };
        for path in
            before.keys().map(PathBuf::as_path).filter(objects).filter(|path| !touched(path))
        {
            assert_eq!(cut.tree.get(path), before.get(path), "{} changed", path.display());
        }
        if changes_an_image(method) {
            assert_pattern(&self.host, &self.free);
        }
        let disks = ready::<DiskRecord>(&self.host).into_iter();
        let disks = disks.filter(|disk| !changes_an_image(method) || arguments[0] != **disk);
        let stemcells = ready::<StemcellRecord>(&self.host)
            .into_iter()
            .chain(ready::<SnapshotRecord>(&self.host));
        for cid in stemcells.chain(disks).chain(ready::<VmRecord>(&self.host)) {
            let images = |tree: &Tree| -> Vec<_> {
                let its = tree
                    .iter()
                    .filter(|(path, _)| path.iter().any(|part| part == &*cid) && is_image(path));
                its.map(|(path, entry)| (path.clone(), content(entry))).collect()
            };
            let here = images(&cut.tree);
            assert!(
                [before, after].iter().any(|tree| images(tree) == here),
                "{cid} is in phase ready without all its images"
            );
        }
    }

    /// Asserts that the same call succeeds, that `gc` cleans up, and that nothing is left but what
    /// later calls made.
    fn assert_recovers(&self, cut: &Cut, method: &str, arguments: &Value, baseline: &[String]) {
        let host = &self.host;
        let (_, found) = host.command(&["audit", "--json"]);
        for finding in found["findings"].as_array().unwrap() {
            // A kept network has lost its bridge, too.
            let explained =
                ["unfinished", "orphan", "unsettled", "down", "unacknowledged", "network"];
            assert!(explained.contains(&finding["kind"].as_str().unwrap()), "{finding}");
        }
        if method == "create_vm" && cut.loss != Loss::Everything {
            // A boot takes long, and any create removes what an unfinished create left.
            host.disk();
        } else {
            if method == "create_network" {
                self.delete_acknowledged_networks();
            }
            let again = host.call(method, arguments);
            let is_gone = method == "delete_network"
                && again.outcome.as_ref().is_err_and(|e| e.kind == "NetworkNotFound");
            assert!(is_gone || again.outcome.is_ok(), "{again:?}");
        }
        if changes_an_image(method) {
            assert_pattern(host, &self.free);
        }
        let (_, found) = host.command(&["gc", "--json"]);
        let found = found["findings"].as_array().unwrap();
        let open: Vec<_> = found
            .iter()
            .filter(|f| {
                f["cure"] != "repaired" && f["kind"] != "down" && f["kind"] != "unacknowledged"
            })
            .collect();
        assert!(open.is_empty(), "{open:#?}");
        // Objects that no caller knows, or only this test.
        let store = host.store();
        self.delete_other_vms();
        for disk in store
            .list::<DiskRecord>()
            .unwrap()
            .iter()
            .filter(|disk| ![&self.attached, &self.free].contains(disk))
        {
            host.ok("delete_disk", &json!([disk]));
        }
        for snapshot in store.list::<SnapshotRecord>().unwrap() {
            host.ok("delete_snapshot", &json!([snapshot]));
        }
        for network in store.list::<NetworkRecord>().unwrap() {
            host.ok("delete_network", &json!([network]));
        }
        for stemcell in store
            .list::<StemcellRecord>()
            .unwrap()
            .iter()
            .filter(|cid| cid.as_str() != self.stemcell)
        {
            host.ok("delete_stemcell", &json!([stemcell]));
        }
        host.lose_power();
        let mut left = host.leaks();
        // A reservation without its VM has no effect.
        left.retain(|what| method != "delete_vm" || !what.starts_with("claims/"));
        let replaced = |what: &str| {
            method == "update_disk" && what.starts_with(&format!("disks/{}/disk", self.free))
        };
        left.retain(|what| !replaced(what));
        let vms_own = |what: &str| {
            method == "delete_vm" && (what.starts_with("uids/") || what.starts_with("claims/"))
        };
        let deleted = |what: &str| {
            let cid = || arguments[0].as_str().unwrap();
            let bridge =
                || format!("networks/bosh-{}.json", &cid().rsplit('-').next().unwrap()[..10]);
            method.starts_with("delete")
                && (what.contains(cid()) || method == "delete_network" && what == bridge())
        };
        let baseline =
            baseline.iter().filter(|what| !vms_own(what) && !deleted(what) && !replaced(what));
        assert_eq!(left, baseline.cloned().collect::<Vec<_>>());
    }

    fn delete_other_vms(&self) {
        let store = self.host.store();
        let vms = store.list::<VmRecord>().unwrap().into_iter().filter(|vm| *vm != self.vm);
        for vm in vms.filter(|vm| {
            store.read::<VmRecord>(vm).unwrap().is_some_and(|vm| vm.phase == Phase::Ready)
        }) {
            self.host.ok("delete_vm", &json!([vm]));
        }
    }

    /// Deletes the acknowledged networks. A create_network may replace only an unacknowledged one.
    fn delete_acknowledged_networks(&self) {
        let store = self.host.store();
        for network in ready::<NetworkRecord>(&self.host) {
            let cid: NetworkCid = network.parse().unwrap();
            if !store.record_dir::<NetworkRecord>(&cid).join("untold").exists() {
                self.host.ok("delete_network", &json!([network]));
            }
        }
    }

    pub fn record<R: Record>(&self, cid: &R::Cid) -> R {
        self.host.store().read(cid).unwrap().expect("a record")
    }
}

/// Cids of all objects in phase `ready`.
fn ready<R: Record>(host: &Host) -> Vec<String> {
    let records = host.store().list_readable::<R>().unwrap().into_iter();
    records
        .filter(|record| record.phase() == Phase::Ready)
        .map(|record| record.cid().to_string())
        .collect()
}

/// Whether the method changes the image or the size of the free disk, which then has a pattern.
fn changes_an_image(method: &str) -> bool {
    ["resize_disk", "update_disk"].contains(&method)
}

fn is_image(path: &Path) -> bool {
    path.extension()
        .is_some_and(|extension| ["raw", "qcow2", "img"].iter().any(|image| extension == *image))
}

fn content(entry: &Entry) -> Option<Arc<Vec<u8>>> {
    match entry {
        Entry::File(_, content) => Some(content.clone()),
        _ => None,
    }
}

#[allow(clippy::print_stdout)]
fn print(method: &str, steps: &[Step], cuts: usize) {
    let synced =
        steps.iter().filter(|step| matches!(step, Step::Sync(..) | Step::SyncDir(_))).count();
    println!(
        "{method}: {} steps, {synced} of them fsync; a power cut can leave {cuts} different things",
        steps.len()
    );
}
