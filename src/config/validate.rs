//! Checks of the configuration across several keys.

use serde_json::Value;

use super::{Config, GroupRule, HostEntry, TransportKind};
use crate::schema::{Problem, SchemaError};

/// The longest `run_dir`, bytes. Socket paths below it then fit into the 107 bytes of unix(7).
const RUN_DIR_MAX: usize = 40;

/// The most hosts of a group: a query asks all of them at the same time, each in its own thread.
pub const MAX_HOSTS: usize = 512;

impl Config {
    /// Refuses combinations of keys that the keys' types allow.
    ///
    /// # Errors
    /// Names the key.
    pub(super) fn validated(self) -> Result<Self, SchemaError> {
        let length = self.run_dir.as_os_str().len();
        if length > RUN_DIR_MAX {
            return Err(refused(
                "run_dir",
                "a path of at most 40 bytes",
                format!("{length} bytes: {}", self.run_dir.display()),
            ));
        }
        self.ensure_pools_valid()?;
        self.transport.ensure_valid().map_err(|e| e.under("transport"))?;
        if self.hosts.len() > MAX_HOSTS {
            return Err(refused("hosts", "at most 512 hosts", self.hosts.len().to_string()));
        }
        for (at, host) in self.hosts.iter().enumerate() {
            ensure_host_valid(host, &self.hosts[..at])
                .map_err(|e| e.under(&at.to_string()).under("hosts"))?;
        }
        for (name, rules) in &self.security_groups {
            for (at, rule) in rules.iter().enumerate() {
                ensure_rule_valid(rule)
                    .map_err(|e| e.under(&format!("{name}.{at}")).under("security_groups"))?;
            }
        }
        Ok(self)
    }

    fn ensure_pools_valid(&self) -> Result<(), SchemaError> {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
        let invalid = self.pools.keys().find(|name| name.is_empty() || !name.chars().all(is_plain));
        if let Some(name) = invalid {
            let expected = "a name of letters, digits, '-' and '_'";
            return Err(SchemaError::value(expected, &Value::String(name.clone())).under("pools"));
        }
        match self.stemcell_pool.as_ref().filter(|name| !self.pools.contains_key(*name)) {
            None => Ok(()),
            Some(name) => {
                let expected = "the name of one of 'pools'";
                let error = SchemaError::value(expected, &Value::String(name.clone()));
                Err(error.under("stemcell_pool"))
            }
        }
    }
}

/// Refuses a host that is this process, and one with the name of an earlier host.
fn ensure_host_valid(host: &HostEntry, earlier: &[HostEntry]) -> Result<(), SchemaError> {
    host.transport.ensure_valid().map_err(|e| e.under("transport"))?;
    if host.transport.kind == TransportKind::Local {
        let expected = "\"ssh\", or \"unix\" for this machine";
        return Err(refused("transport.kind", expected, "\"local\"".to_owned()));
    }
    if earlier.iter().any(|other| other.name == host.name) {
        let found = format!("\"{}\", which is the name of another host", host.name);
        return Err(refused("name", "a name of its own", found));
    }
    Ok(())
}

/// Refuses ports of a protocol without ports.
fn ensure_rule_valid(rule: &GroupRule) -> Result<(), SchemaError> {
    if rule.ports.is_none() || rule.protocol.has_ports() {
        return Ok(());
    }
    let expected = "ports only with \"tcp\", \"udp\" or \"sctp\"";
    let protocol = serde_json::to_value(rule.protocol).unwrap_or_default();
    Err(refused("ports", expected, format!("ports with {protocol}")))
}

fn refused(key: &str, expected: &'static str, found: String) -> SchemaError {
    SchemaError { path: key.to_owned(), problem: Problem::Value { expected, found } }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::schema::Property;

    #[test]
    fn more_hosts_than_the_limit_are_refused() {
        let hosts = |count: usize| {
            let host = |n| json!({"name": format!("h{n}"), "transport": {"kind": "unix"}});
            let hosts: Vec<_> = (0..count).map(host).collect();
            Config::from_json(&json!({"hosts": hosts})).and_then(Config::validated)
        };
        assert!(hosts(MAX_HOSTS).is_ok());
        let error = hosts(MAX_HOSTS + 1).unwrap_err().to_string();
        assert_eq!(error, "hosts: expected at most 512 hosts, got 513");
    }
}
