//! Checks of the configuration across several keys.

use serde_json::{Map, Value};

use super::{Config, GroupRule, HostEntry, TransportKind};
use crate::schema::{Problem, SchemaError, printable, suggest};

/// The longest `run_dir`, bytes. Socket paths below it then fit into the 107 bytes of unix(7).
const RUN_DIR_MAX: usize = 40;

/// The most hosts of a group: a query asks all of them at the same time, each in its own thread.
pub const MAX_HOSTS: usize = 512;

/// The methods of the contract, which `deadlines` may name.
pub const METHODS: &[&str] = &[
    "attach_disk",
    "calculate_vm_cloud_properties",
    "create_disk",
    "create_network",
    "create_stemcell",
    "create_vm",
    "delete_disk",
    "delete_network",
    "delete_snapshot",
    "delete_stemcell",
    "delete_vm",
    "detach_disk",
    "get_disks",
    "has_disk",
    "has_vm",
    "info",
    "reboot_vm",
    "resize_disk",
    "set_disk_metadata",
    "set_vm_metadata",
    "snapshot_disk",
    "update_disk",
];

/// A request's context without deadlines of methods that this version does not know: a newer
/// client sends them to every host.
pub fn without_unknown_deadlines(context: &Map<String, Value>) -> Map<String, Value> {
    let mut context = context.clone();
    if let Some(Value::Object(deadlines)) = context.get_mut("deadlines") {
        deadlines.retain(|method, _| METHODS.contains(&method.as_str()));
    }
    context
}

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
        self.ensure_deadlines_valid()?;
        self.ensure_subnets_valid()?;
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

    fn ensure_deadlines_valid(&self) -> Result<(), SchemaError> {
        let unknown = self.deadlines.keys().find(|name| !METHODS.contains(&name.as_str()));
        let Some(name) = unknown else { return Ok(()) };
        let problem = Problem::Unknown { suggestion: suggest(name, METHODS) };
        Err(SchemaError { path: printable(name), problem }.under("deadlines"))
    }

    /// Refuses a subnet of one address, as which an address without a prefix length is read: it has
    /// no room for a gateway and a VM.
    fn ensure_subnets_valid(&self) -> Result<(), SchemaError> {
        let subnets = self.networks.iter().filter_map(|(name, network)| {
            Some((format!("networks.{}.subnet", printable(name)), network.subnet?))
        });
        for (path, subnet) in subnets.chain([("managed_range".to_owned(), self.managed_range)]) {
            if subnet.prefix() == if subnet.is_ipv4() { 32 } else { 128 } {
                let found = format!("the one address {}", subnet.ip());
                return Err(refused(&path, "a subnet with a prefix length such as /24", found));
            }
        }
        Ok(())
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

    fn refusal(value: &Value) -> String {
        Config::from_json(value).and_then(Config::validated).unwrap_err().to_string()
    }

    #[test]
    fn deadline_of_an_unknown_method_is_refused_with_a_suggestion() {
        assert_eq!(
            refusal(&json!({"deadlines": {"craete_vm": 5}})),
            "deadlines.craete_vm: unknown key; did you mean 'create_vm'?"
        );
        let all: serde_json::Map<_, _> =
            METHODS.iter().map(|method| ((*method).to_owned(), json!(5))).collect();
        assert!(Config::from_json(&json!({"deadlines": all})).unwrap().validated().is_ok());
    }

    #[test]
    fn deadline_of_a_newer_clients_method_is_ignored_on_a_host() {
        let context = json!({"deadlines": {"fly_vm": 5, "create_vm": 6}, "vm_defaults": {}});
        let known = without_unknown_deadlines(context.as_object().unwrap());
        assert_eq!(json!(known), json!({"deadlines": {"create_vm": 6}, "vm_defaults": {}}));
    }

    #[test]
    fn subnet_without_a_prefix_length_is_refused() {
        for (config, path, address) in [
            (json!({"networks": {"a": {"subnet": "10.77.0.0"}}}), "networks.a.subnet", "10.77.0.0"),
            (json!({"networks": {"a": {"subnet": "fd00::"}}}), "networks.a.subnet", "fd00::"),
            (json!({"managed_range": "10.77.0.0/32"}), "managed_range", "10.77.0.0"),
        ] {
            let expected =
                "expected a subnet with a prefix length such as /24, got the one address";
            assert_eq!(refusal(&config), format!("{path}: {expected} {address}"));
        }
    }

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
