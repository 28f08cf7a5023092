//! The settings document (bosh-agent `settings/settings.go`, bosh-cpi-go `apiv1/agent_env.go`).
//!
//! It holds private keys and password hashes: it is written to the config drive and nowhere else.

use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use crate::config;

/// What goes into one VM's settings.
#[derive(Clone, Copy)]
pub struct SettingsInput<'a> {
    /// create_vm's first argument; becomes the hostname and the message bus subject.
    pub agent_id: &'a str,
    /// The VM's cid.
    pub vm: &'a str,
    /// create_vm's networks with each NIC's `mac` added, everything else as received.
    pub networks: &'a RawValue,
    /// Serial of the ephemeral disk. Without one the agent makes partitions behind the root filesystem.
    pub ephemeral: Option<&'a str>,
    /// create_vm's last argument, forwarded to the letter.
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
    /// A string, or the agent can not read the document at all; what it says is never used.
    system: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    ephemeral: Option<Value>,
    /// Stays empty: persistent disks are announced by hint, and a second entry here stops a rebooting agent.
    persistent: Map<String, Value>,
}

/// The document for the config drive.
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

/// Where a guest's udev puts the virtio disk with this serial: the same after a reboot and in any order of plugging.
/// It is attach_disk's hint, too, and every agent understands it as a path.
pub fn device_path(serial: &str) -> String {
    format!("/dev/disk/by-id/virtio-{serial}")
}

/// An agent that is told of no blobstore does not start. `env.bosh.blobstores` wins over this one, so where the
/// operator configured none, the agent's own local store does no harm.
fn blobstore(configured: &Map<String, Value>) -> Map<String, Value> {
    if !configured.is_empty() {
        return configured.clone();
    }
    let local = json!({"provider": "local", "options": {"blobstore_path": "/var/vcap/micro_bosh/data/cache"}});
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
        assert!(text.contains(env.get()), "env is forwarded to the letter");
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn everything_an_agent_needs_is_there() {
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
    fn what_is_not_there_is_not_invented() {
        let settings = made(&json!({}), "{}", None);
        assert_eq!(settings.get("mbus"), None);
        assert_eq!(settings["disks"].get("ephemeral"), None);
        assert_eq!(settings["blobstore"]["provider"], "local");
    }

    #[test]
    fn a_configured_blobstore_is_kept() {
        let settings = made(
            &json!({"blobstore": {"provider": "dav", "options": {"endpoint": "e"}}}),
            "{}",
            None,
        );
        assert_eq!(settings["blobstore"]["provider"], "dav");
    }
}
