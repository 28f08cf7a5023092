//! The agent's settings document (bosh-agent `settings/settings.go`, bosh-cpi-go
//! `apiv1/agent_env.go`).
//!
//! It contains private keys and password hashes, so it is written to the config drive only.

use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use crate::config;

/// The values in one VM's settings.
#[derive(Clone, Copy)]
pub struct SettingsInput<'a> {
    /// create_vm's first argument. It becomes the hostname and the message bus subject.
    pub agent_id: &'a str,
    /// The VM's cid.
    pub vm: &'a str,
    /// create_vm's networks as received, with the `mac` of each NIC added.
    pub networks: &'a RawValue,
    /// Serial of the ephemeral disk. Without one the agent creates partitions behind the root
    /// filesystem.
    pub ephemeral: Option<&'a str>,
    /// create_vm's last argument, forwarded byte for byte.
    pub env: &'a RawValue,
}

#[derive(Serialize)]
struct Settings<'a> {
    agent_id: &'a str,
    vm: Vm<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mbus: Option<&'a str>,
    ntp: &'a [String],
    blobstore: Map<String, Value>,
    networks: &'a RawValue,
    disks: Disks,
    env: &'a RawValue,
}

#[derive(Serialize)]
struct Vm<'a> {
    name: &'a str,
    id: &'a str,
}

#[derive(Serialize)]
struct Disks {
    /// The agent requires a string to parse the document, but never uses the value.
    system: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    ephemeral: Option<Value>,
    /// Always empty: attach_disk's hint announces persistent disks, and a second entry here stops
    /// an agent that reboots.
    persistent: Map<String, Value>,
}

/// Serializes the settings document for the config drive.
pub fn to_json(input: SettingsInput<'_>, agent: &config::Agent) -> Vec<u8> {
    let settings = Settings {
        agent_id: input.agent_id,
        vm: Vm { name: input.vm, id: input.vm },
        mbus: agent.mbus.0.as_deref(),
        ntp: &agent.ntp,
        blobstore: blobstore(&agent.blobstore.0),
        networks: input.networks,
        disks: Disks {
            system: "/dev/vda",
            ephemeral: input.ephemeral.map(|serial| json!({"path": device_path(serial)})),
            persistent: Map::new(),
        },
        env: input.env,
    };
    serde_json::to_vec(&settings).expect("settings are plain data")
}

/// Path of the virtio disk with this serial in the guest, made by udev. It does not change with a
/// reboot or with the order of plugging. It is also attach_disk's hint, and every agent accepts it
/// as a path.
pub fn device_path(serial: &str) -> String {
    format!("/dev/disk/by-id/virtio-{serial}")
}

/// The blobstore for the agent, which does not start without one. `env.bosh.blobstores` takes
/// precedence, so where the operator configures none, the agent's local store does no harm.
fn blobstore(configured: &Map<String, Value>) -> Map<String, Value> {
    if !configured.is_empty() {
        return configured.clone();
    }
    let options = json!({"blobstore_path": "/var/vcap/micro_bosh/data/cache"});
    let local = json!({"provider": "local", "options": options});
    local.as_object().cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::schema::Property;

    fn made(agent: &Value, env: &str, ephemeral: Option<&str>) -> Value {
        let config = Config::from_json(&json!({"agent": agent})).unwrap();
        let networks = RawValue::from_string(
            r#"{"b":{"mac":"02:00:00:00:00:01"},"a":{"default":["gateway"]}}"#.into(),
        );
        let env = RawValue::from_string(env.into()).unwrap();
        let input = SettingsInput {
            agent_id: "agent-1",
            vm: "vm-1",
            networks: &networks.unwrap(),
            ephemeral,
            env: &env,
        };
        let bytes = to_json(input, &config.agent);
        let text = String::from_utf8(bytes).unwrap();
        assert!(text.contains(env.get()), "env is forwarded byte for byte");
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn settings_have_all_an_agent_needs() {
        let env = r#"{"bosh":{"password":"*","unknown":null},"big":12345678901234567890}"#;
        let settings =
            made(&json!({"mbus": "nats://10.0.0.6:4222", "ntp": ["t"]}), env, Some("eph-1"));
        assert_eq!(settings["agent_id"], "agent-1");
        assert_eq!(settings["vm"], json!({"name": "vm-1", "id": "vm-1"}));
        assert_eq!(settings["mbus"], "nats://10.0.0.6:4222");
        assert_eq!(settings["disks"]["system"], "/dev/vda");
        assert_eq!(settings["disks"]["ephemeral"], json!({"path": "/dev/disk/by-id/virtio-eph-1"}));
        assert_eq!(settings["disks"]["persistent"], json!({}));
        assert_eq!(settings["networks"]["a"]["default"], json!(["gateway"]));
    }

    #[test]
    fn optional_settings_are_omitted() {
        let settings = made(&json!({}), "{}", None);
        assert_eq!(settings.get("mbus"), None);
        assert_eq!(settings["disks"].get("ephemeral"), None);
        assert_eq!(settings["blobstore"]["provider"], "local");
    }

    #[test]
    fn configured_blobstore_is_used() {
        let settings = made(
            &json!({"blobstore": {"provider": "dav", "options": {"endpoint": "e"}}}),
            "{}",
            None,
        );
        assert_eq!(settings["blobstore"]["provider"], "dav");
    }
}
