//! The spec of the BOSH job matches the configuration: one property for each key, with the same
//! defaults.

use std::collections::BTreeMap;

use bosh_qemu_cpi::config::Config;
use bosh_qemu_cpi::schema::{Key, Property};
use serde_json::Value;

/// Properties of other CPIs for the message bus and time servers. `cpi.json.erb` translates them.
const TRANSLATED: &[&str] =
    &["agent.nats.address", "nats.address", "nats.password", "nats.port", "nats.user", "ntp"];

/// The properties of the job's spec, each with the text below its name.
fn properties() -> BTreeMap<String, String> {
    let spec =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/release/jobs/qemu_cpi/spec"))
            .unwrap();
    let mut properties = BTreeMap::new();
    let mut current = None;
    for line in spec.lines().skip_while(|line| *line != "properties:").skip(1) {
        match line
            .strip_prefix("  ")
            .filter(|name| !name.starts_with(' '))
            .and_then(|name| name.strip_suffix(':'))
        {
            Some(name) => {
                current = Some(properties.entry(name.to_owned()).or_insert_with(String::new));
            }
            None => current.iter_mut().for_each(|text| text.push_str(&format!("{line}\n"))),
        }
    }
    properties
}

/// Paths and defaults of all keys that hold values. `networks`, `hosts` and `deadlines` count as
/// one key, because the operator names their entries.
fn leaves(keys: Vec<Key>, above: &str) -> Vec<(String, Option<Value>)> {
    let leaf = |key: Key| {
        let path = format!("{above}{}", key.name);
        let is_list = ["an object of named entries", "an array"].contains(&key.expected);
        let below = if is_list { Vec::new() } else { (key.keys)() };
        if below.is_empty() {
            vec![(path, (key.default)())]
        } else {
            leaves(below, &format!("{path}."))
        }
    };
    keys.into_iter().flat_map(leaf).collect()
}

#[test]
fn release_spec_lists_every_configuration_key() {
    let properties = properties();
    let mut expected: Vec<String> =
        leaves(Config::keys(), "").into_iter().map(|(path, _)| path).collect();
    expected.extend(TRANSLATED.iter().map(|&name| name.to_owned()));
    expected.sort();
    assert_eq!(properties.into_keys().collect::<Vec<_>>(), expected);
}

#[test]
fn release_spec_names_the_default_values() {
    let properties = properties();
    for (path, default) in leaves(Config::keys(), "") {
        let text = &properties[&path];
        let named = text
            .lines()
            .find_map(|line| line.split_once("Default: "))
            .map(|(_, word)| word.trim_end_matches('"'));
        match default {
            Some(Value::String(word)) => assert_eq!(named, Some(word.as_str()), "{path}"),
            Some(Value::Number(number)) => {
                assert_eq!(named, Some(number.to_string().as_str()), "{path}");
            }
            Some(_) => assert!(named.is_some(), "{path}"),
            None => assert_eq!(named, None, "{path}"),
        }
    }
}
