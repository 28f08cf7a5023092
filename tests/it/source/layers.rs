//! Imports between the modules of the source point down.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use Row::{Apart, Together};

use super::reader::{Source, graph, rust_files};

/// The layers, top first. A module may import lower rows, and its own row if that is `Together`.
const LAYERS: &[Row] = &[
    Together(&["main"]),
    Together(&["commands", "cli"]),
    Together(&["remote"]),
    Together(&["rpc"]),
    Together(&["audit"]),
    Together(&["cpi"]),
    Together(&["supervisor"]),
    Together(&["agent"]),
    Apart(&["image", "qemu", "qmp", "net"]),
    Together(&["store", "host"]),
    Together(&[
        "config",
        "schema",
        "cid",
        "digest",
        "units",
        "mac",
        "link_name",
        "ordered",
        "blocking_call",
        "ranges",
        "error",
        "log",
        "crash",
        "sys",
    ]),
];

/// Macros are exported at the crate's root. Each with the module that declares it.
const MACROS: &[(&str, &str)] = &[("document", "schema"), ("choice", "schema")];

enum Row {
    Together(&'static [&'static str]),
    Apart(&'static [&'static str]),
}

impl Row {
    fn modules(&self) -> &'static [&'static str] {
        let (Together(modules) | Apart(modules)) = self;
        modules
    }
}

/// Reason why `from` must not import `to`; `None` if it may.
fn refusal_of(from: &str, to: &str) -> Option<&'static str> {
    let row = |module: &str| LAYERS.iter().position(|row| row.modules().contains(&module));
    match (row(from), row(to)) {
        (None, _) | (_, None) => Some("is not in the table of layers"),
        (Some(from), Some(to)) if to < from => Some("points up"),
        (Some(row), Some(same)) if row == same && from != to && matches!(LAYERS[row], Apart(_)) => {
            Some("is between peers that stand apart")
        }
        _ => None,
    }
}

#[test]
fn imports_between_layers_point_down() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut arrows = BTreeSet::new();
    for file in rust_files(&root) {
        let path = file.strip_prefix(&root).unwrap();
        let from =
            path.components().next().unwrap().as_os_str().to_string_lossy().replace(".rs", "");
        if from == "lib" {
            continue;
        }
        for to in used_modules(&fs::read_to_string(&file).unwrap()) {
            arrows.insert((from.clone(), to, path.display().to_string()));
        }
    }
    // `super::…` can reach another module, too.
    for (file, imported) in graph(&Source::all()) {
        let head = |path: &str| path.split("::").next().unwrap().to_owned();
        let imported = imported.iter().map(|path| head(path)).filter(|to| *to != head(&file));
        if file != "lib" {
            arrows.extend(imported.map(|to| (head(&file), to, file.clone())));
        }
    }
    assert!(arrows.len() > 10, "the reader finds no arrows: {arrows:?}");
    let wrong: Vec<_> = arrows
        .iter()
        .filter_map(|(from, to, file)| {
            refusal_of(from, to).map(|why| format!("{file}: {from} → {to} {why}"))
        })
        .collect();
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn check_import_refuses_upward_and_peer_imports() {
    assert_eq!(refusal_of("rpc", "cpi"), None);
    assert_eq!(refusal_of("config", "schema"), None);
    assert_eq!(refusal_of("net", "net"), None);
    assert_eq!(refusal_of("cpi", "rpc"), Some("points up"));
    assert_eq!(refusal_of("qemu", "qmp"), Some("is between peers that stand apart"));
    assert_eq!(refusal_of("qemu", "nonsense"), Some("is not in the table of layers"));
}

#[test]
fn parse_imports_finds_every_path() {
    let source = "
        use crate::{cid::{Cid, VmCid}, error::Result};
        use crate::store;
        // crate::comment and \"crate::quoted\" in one
        $crate::schema::Key; crate::document! {}
        let x = crate::host::now(); my_crate::no::more();
        use bosh_qemu_cpi::cli::Cli;
    ";
    let used: Vec<_> = used_modules(source).into_iter().collect();
    assert_eq!(used, ["cid", "cli", "error", "host", "schema", "store"]);
}

/// Modules that `source` imports, as `crate::module` or, in the binary, `bosh_qemu_cpi::module`.
fn used_modules(source: &str) -> BTreeSet<String> {
    let code: String = source
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .fold(String::new(), |a, l| a + l + "\n");
    let mut found = BTreeSet::new();
    for prefix in ["crate::", "bosh_qemu_cpi::"] {
        for (at, _) in code.match_indices(prefix) {
            let inside_a_word = code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
            if !inside_a_word {
                found.extend(heads(&code[at + prefix.len()..]));
            }
        }
    }
    let module = |name: String| {
        MACROS.iter().find(|(m, _)| *m == name).map_or(name, |(_, module)| (*module).to_owned())
    };
    found.into_iter().map(module).collect()
}

/// The first names of a path: a single one, or those of a group `{a::b, c}`.
fn heads(path: &str) -> Vec<String> {
    let word = |text: &str| {
        text.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>()
    };
    let Some(group) = path.strip_prefix('{') else { return vec![word(path)] };
    let mut depth = 0;
    let end = group.find(|c| {
        depth += i32::from(c == '{') - i32::from(c == '}');
        depth < 0
    });
    let mut depth = 0;
    let parts = group[..end.unwrap_or(group.len())].split(|c| {
        depth += i32::from(c == '{') - i32::from(c == '}');
        c == ',' && depth == 0
    });
    parts.map(word).filter(|word| !word.is_empty()).collect()
}
