//! Reads the modules of the source and what each imports.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

pub(super) fn rust_files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let files = entries.flat_map(|path| if path.is_dir() { rust_files(&path) } else { vec![path] });
    files.filter(|path| path.extension().is_some_and(|extension| extension == "rs")).collect()
}

/// A file of the source and the code in it, without comments and tests.
pub(super) struct Source {
    /// Path below `src`.
    pub(super) path: PathBuf,
    pub(super) code: String,
}

impl Source {
    pub(super) fn all() -> Vec<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let read = |file: PathBuf| Self {
            code: without_comments_and_tests(&fs::read_to_string(&file).unwrap()),
            path: file.strip_prefix(&root).unwrap().to_owned(),
        };
        rust_files(&root).into_iter().map(read).collect()
    }

    pub(super) fn is_folder(&self) -> bool {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        self.path.ends_with("mod.rs") || root.join(self.path.with_extension("")).is_dir()
    }

    /// Path of the module, as `cpi::vm::create`.
    pub(super) fn module(&self) -> String {
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
pub(super) fn paths(file: &Source) -> BTreeSet<String> {
    let module = file.module();
    let parent = module.rsplit_once("::").map_or("", |(parent, _)| parent);
    let within = if file.is_folder() { module.as_str() } else { parent };
    let mut found = BTreeSet::new();
    for path in used(&file.code, "use ") {
        found.insert(absolute(&path, &module, parent, within));
    }
    for root in ["crate::", "super::"] {
        for (at, _) in file.code.match_indices(root) {
            let path =
                file.code[at..].chars().take_while(|c| c.is_alphanumeric() || "_:".contains(*c));
            let path = path.collect::<String>();
            // The rest of `super::super::…` is no path of its own. Groups are those of imports.
            if !file.code[..at].ends_with([':', '_']) && !path.ends_with("::") {
                found.insert(absolute(&path, &module, parent, within));
            }
        }
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
        Some(("super", rest)) => {
            let mut base = if within == module { parent } else { within };
            let mut rest = rest;
            while let Some(further) = rest.strip_prefix("super::") {
                base = base.rsplit_once("::").map_or("", |(upper, _)| upper);
                rest = further;
            }
            join(base, rest)
        }
        _ if path == "super" => within.to_owned(),
        _ => join(module, path),
    }
}

/// Each module with those that it imports.
pub(super) fn graph(files: &[Source]) -> BTreeMap<String, BTreeSet<String>> {
    let modules = Modules::of(files);
    let imports = |file: &Source| {
        let defining = paths(file).into_iter().filter_map(|path| modules.defining(&path));
        defining.filter(|module| *module != file.module()).collect()
    };
    files.iter().map(|file| (file.module(), imports(file))).collect()
}

#[test]
fn paths_are_resolved_as_the_compiler_does() {
    assert_eq!(expand("a::{b, c::{d, e}, self}"), ["a::b", "a::c::d", "a::c::e", "a::self"]);
    let from = |path: &str| absolute(path, "cpi::disk::copy", "cpi::disk", "cpi::disk");
    assert_eq!(from("super::access::Access"), "cpi::disk::access::Access");
    assert_eq!(from("crate::cpi::machine"), "cpi::machine");
    assert_eq!(from("super::super::vm::create"), "cpi::vm::create");
    let folder = |path: &str| absolute(path, "cpi::disk", "cpi", "cpi::disk");
    assert_eq!(folder("attach::attach"), "cpi::disk::attach::attach");
    assert_eq!(folder("super::context"), "cpi::context");
    assert_eq!(folder("super::super::rpc::call"), "rpc::call");
    let named =
        |code: &str| paths(&Source { path: "cpi/disk/copy.rs".into(), code: code.to_owned() });
    assert_eq!(named("super::super::vm::create(cx)"), ["cpi::vm::create".to_owned()].into());
}
