//! Replay of requests that a real bosh-cli and a real Director sent, flow by flow.
//!
//! A flow uses objects of earlier flows, so the replay creates those first. Recorded cids are
//! mapped to the cids of the replay.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::remote::Pair;
use crate::support::answer::Answer;
use crate::support::host::Host;
use crate::support::remote::{Director, SocketUnit};

/// Positions and kinds of the cids in the arguments of each method. create_vm also has a list of
/// disks.
fn cids(method: &str) -> &'static [(usize, &'static str)] {
    match method {
        "create_vm" => &[(1, "sc")],
        "create_disk" => &[(2, "vm")],
        "delete_vm" | "has_vm" | "reboot_vm" | "set_vm_metadata" => &[(0, "vm")],
        "attach_disk" | "detach_disk" => &[(0, "vm"), (1, "disk")],
        "delete_disk" | "has_disk" | "set_disk_metadata" | "resize_disk" | "snapshot_disk" => {
            &[(0, "disk")]
        }
        "delete_stemcell" => &[(0, "sc")],
        _ => &[],
    }
}

/// Replay of a flow.
pub struct Flow<'a> {
    host: &'a Host,
    /// Sends a request to the CPI.
    ask: &'a dyn Fn(&str) -> Answer,
    /// Cids of the replay by recorded cid.
    ours: BTreeMap<String, Value>,
    /// Memory of its VMs, MiB. Several recorded VMs with half a GiB would use all of the machine's
    /// memory.
    ram: u64,
}

/// Actions of the agents of the flow's VMs between the calls.
pub trait Agents {
    /// Runs before a call. `arguments` have the cids of the replay.
    fn before(&mut self, method: &str, arguments: &Value);
    /// Runs after a successful call.
    fn after(&mut self, method: &str, arguments: &Value, result: &Value);
}

/// Agents of guests without one.
struct NoAgents;

impl Agents for NoAgents {
    fn before(&mut self, _: &str, _: &Value) {}
    fn after(&mut self, _: &str, _: &Value, _: &Value) {}
}

impl<'a> Flow<'a> {
    /// A replay on a host that has the bridges of the recording.
    pub fn new(host: &'a Host, ask: &'a dyn Fn(&str) -> Answer, ram: u64) -> Self {
        Self { host, ask, ours: BTreeMap::new(), ram }
    }

    /// Maps a recorded cid to an existing object.
    pub fn knows(mut self, recorded: &str, ours: &impl ToString) -> Self {
        self.ours.insert(recorded.to_owned(), json!(ours.to_string()));
        self
    }

    /// Replays the recording `name`.
    pub fn replay(mut self, name: &str, agents: &mut dyn Agents) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join(format!("tests/fixtures/requests/{name}.jsonl"));
        for line in fs::read_to_string(path).unwrap().lines() {
            let recorded: Value = serde_json::from_str(line).unwrap();
            let (method, answer) = self.ask(&recorded, agents);
            check(&method, &recorded["request"], &answer);
            if matches!(method.as_str(), "has_vm" | "has_disk") {
                assert_eq!(*answer.result(), recorded["response"]["result"], "{line}");
            }
        }
    }

    /// Replaces a recorded cid by one of the replay. Creates the object if this flow has not.
    fn replace(&mut self, recorded: &mut Value, kind: &str, exists: bool) {
        let Some(name) = recorded.as_str().map(str::to_owned) else { return };
        if !self.ours.contains_key(&name) {
            let cid = match kind {
                _ if !exists => json!(format!("{kind}-vanished")),
                "sc" => json!(self.host.stemcell()),
                "disk" => json!(self.host.disk()),
                _ => json!(self.host.vm(&self.host.stemcell())),
            };
            self.ours.insert(name.clone(), cid);
        }
        *recorded = self.ours[&name].clone();
    }

    /// Sends a recorded request, unchanged except for cids, the stemcell's path and the memory.
    fn ask(&mut self, recorded: &Value, agents: &mut dyn Agents) -> (String, Answer) {
        let (mut request, response) = (recorded["request"].clone(), &recorded["response"]);
        let method = request["method"].as_str().unwrap().to_owned();
        let arguments = &mut request["arguments"];
        let vanished = response["error"]["type"] == "Bosh::Clouds::VMNotFound"
            || response["result"] == json!(false);
        for (position, kind) in cids(&method) {
            self.replace(&mut arguments[position], kind, !vanished);
        }
        match method.as_str() {
            "create_stemcell" => {
                self.host.ok("delete_stemcell", &json!([self.host.stemcell()]));
                arguments[0] = json!(self.host.path("image"));
            }
            "create_vm" => {
                let disks = arguments[4].as_array_mut().unwrap();
                disks.iter_mut().for_each(|disk| self.replace(disk, "disk", true));
                arguments[2]["ram"] = json!(self.ram);
            }
            "detach_disk" => {
                // The disk may have been attached by an earlier flow.
                self.host.ok("attach_disk", arguments);
            }
            _ => {}
        }
        agents.before(&method, arguments);
        let answer = (self.ask)(&request.to_string());
        self.host.track_vms(&answer.stdout);
        if let Ok(result) = &answer.outcome {
            agents.after(&method, &request["arguments"], result);
        }
        if method.starts_with("create_")
            && let (Ok(result), Some(was)) = (&answer.outcome, created(&response["result"]))
        {
            self.ours.insert(was.as_str().unwrap().to_owned(), created(result).unwrap().clone());
        }
        (method, answer)
    }
}

/// The cid in the result of a create. That of create_vm also has networks.
fn created(result: &Value) -> Option<&Value> {
    result.get(0).or(Some(result)).filter(|cid| cid.is_string())
}

/// Asserts that the answer has the shape that clients expect of the method.
fn check(method: &str, request: &Value, answer: &Answer) {
    let shown = || format!("{method}: {answer:?}");
    match method {
        "info" => assert!(answer.result()["stemcell_formats"].is_array(), "{}", shown()),
        "create_stemcell" | "create_disk" | "snapshot_disk" => {
            assert!(answer.result().is_string(), "{}", shown());
        }
        "create_vm" => {
            assert!(answer.result()[0].is_string(), "{}", shown());
            let (given, networks) = (&request["arguments"][3], &answer.result()[1]);
            let names =
                |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
            assert_eq!(names(given), names(networks), "{}", shown());
        }
        "has_vm" | "has_disk" => assert!(answer.result().is_boolean(), "{}", shown()),
        "attach_disk" => {
            let path = answer.result()["path"].as_str().expect("a hint");
            assert!(path.starts_with("/dev/disk/by-id/virtio-disk-"), "{}", shown());
        }
        _ => assert_eq!(*answer.result(), Value::Null, "{}", shown()),
    }
}

fn replay(name: &str, host: &Host, ask: &dyn Fn(&str) -> Answer) {
    host.bridge("br0");
    host.bridge("br1");
    Flow::new(host, ask, 64).replay(name, &mut NoAgents);
}

macro_rules! flows {
    ($($test:ident = $name:literal;)*) => {
        $(
            #[test]
            fn $test() {
                let Some(host) = Host::new() else { return };
                replay($name, &host, &|request| host.ask(request));
            }
        )*

        mod through_ssh {
            use super::*;

            $(
                #[test]
                fn $test() {
                    let Some(Pair { host, director, sshd: _sshd }) = Pair::new() else { return };
                    replay($name, &host, &|request| director.ask(request));
                }
            )*
        }

        mod through_a_socket {
            use super::*;

            $(
                #[test]
                fn $test() {
                    let Some(host) = Host::new() else { return };
                    let Some(director) = Director::new() else { return };
                    let socket = SocketUnit::start(&director, &host);
                    director.configure(&json!({"transport": socket.transport()}));
                    replay($name, &host, &|request| director.ask(request));
                }
            )*
        }

        #[test]
        fn replay_list_names_every_recorded_flow() {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/requests");
            let files = fs::read_dir(dir).unwrap().map(|file| file.unwrap().path());
            let mut recorded: Vec<_> = files
                .map(|file| file.file_stem().unwrap().to_string_lossy().into_owned())
                .collect();
            recorded.sort();
            assert_eq!(recorded, [$($name),*]);
        }
    };
}

flows! {
    replay_create_env_bigger_disk_succeeds = "create-env-bigger-disk";
    replay_create_env_multi_network_succeeds = "create-env-multi-network";
    replay_create_env_new_succeeds = "create-env-new";
    replay_create_env_recreate_succeeds = "create-env-recreate";
    replay_create_env_vm_vanished_succeeds = "create-env-vm-vanished";
    replay_delete_env_succeeds = "delete-env";
    replay_director_cck_auto_succeeds = "director-cck-auto";
    replay_director_cpi_config_succeeds = "director-cpi-config";
    replay_director_deploy_succeeds = "director-deploy";
    replay_director_hotswap_succeeds = "director-hotswap";
    replay_director_recreate_succeeds = "director-recreate";
    replay_director_resize_succeeds = "director-resize";
}
