//! Documentation that must match the program.

use std::fs;
use std::path::Path;
use std::process::Command;

use bosh_qemu_cpi::config::METHODS;
use bosh_qemu_cpi::cpi::deadlines::default_timeout;

fn program(arguments: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_bosh-qemu-cpi")).args(arguments).output().unwrap()
}

#[test]
fn reference_pages_match_the_program() {
    for page in ["config", "cloud-properties"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("docs/{page}.md"));
        let printed = program(&["reference", page]);
        assert!(printed.status.success(), "{printed:?}");
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            String::from_utf8(printed.stdout).unwrap(),
            "make it again: bosh-qemu-cpi reference {page} > docs/{page}.md"
        );
    }
}

#[test]
fn default_deadlines_match_the_documented_table() {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/operating.md"))
        .unwrap();
    let section =
        text.split("\n## ").find(|section| section.starts_with("Deadlines")).expect("a section");
    let rows = section
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |")?.split_once(" | "));
    let rows: Vec<(&str, u64)> =
        rows.filter_map(|(names, seconds)| Some((names, seconds.parse().ok()?))).collect();
    let documented = |method: &str| {
        let row = rows.iter().find(|(names, _)| names.contains(&format!("`{method}`")));
        row.or_else(|| rows.iter().find(|(names, _)| *names == "every other")).expect("a row").1
    };
    // `info` has no deadline.
    let methods: Vec<_> = METHODS.iter().copied().filter(|method| *method != "info").collect();
    for &method in &methods {
        assert_eq!(default_timeout(method).as_secs(), documented(method), "{method}");
    }
    // The table names no unknown method.
    let named = rows.iter().flat_map(|(names, _)| names.split('`').skip(1).step_by(2));
    let unknown: Vec<_> =
        named.filter(|name| !methods.contains(name) && *name != "disk restore").collect();
    assert!(rows.len() > 3 && unknown.is_empty(), "{unknown:?}");
}

/// The source of the test module `path`, for example `vm::host_boot`, if that module exists.
fn test_module(path: &str) -> Option<String> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it");
    let path = path.replace("::", "/");
    let files = [dir.join(format!("{path}.rs")), dir.join(path).join("mod.rs")];
    files.iter().find_map(|file| fs::read_to_string(file).ok())
}

/// docs/reliability.md names tests as `module::test` and whole modules as `module::module`.
#[test]
fn reliability_promises_name_existing_tests() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reliability.md");
    let text = fs::read_to_string(path).unwrap();
    let named: Vec<_> = text
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|word| !word.contains(char::is_whitespace))
        .filter_map(|word| Some((word, word.rsplit_once("::")?)))
        .collect();
    assert!(!named.is_empty(), "no promise names a test");
    for (name, (module, test)) in named {
        let is_test = test_module(module)
            .is_some_and(|source| source.contains(&format!("#[test]\nfn {test}()")));
        assert!(is_test || test_module(name).is_some(), "{name} is no test and no module");
    }
}
