//! The power is cut in the middle of a call, or just after its answer, and takes what was not made durable: nothing that
//! was answered for is lost, nothing half made is taken for whole, and the rest is cleaned up.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bosh_qemu_cpi::cid::{Cid, DiskCid, NetworkCid, VmCid};
use bosh_qemu_cpi::host::uids;
use bosh_qemu_cpi::image::virtual_size;
use bosh_qemu_cpi::store::record::{AttachmentPhase, NetworkRecord, StemcellRecord};
use bosh_qemu_cpi::store::{DiskRecord, Phase, Record, SnapshotRecord, VmRecord};
use serde_json::{Value, json};

use crate::disk_metadata::metadata;
use crate::support::answer::Answer;
use crate::support::host::{GUEST, Host, request, text, vm_cid};
use crate::support::images::{assert_pattern, assert_pattern_in, image, write_pattern};
use crate::support::power::Step;
use crate::support::power::disk::{Cut, Disk, Entry, Loss, Tree, cuts, restore};
use crate::support::power::recorder::record;

/// A stemcell, a VM that is off and has a disk, and one disk more.
struct Lab {
    host: Host,
    stemcell: String,
    vm: VmCid,
    attached: DiskCid,
    free: DiskCid,
}

impl Lab {
    fn new() -> Option<Self> {
        Self::on(Host::new()?)
    }

    /// With everything in a pool.
    fn in_a_pool() -> Option<Self> {
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
        host.sees(&vm, "BOOTSECTOR-OK", 1);
        let (attached, free) = (host.disk(), host.disk());
        host.ok("attach_disk", &json!([vm, attached]));
        host.power_off(&vm);
        Some(Self { host, stemcell, vm, attached, free })
    }

    /// Has `method` do its work once, and then cuts the power at each of its steps, with each loss. `acknowledged` looks
    /// at what is left once the call has answered, before anything else does.
    fn walk(&self, method: &str, arguments: &Value, acknowledged: impl Fn(&Value)) {
        let host = &self.host;
        let root = host.path("");
        let root = root.as_path();
        host.lose_power();
        let (before, quiet) = (Disk::of(root), host.left());
        let (output, steps) = host
            .namespace()
            .run(|| record(host.cpi(), request(method, arguments).as_bytes(), root));
        host.note(&String::from_utf8_lossy(&output.stdout));
        let result = Answer::of(&output).result().clone();
        let (cuts, after) = (cuts(&before, &steps, root), Disk::of(root).now());
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
            let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                self.assert_whole(cut, &before.now(), &after, method, arguments);
                if cut.answered {
                    acknowledged(&result);
                }
                self.settle(cut, method, arguments, &quiet);
            }));
            checked.unwrap_or_else(|_| panic!("{at}"));
        }
        restore(&before.now(), root);
        print(method, &steps, cuts.len());
    }

    /// Nothing else is touched, and whatever is ready has all of its files.
    fn assert_whole(
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
            assert_eq!(cut.tree.get(path), before.get(path), "{} is as it was", path.display());
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
                "{cid} is ready and not whole"
            );
        }
    }

    /// The same call again succeeds; then what was cut short is cleaned up, and but for what new calls made nothing has
    /// changed.
    fn settle(&self, cut: &Cut, method: &str, arguments: &Value, quiet: &[String]) {
        let host = &self.host;
        let (_, found) = host.command(&["audit", "--json"]);
        for finding in found["findings"].as_array().unwrap() {
            // A network that stays has lost its bridge, as any other.
            let explained = ["unfinished", "orphan", "unsettled", "down", "untold", "network"];
            assert!(explained.contains(&finding["kind"].as_str().unwrap()), "{finding}");
        }
        if method == "create_vm" && cut.loss != Loss::Everything {
            // Booting takes long, and any create removes what another left.
            host.disk();
        } else {
            if method == "create_network" {
                self.delete_told_networks();
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
            .filter(|f| f["cure"] != "mended" && f["kind"] != "down" && f["kind"] != "untold")
            .collect();
        assert!(open.is_empty(), "{open:#?}");
        // What nobody was told of, or only this test.
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
        let mut left = host.left();
        // A claim means nothing without its VM.
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
        let quiet = quiet.iter().filter(|what| !vms_own(what) && !deleted(what) && !replaced(what));
        assert_eq!(left, quiet.cloned().collect::<Vec<_>>());
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

    /// Only who was not told of one may ask for its range again.
    fn delete_told_networks(&self) {
        let store = self.host.store();
        for network in ready::<NetworkRecord>(&self.host) {
            let cid: NetworkCid = network.parse().unwrap();
            if !store.record_dir::<NetworkRecord>(&cid).join("untold").exists() {
                self.host.ok("delete_network", &json!([network]));
            }
        }
    }

    fn record<R: Record>(&self, cid: &R::Cid) -> R {
        self.host.store().read(cid).unwrap().expect("a record")
    }
}

/// The cids of all that is ready.
fn ready<R: Record>(host: &Host) -> Vec<String> {
    let records = host.store().list_readable::<R>().unwrap().into_iter();
    records
        .filter(|record| record.phase() == Phase::Ready)
        .map(|record| record.cid().to_string())
        .collect()
}

/// Whether the method gives the free disk, which has a pattern, another image or another size.
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

#[test]
fn the_first_call() {
    let Some(host) = Host::new() else { return };
    let (root, before) = (host.path(""), Disk::of(&host.path("")));
    let command =
        || record(host.cpi(), request("create_disk", &json!([8, {}, null])).as_bytes(), &root);
    let (output, steps) = host.namespace().run(command);
    let disk: DiskCid = text(Answer::of(&output).result()).parse().unwrap();
    for cut in cuts(&before, &steps, &root) {
        restore(&cut.tree, &root);
        host.lose_power();
        if cut.answered {
            assert_eq!(host.ok("has_disk", &json!([disk])), true, "{:?} lost", cut.loss);
        }
        host.disk();
    }
    host.clear();
    host.command(&["gc", "--json"]);
}

#[test]
fn create_disk() {
    let Some(lab) = Lab::new() else { return };
    lab.walk("create_disk", &json!([8, {}, null]), |made| {
        assert_eq!(lab.record::<DiskRecord>(&text(made).parse().unwrap()).phase, Phase::Ready);
    });
}

#[test]
fn delete_disk() {
    let Some(lab) = Lab::new() else { return };
    lab.walk("delete_disk", &json!([lab.free]), |_| {
        assert_eq!(lab.host.ok("has_disk", &json!([lab.free])), false);
    });
}

#[test]
fn attach_disk() {
    let Some(lab) = Lab::new() else { return };
    lab.walk("attach_disk", &json!([lab.vm, lab.free]), |_| {
        let vm = lab.record::<VmRecord>(&lab.vm);
        assert_eq!(vm.attachment(&lab.free).map(|a| a.phase), Some(AttachmentPhase::Attached));
        assert_eq!(lab.record::<DiskRecord>(&lab.free).vm.as_ref(), Some(&lab.vm));
    });
}

#[test]
fn detach_disk() {
    let Some(lab) = Lab::new() else { return };
    lab.walk("detach_disk", &json!([lab.vm, lab.attached]), |_| {
        assert_eq!(lab.record::<VmRecord>(&lab.vm).disks, []);
        assert_eq!(lab.record::<DiskRecord>(&lab.attached).vm, None);
    });
}

#[test]
fn resize_disk() {
    let Some(lab) = Lab::new() else { return };
    write_pattern(&lab.host, &lab.free);
    lab.walk("resize_disk", &json!([lab.free, 700]), |_| {
        let disk = lab.record::<DiskRecord>(&lab.free);
        assert_eq!(disk.size.get(), 700);
        let image = image(&lab.host, &lab.free);
        assert_eq!(virtual_size(&image, disk.format, false).unwrap(), disk.size.bytes());
    });
}

#[test]
fn update_disk() {
    let Some(lab) = Lab::new() else { return };
    write_pattern(&lab.host, &lab.free);
    lab.walk("update_disk", &json!([lab.free, 9, {"format": "raw"}]), |_| {
        let disk = lab.record::<DiskRecord>(&lab.free);
        assert_eq!(
            (disk.size.get(), disk.image().as_str(), disk.inactive_image),
            (9, "disk-1.raw", None)
        );
    });
}

#[test]
fn snapshot_disk() {
    let Some(lab) = Lab::new() else { return };
    write_pattern(&lab.host, &lab.free);
    lab.walk("snapshot_disk", &json!([lab.free, {"job": "db"}]), |made| {
        let snapshot = lab.record::<SnapshotRecord>(&text(made).parse().unwrap());
        assert_eq!((snapshot.phase, &snapshot.metadata["job"]), (Phase::Ready, &json!("db")));
        let image = lab.host.store().snapshot_image(&snapshot).unwrap();
        assert_pattern_in(&lab.host, &image, &snapshot.disk);
    });
}

#[test]
fn delete_snapshot() {
    let Some(lab) = Lab::new() else { return };
    let snapshot = lab.host.ok("snapshot_disk", &json!([lab.free, {}]));
    lab.walk("delete_snapshot", &json!([snapshot]), |_| {
        assert!(lab.host.store().list::<SnapshotRecord>().unwrap().is_empty());
    });
}

#[test]
fn set_vm_metadata() {
    let Some(lab) = Lab::new() else { return };
    lab.walk("set_vm_metadata", &json!([lab.vm, {"name": "bosh/0"}]), |_| {
        assert_eq!(lab.record::<VmRecord>(&lab.vm).metadata["name"], "bosh/0");
    });
}

#[test]
fn set_disk_metadata() {
    let Some(lab) = Lab::new() else { return };
    lab.host.ok("set_disk_metadata", &json!([lab.free, {"owner": "before"}]));
    lab.walk("set_disk_metadata", &json!([lab.free, {"job": "db"}]), |_| {
        assert_eq!(metadata(&lab.host, &lab.free), json!({"job": "db"}));
    });
}

#[test]
fn create_stemcell() {
    let Some(lab) = Lab::new() else { return };
    let image = lab.host.path("another-image");
    fs::write(&image, [GUEST, &[7; 4096]].concat()).unwrap();
    lab.walk("create_stemcell", &json!([image, {}]), |made| {
        assert_eq!(lab.record::<StemcellRecord>(&text(made).parse().unwrap()).phase, Phase::Ready);
    });
}

#[test]
fn create_stemcell_of_a_file_that_is_here() {
    let Some(lab) = Lab::new() else { return };
    lab.walk("create_stemcell", &json!([lab.host.path("image"), {}]), |made| {
        assert_eq!(lab.record::<StemcellRecord>(&text(made).parse().unwrap()).phase, Phase::Ready);
    });
}

#[test]
fn create_network() {
    let Some(lab) = Lab::new() else { return };
    let subnet = json!([{"type": "manual", "range": "10.8.0.0/24", "cloud_properties": {}}]);
    lab.walk("create_network", &subnet, |made| {
        assert_eq!(
            lab.record::<NetworkRecord>(&text(&made[0]).parse().unwrap()).phase,
            Phase::Ready
        );
        let (well, networks) = lab.host.command(&["network", "apply", &text(&made[0]), "--json"]);
        assert!(
            well && lab.host.namespace().ip("-4 -brief address show").contains("10.8.0.1/24"),
            "{networks}"
        );
    });
}

#[test]
fn delete_network() {
    let Some(lab) = Lab::new() else { return };
    let made =
        lab.host.ok("create_network", &json!([{"netmask_bits": 24, "cloud_properties": {}}]));
    lab.walk("delete_network", &json!([made[0]]), |_| {
        assert!(lab.host.store().list::<NetworkRecord>().unwrap().is_empty());
    });
    lab.host.ok("delete_network", &json!([made[0]]));
}

#[test]
fn create_vm() {
    let Some(lab) = Lab::new() else { return };
    let mut arguments = lab.host.vm_arguments(&lab.stemcell);
    arguments[2]["ephemeral_disk"] = json!(16);
    lab.walk("create_vm", &arguments, |made| {
        let vm = lab.record::<VmRecord>(&vm_cid(made));
        assert_eq!(vm.phase, Phase::Ready);
        // Else another VM would get the same.
        assert_eq!(uids::find(lab.host.store().state_dir(), &vm.cid), Some(vm.uid));
        let claims = lab.host.path("state/claims").read_dir().unwrap().flatten();
        let claims = claims
            .filter(|claim| fs::read_link(claim.path()).unwrap() == Path::new(vm.cid.as_str()));
        assert_eq!(claims.count(), 1, "its address");
    });
}

#[test]
fn calls_about_pools() {
    let Some(lab) = Lab::in_a_pool() else { return };
    let is_whole = |cid: &str, names: &[&str]| {
        for name in names {
            assert!(lab.host.path("pool").join(cid).join(name).exists(), "{name}");
        }
    };
    lab.walk("create_disk", &json!([8, {}, null]), |made| is_whole(&text(made), &["disk.qcow2"]));
    let arguments = lab.host.vm_arguments(&lab.stemcell);
    lab.walk("create_vm", &arguments, |made| {
        is_whole(vm_cid(made).as_str(), &["root.qcow2", "base.raw"])
    });
    lab.walk("delete_disk", &json!([lab.free]), |_| {
        assert!(!lab.host.path("pool").join(&lab.free).exists())
    });
}

#[test]
fn delete_vm() {
    let Some(lab) = Lab::new() else { return };
    lab.walk("delete_vm", &json!([lab.vm]), |_| {
        assert_eq!(lab.host.ok("has_vm", &json!([lab.vm])), false);
    });
}
