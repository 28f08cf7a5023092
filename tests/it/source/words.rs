//! The rules of words that a reader of files can check: CONTRIBUTING.md has them all.

use std::fs;
use std::path::PathBuf;

use super::reader::rust_files;

/// Columns of a line of prose. rustfmt keeps code to the same width.
const COLUMNS: usize = 100;

/// Words without a named subject, and one that English spells in one word.
const BANNED: [&str; 4] = ["nobody", "whoever", "somebody", "can not"];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The Rust files in `folders`, each with its path and text.
fn sources(folders: &[&str]) -> Vec<(String, String)> {
    let files = folders.iter().flat_map(|folder| rust_files(&root().join(folder)));
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).unwrap();
        (path.strip_prefix(root()).unwrap().display().to_string(), text)
    };
    files.map(read).collect()
}

/// The operator's pages, and those of people who work on this program.
fn pages() -> Vec<(String, String)> {
    let docs = fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let others = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"].map(|name| root().join(name));
    let pages = docs.chain(others).filter(|path| path.extension().is_some_and(|e| e == "md"));
    pages.map(|path| (path.display().to_string(), fs::read_to_string(&path).unwrap())).collect()
}

fn comment(line: &str) -> Option<&str> {
    line.trim_start().strip_prefix("//")
}

/// `name` as a whole word in `line`, in any case.
fn has_word(line: &str, name: &str) -> bool {
    let line = line.to_lowercase();
    line.match_indices(name).any(|(at, _)| {
        let is_end = |c: Option<char>| c.is_none_or(|c| !c.is_alphanumeric() && c != '_');
        is_end(line[..at].chars().next_back()) && is_end(line[at + name.len()..].chars().next())
    })
}

#[test]
fn comments_fit_the_width_of_code() {
    for (path, text) in sources(&["src", "tests", "benches"]) {
        for (number, line) in text.lines().enumerate() {
            let is_long = comment(line).is_some() && line.chars().count() > COLUMNS;
            assert!(!is_long, "{path}:{} is longer than {COLUMNS} columns", number + 1);
        }
    }
}

#[test]
fn prose_names_its_subjects() {
    let prose = sources(&["src", "tests/it"]).into_iter().chain(pages());
    for (path, text) in prose.filter(|(path, _)| !path.ends_with("source/words.rs")) {
        for (number, line) in text.lines().enumerate() {
            let word = BANNED.iter().find(|word| has_word(line, word));
            // "nobody" is also the user without rights.
            let is_user = word == Some(&"nobody") && line.contains("user");
            assert!(word.is_none() || is_user, "{path}:{}: '{}'", number + 1, word.unwrap());
        }
    }
}

#[test]
fn predicates_return_bool() {
    let mut found = 0;
    for (path, text) in sources(&["src"]) {
        for prefix in ["fn is_", "fn has_", "fn can_"] {
            for (at, _) in text.match_indices(prefix) {
                let end = text[at..].find(['{', ';']).map_or(text.len(), |end| at + end);
                let signature = text[at..end].split_whitespace().collect::<Vec<_>>().join(" ");
                let returned = signature.rsplit_once("->").map(|(_, returned)| returned.trim());
                let is_predicate =
                    returned.is_some_and(|r| r.starts_with("bool") || r.contains("Result<bool"));
                assert!(is_predicate, "{path}: {signature}");
                found += 1;
            }
        }
    }
    assert!(found > 40, "{found} predicates");
}

#[test]
fn durations_say_what_they_time() {
    let mut found = 0;
    for (path, text) in sources(&["src"]) {
        for line in text.lines().filter(|line| line.contains("Duration =")) {
            let Some((_, constant)) = line.split_once("const ") else { continue };
            let name = constant.split(':').next().unwrap();
            let ends = ["_TIMEOUT", "_INTERVAL", "_DELAY"].iter().any(|end| name.ends_with(end));
            assert!(ends, "{path}: {name}");
            found += 1;
        }
    }
    assert!(found > 40, "{found} constants");
}

#[test]
fn words_are_found_whole() {
    assert!(has_word("Nobody waits.", "nobody"));
    assert!(has_word("it can not be read", "can not"));
    assert!(!has_word("a `nobodys` list", "nobody"));
}
