//! The configuration file, and its keys that a request's context overrides.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::{Config, DEFAULT_FILE, ENVIRONMENT, HOST_KEYS};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::schema::Property;

/// Path of the configuration file: `given`, else the value of [`ENVIRONMENT`]; `None` without both.
pub fn path(given: Option<&Path>) -> Option<PathBuf> {
    let named =
        given.map(Path::to_owned).or_else(|| std::env::var_os(ENVIRONMENT).map(PathBuf::from))?;
    // Absolute, because a supervisor reads the file from another working directory.
    Some(std::path::absolute(&named).unwrap_or(named))
}

/// The JSON of a configuration file. Its keys are not checked yet.
#[derive(Debug)]
pub struct Document {
    name: String,
    keys: Value,
}

impl Document {
    /// Reads `named`, else [`DEFAULT_FILE`]. If the latter does not exist, the document is empty:
    /// all keys have defaults.
    ///
    /// # Errors
    /// [`ErrorKind::BadConfig`] naming the file.
    pub fn read(named: Option<&Path>) -> Result<Self> {
        let path = named.unwrap_or(Path::new(DEFAULT_FILE));
        let text = match std::fs::read_to_string(path) {
            Err(error) if named.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
                "{}".to_owned()
            }
            read => read
                .at("read configuration", path)
                .map_err(|e| e.with_kind(ErrorKind::BadConfig))?,
        };
        let name = path.display().to_string();
        let keys = serde_json::from_str(&text).map_err(|e| {
            Error::new(
                ErrorKind::BadConfig,
                format!("'{name}' is not JSON: line {}, column {}", e.line(), e.column()),
            )
        })?;
        Ok(Self { name, keys })
    }

    /// The configuration in the document.
    ///
    /// # Errors
    /// [`ErrorKind::BadConfig`] naming the file and the key.
    pub fn config(&self) -> Result<Config> {
        Config::from_json(&self.keys).and_then(Config::validated).map_err(|e| e.in_file(&self.name))
    }

    /// The [`HOST_KEYS`] of the document, overridden by a request's `context`. A remote host
    /// receives them.
    pub fn for_host(&self, context: &Map<String, Value>) -> Map<String, Value> {
        let given = |key: &str| (self.keys.get(key), context.get(key));
        let keys = HOST_KEYS.iter().filter_map(|key| {
            let value = match given(key) {
                // As in `with_context`: each deadline is overridden on its own.
                (Some(Value::Object(file)), Some(Value::Object(context)))
                    if *key == "deadlines" =>
                {
                    let both = file.iter().chain(context);
                    Value::Object(
                        both.map(|(method, seconds)| (method.clone(), seconds.clone())).collect(),
                    )
                }
                (file, context) => context.or(file)?.clone(),
            };
            Some(((*key).to_owned(), value))
        });
        keys.collect()
    }
}

impl Config {
    /// Reads the configuration from `named`, else from [`DEFAULT_FILE`] if it exists, else uses the
    /// defaults.
    ///
    /// # Errors
    /// [`ErrorKind::BadConfig`] naming the file and the key.
    pub fn load(named: Option<&Path>) -> Result<Self> {
        Document::read(named)?.config()
    }

    /// The configuration with `keys` overridden by a request's `context`. Other keys of the context
    /// are ignored.
    ///
    /// # Errors
    /// [`ErrorKind::BadRequest`] naming the context key.
    pub fn with_context(&self, context: &Map<String, Value>, keys: &[&str]) -> Result<Self> {
        let overrides: Map<_, _> = context
            .iter()
            .filter(|(key, _)| keys.contains(&key.as_str()))
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect();
        if overrides.is_empty() {
            return Ok(self.clone());
        }
        let given = Self::from_json(&Value::Object(overrides.clone()))
            .and_then(Self::validated)
            .map_err(|e| e.in_request("context"))?;
        let mut config = self.clone();
        if overrides.contains_key("transport") {
            // `transport` and `hosts` exclude each other.
            config.hosts.clear();
        }
        for key in overrides.keys() {
            match key.as_str() {
                "agent" => config.agent = given.agent.clone(),
                "deadlines" => config.deadlines.extend(given.deadlines.clone()),
                "disk_defaults" => config.disk_defaults = given.disk_defaults.clone(),
                "hosts" => config.hosts = given.hosts.clone(),
                "transport" => config.transport = given.transport.clone(),
                "vm_defaults" => config.vm_defaults = given.vm_defaults.clone(),
                other => unreachable!("{other} is not in CONTEXT_KEYS"),
            }
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::CONTEXT_KEYS;
    use super::*;

    #[test]
    fn a_context_overrides_the_context_keys_only() {
        let config = Config::from_json(&json!({"agent": {"ntp": ["a"]}})).unwrap();
        let context = json!({
            "agent": {"ntp": ["b"]}, "state_dir": "/elsewhere", "secret": "x", "director_uuid": "u",
        });
        let changed = config.with_context(context.as_object().unwrap(), CONTEXT_KEYS).unwrap();
        assert_eq!(changed.agent.ntp, ["b"]);
        assert_eq!(changed.state_dir, config.state_dir);
        let bad = json!({"agent": {"ntpp": []}});
        let error = config.with_context(bad.as_object().unwrap(), CONTEXT_KEYS).unwrap_err();
        assert_eq!(error.report(), "context.agent.ntpp: unknown key; did you mean 'ntp'?");
    }

    #[test]
    fn a_remote_host_receives_the_keys_about_its_vms_only() {
        let deadlines = json!({"create_vm": 1, "has_vm": 2});
        let keys = json!({"agent": {"ntp": ["a"]}, "deadlines": deadlines, "state_dir": "/s"});
        let document = Document { name: "cpi.json".into(), keys };
        let context = json!({
            "agent": {"mbus": "m"}, "deadlines": {"has_vm": 3}, "transport": {}, "other": 1,
        });
        let received = document.for_host(context.as_object().unwrap());
        let deadlines = json!({"create_vm": 1, "has_vm": 3});
        assert_eq!(
            Value::Object(received),
            json!({"agent": {"mbus": "m"}, "deadlines": deadlines})
        );
    }

    #[test]
    fn a_transport_in_the_context_replaces_the_files_hosts() {
        let hosts = json!({"hosts": [{"name": "a", "transport": {"kind": "unix"}}]});
        let config = Config::from_json(&hosts).unwrap();
        let context = json!({"transport": {"kind": "unix"}});
        assert!(
            config
                .with_context(context.as_object().unwrap(), CONTEXT_KEYS)
                .unwrap()
                .hosts
                .is_empty()
        );
    }
}
