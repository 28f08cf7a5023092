//! Rules about the inside of `cpi`: its floors, circles of files, the rooms of side effects.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::layers::rust_files;

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

/// A file of the source and the code in it, without comments and tests.
struct Source {
    /// Path below `src`.
    path: PathBuf,
    code: String,
}

impl Source {
    fn all() -> Vec<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let read = |file: PathBuf| Self {
            code: without_comments_and_tests(&fs::read_to_string(&file).unwrap()),
            path: file.strip_prefix(&root).unwrap().to_owned(),
        };
        rust_files(&root).into_iter().map(read).collect()
    }

    fn is_folder(&self) -> bool {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        self.path.ends_with("mod.rs") || root.join(self.path.with_extension("")).is_dir()
    }

    /// Path of the module, as `cpi::vm::create`.
    fn module(&self) -> String {
        let path = self.path.with_extension("").to_string_lossy().replace('/', "::");
        path.strip_suffix("::mod").unwrap_or(&path).to_owned()
    }
}

fn without_comments_and_tests(source: &str) -> String {
    let code = source.split("\n#[cfg(test)]\nmod tests {").next().unwrap();
    let code = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    code.map(|line| line.replace("pub(in crate::cpi)", "pub") + "\n").collect()
}

/// The paths that `file` imports or names, from the crate's root.
fn paths(file: &Source) -> BTreeSet<String> {
    let module = file.module();
    let parent = module.rsplit_once("::").map_or("", |(parent, _)| parent);
    let within = if file.is_folder() { module.as_str() } else { parent };
    let mut found = BTreeSet::new();
    for path in used(&file.code, "use ") {
        found.insert(absolute(&path, &module, parent, within));
    }
    for (at, _) in file.code.match_indices("crate::") {
        let path = file.code[at..].chars().take_while(|c| c.is_alphanumeric() || "_:".contains(*c));
        found.insert(absolute(&path.collect::<String>(), &module, parent, within));
    }
    found
}

/// The paths of the statements in `code` that begin with `keyword`.
fn used(code: &str, keyword: &str) -> Vec<String> {
    let statements =
        code.split(';').map(|text| text.split_whitespace().collect::<Vec<_>>().join(" "));
    let used =
        statements.filter_map(|text| Some(text[text.rfind(keyword)? + keyword.len()..].to_owned()));
    used.flat_map(|path| expand(path.trim())).collect()
}

/// All modules, with the names that each re-exports and where these are defined.
struct Modules(BTreeMap<String, BTreeMap<String, String>>);

impl Modules {
    fn of(files: &[Source]) -> Self {
        let exports = |file: &Source| {
            let module = file.module();
            let exported = ["pub use ", "pub(super) use ", "pub(crate) use "];
            let paths = exported.iter().flat_map(|keyword| used(&file.code, keyword));
            let absolute = |path: String| {
                let name = path.rsplit("::").next().unwrap().to_owned();
                (name, absolute(&path, &module, "", &module))
            };
            (module.clone(), paths.map(absolute).collect())
        };
        Self(
            files
                .iter()
                .filter(|file| file.is_folder())
                .map(exports)
                .chain(
                    files
                        .iter()
                        .map(|file| (file.module(), BTreeMap::new()))
                        .filter(|(module, _)| !module.is_empty()),
                )
                .fold(BTreeMap::new(), |mut all, (module, exports)| {
                    all.entry(module).or_insert_with(BTreeMap::new).extend(exports);
                    all
                }),
        )
    }

    /// The module in which the last name of `path` is defined.
    fn defining(&self, path: &str) -> Option<String> {
        let mut module = path;
        while !self.0.contains_key(module) {
            module = module.rsplit_once("::")?.0;
        }
        let name = path[module.len()..].trim_start_matches("::").split("::").next().unwrap();
        match self.0[module].get(name) {
            Some(path) => self.defining(path),
            None => Some(module.to_owned()),
        }
    }
}

/// Writes out `a::{b, c::d}` as `a::b` and `a::c::d`.
fn expand(path: &str) -> Vec<String> {
    let Some((head, rest)) = path.split_once('{') else {
        return vec![path.split(" as ").next().unwrap().trim().to_owned()];
    };
    let mut depth = 0;
    let body = rest.strip_suffix('}').unwrap_or(rest);
    let parts = body.split(|c| {
        depth += i32::from(c == '{') - i32::from(c == '}');
        c == ',' && depth == 0
    });
    let parts = parts.filter(|part| !part.trim().is_empty());
    parts.flat_map(|part| expand(part.trim())).map(|part| format!("{head}{part}")).collect()
}

/// A path from the crate's root: `self`, `super` and names of child modules are resolved.
fn absolute(path: &str, module: &str, parent: &str, within: &str) -> String {
    let join = |base: &str, rest: &str| {
        [base, rest].iter().filter(|part| !part.is_empty()).copied().collect::<Vec<_>>().join("::")
    };
    let path = path.trim_end_matches("::self").trim_end_matches("::*");
    match path.split_once("::") {
        Some(("crate", rest)) => rest.to_owned(),
        Some(("self", rest)) => join(module, rest),
        Some(("super", rest)) if within == module => join(parent, rest),
        Some(("super", rest)) => join(within, rest),
        _ if path == "super" => within.to_owned(),
        _ => join(module, path),
    }
}

/// Each module with those that it imports.
fn graph(files: &[Source]) -> BTreeMap<String, BTreeSet<String>> {
    let modules = Modules::of(files);
    let imports = |file: &Source| {
        let defining = paths(file).into_iter().filter_map(|path| modules.defining(&path));
        defining.filter(|module| *module != file.module()).collect()
    };
    files.iter().map(|file| (file.module(), imports(file))).collect()
}

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
    let circles: Vec<_> = graph.keys().filter(|module| reached(module).contains(module)).collect();
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

/// Files there that open other files: a stemcell's file that the caller names, the host's id, a
/// device, sockets, and a light stemcell's image, which the operator keeps.
const OPENS_OTHERS: &[(&str, &str)] = &[
    ("audit/images.rs", ".exists()"),
    ("image/import/source.rs", "File::open("),
    // The error that the target exists.
    ("image/import/mod.rs", ".exists()"),
    ("store/ownership/owner_file.rs", "fs::read"),
    ("store/ownership/owner_file.rs", "atomic::write"),
    ("supervisor/resources.rs", "File::options("),
    ("supervisor/resources.rs", "atomic::remove_file("),
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
        ".exists()",
        "tempfile",
        "atomic::remove_file(",
        "atomic::write",
        "atomic::make_dir(",
        "image.path.metadata",
    ];
    let mut checked = 0;
    for file in Source::all() {
        let path = file.path.display().to_string();
        if !USES_IMAGES.iter().any(|used| path.starts_with(used)) || path.contains("test") {
            continue;
        }
        checked += 1;
        for call in opens.into_iter().filter(|call| file.code.contains(call)) {
            let allowed = OPENS_OTHERS.contains(&(path.as_str(), call));
            assert!(allowed, "{path} calls `{call}`: use store::beneath");
        }
    }
    assert!(checked > 40, "{checked} files");
}

#[test]
fn only_creation_makes_records_ready_and_pending_notes() {
    let writes_ready = |code: &str| {
        code.contains("phase: Phase::Ready")
            || code.contains("phase = Phase::Ready")
            || code.contains("set_phase(Phase::Ready")
    };
    // The store names the directory and lists it for reservations, a create makes it durable, and
    // `audit` dates its notes.
    let may_read =
        ["store/layout.rs", "store/reservations.rs", "cpi/vm/images.rs", "audit/records.rs"];
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

#[test]
fn paths_are_resolved_as_the_compiler_does() {
    assert_eq!(expand("a::{b, c::{d, e}, self}"), ["a::b", "a::c::d", "a::c::e", "a::self"]);
    let from = |path: &str| absolute(path, "cpi::disk::copy", "cpi::disk", "cpi::disk");
    assert_eq!(from("super::access::Access"), "cpi::disk::access::Access");
    assert_eq!(from("crate::cpi::machine"), "cpi::machine");
    let folder = |path: &str| absolute(path, "cpi::disk", "cpi", "cpi::disk");
    assert_eq!(folder("attach::attach"), "cpi::disk::attach::attach");
    assert_eq!(folder("super::context"), "cpi::context");
}
