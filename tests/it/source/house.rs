//! Rules about the inside of `cpi`: its floors, circles of files, the rooms of side effects.

use std::collections::BTreeSet;

use super::reader::{Source, graph};

/// The floors of `cpi`, top first. A module may import lower floors and its own files only.
const FLOORS: &[&[&str]] = &[
    &["mod"],
    &["recovery"],
    &["vm"],
    &["disk", "stemcell", "network"],
    &["capacity", "machine"],
    &["presence"],
    &["creation"],
    &["properties"],
    &["context"],
    &["contract", "deadlines", "marker"],
];

/// Imports that the floors do not allow and that stay, each with its reason.
const EXCEPTIONS: &[(&str, &str)] = &[];

/// The name of the floor's module that holds `module`, as `disk` for `cpi::disk::attach`.
fn room(module: &str) -> Option<&str> {
    let inside = module.strip_prefix("cpi")?;
    Some(inside.strip_prefix("::").map_or("mod", |rest| rest.split("::").next().unwrap()))
}

#[test]
fn imports_inside_cpi_point_down() {
    let floor = |room: &str| {
        let floor = FLOORS.iter().position(|floor| floor.contains(&room));
        floor.unwrap_or_else(|| panic!("'{room}' is on no floor"))
    };
    let mut arrows = 0;
    let mut wrong = Vec::new();
    for (from, imported) in graph(&Source::all()) {
        let Some(upper) = room(&from) else { continue };
        for to in imported {
            let Some(lower) = room(&to).filter(|lower| *lower != upper) else { continue };
            arrows += 1;
            let is_exception = EXCEPTIONS.contains(&(from.as_str(), to.as_str()));
            if floor(lower) <= floor(upper) && !is_exception {
                wrong.push(format!("{from} → {to}"));
            }
        }
    }
    assert!(arrows > 60, "the reader finds {arrows} imports");
    assert!(wrong.is_empty(), "these imports do not point down:\n{}", wrong.join("\n"));
}

#[test]
fn imports_of_files_have_no_circle() {
    let files = Source::all();
    let mut graph = graph(&files);
    // A re-export is no import: the name's own module is imported.
    let folders: BTreeSet<_> = files.iter().filter(|f| f.is_folder()).map(Source::module).collect();
    graph.iter_mut().filter(|(from, _)| folders.contains(*from)).for_each(|(from, imported)| {
        imported.retain(|to| !to.starts_with(&format!("{from}::")));
    });
    let reached = |from: &String| {
        let mut reached = BTreeSet::new();
        let mut next: Vec<_> = graph[from].iter().collect();
        while let Some(module) = next.pop() {
            if reached.insert(module) {
                next.extend(&graph[module]);
            }
        }
        reached
    };
    let in_circles: BTreeSet<_> =
        graph.keys().filter(|module| reached(module).contains(module)).collect();
    let circles: Vec<_> = in_circles
        .iter()
        .map(|from| (from, graph[*from].iter().filter(|to| in_circles.contains(to)).collect()))
        .collect::<Vec<(_, Vec<_>)>>();
    assert!(circles.is_empty(), "these files import each other: {circles:#?}");
}

#[test]
fn the_contract_is_implemented_in_one_place() {
    let files = Source::all();
    let places = |text: &str| -> Vec<_> {
        let with = files.iter().filter(|file| file.code.contains(text));
        with.map(|file| file.path.display().to_string()).collect()
    };
    assert_eq!(places("impl Cpi"), ["cpi/mod.rs"]);
    assert_eq!(places("impl Contract for Cpi"), ["cpi/mod.rs"]);
}

/// Where images and owner files are used. They may be in a pool, whose other writers may be
/// hostile.
const USES_IMAGES: &[&str] = &[
    "image/",
    "store/ownership/",
    "cpi/disk/",
    "cpi/stemcell/",
    "cpi/vm/images.rs",
    "cpi/capacity/",
    "qemu/files.rs",
    "supervisor/resources.rs",
    "audit/images.rs",
];

/// Calls there that do not open a file of a pool, each with its number and its reason.
const OPENS_OTHERS: &[(&str, &str, usize)] = &[
    // The operator's: a light stemcell's image, and the file of a stemcell.
    ("audit/images.rs", ".exists()", 1),
    ("cpi/stemcell/light.rs", ".canonicalize()", 2),
    ("cpi/stemcell/light.rs", "path.metadata()", 1),
    ("image/import/source.rs", ".is_file()", 1),
    ("image/import/source.rs", "File::open(", 1),
    ("image/import/source.rs", "path.metadata()", 1),
    // Whether a name exists. The pool's own directory is the operator's.
    ("audit/images.rs", ".read_dir()", 1),
    ("cpi/capacity/images.rs", ".is_dir()", 1),
    ("cpi/disk/delete.rs", "atomic::entry_exists(", 1),
    ("cpi/disk/take.rs", "atomic::entry_exists(", 1),
    ("cpi/stemcell/delete.rs", "atomic::entry_exists(", 1),
    ("image/import/mod.rs", ".symlink_metadata()", 1),
    ("store/ownership/mod.rs", "atomic::entry_exists(", 1),
    ("store/ownership/mod.rs", "atomic::names(", 1),
    // `remove_dir_all` follows no link.
    ("cpi/disk/copy.rs", "atomic::remove_dir(", 1),
    ("store/ownership/mod.rs", "atomic::remove_dir(", 1),
    // The host's id, a device, and sockets.
    ("store/ownership/owner_file.rs", "fs::read", 1),
    ("store/ownership/owner_file.rs", "atomic::write", 1),
    ("supervisor/resources.rs", "File::options(", 1),
    ("supervisor/resources.rs", "atomic::remove_file(", 1),
];

#[test]
fn files_of_pools_are_only_opened_by_store_beneath() {
    let opens = [
        "File::open(",
        "File::options(",
        "OpenOptions",
        "File::create",
        "fs::read",
        "fs::write",
        "fs::rename",
        "fs::hard_link",
        "fs::copy",
        "fs::remove",
        "fs::metadata",
        "fs::{read",
        ".exists()",
        ".is_dir()",
        ".is_file()",
        ".canonicalize()",
        ".read_dir()",
        ".symlink_metadata()",
        "path.metadata()",
        "tempfile",
        "atomic::entry_exists(",
        "atomic::names(",
        "atomic::remove_dir(",
        "atomic::remove_file(",
        "atomic::write",
        "atomic::make_dir(",
    ];
    let (mut checked, mut wrong) = (0, Vec::new());
    for file in Source::all() {
        let path = file.path.display().to_string();
        if !USES_IMAGES.iter().any(|used| path.starts_with(used))
            || path.ends_with("tests.rs")
            || path.contains("/tests/")
            || path.ends_with("testing.rs")
        {
            continue;
        }
        checked += 1;
        for call in opens {
            let calls = file.code.matches(call).count();
            if calls > 0 && !OPENS_OTHERS.contains(&(path.as_str(), call, calls)) {
                wrong.push(format!("{path}: `{call}`, {calls}"));
            }
        }
    }
    assert!(checked > 40, "{checked} files");
    assert!(wrong.is_empty(), "use store::beneath, or name the call:\n{}", wrong.join("\n"));
}

#[test]
fn only_creation_makes_records_ready_and_pending_notes() {
    let writes_ready = |code: &str| {
        code.contains("phase: Phase::Ready")
            || code.contains("phase = Phase::Ready")
            || code.contains("set_phase(Phase::Ready")
    };
    // The store lists the directory for reservations, a create makes it durable, and
    // `audit` dates its notes.
    let may_read = ["store/reservations.rs", "cpi/vm/images.rs", "audit/records.rs"];
    // The store takes over a record that another host's create has made ready.
    let may_write = "store/ownership/";
    for file in Source::all() {
        let path = file.path.display().to_string();
        if path.starts_with("cpi/creation/") {
            continue;
        }
        let ready = writes_ready(&file.code) && !path.starts_with(may_write);
        assert!(!ready, "{path} writes `ready`");
        let pending = file.code.contains("pending_dir()") && !may_read.contains(&path.as_str());
        assert!(!pending, "{path} uses pending/");
        // A copy of a disk has a note, too: a killed one keeps the guest's I/O waiting.
        let adds = file.code.contains("pending::add(") && path != "cpi/disk/copy.rs";
        assert!(!adds, "{path} adds a pending note");
    }
}

#[test]
fn only_recovery_and_audit_touch_objects_that_a_call_does_not_name() {
    // A create takes over the addresses of an unacknowledged VM, and a call on a disk removes the
    // incomplete snapshots of that disk.
    let exceptions = ["cpi/vm/reclaim.rs", "cpi/disk/settled.rs"];
    let calls = ["recovery::recover(", "recovery::run(", "recover::recover(", "backup::recover("];
    let calls = |code: &str| calls.iter().any(|call| code.contains(call));
    for file in Source::all() {
        let path = file.path.display().to_string();
        let may = path == "cpi/mod.rs" || path == "cpi/recovery.rs" || path.starts_with("audit/");
        let may = may || exceptions.contains(&path.as_str());
        assert!(may || !calls(&file.code), "{path} recovers an object that its call does not name");
    }
}
