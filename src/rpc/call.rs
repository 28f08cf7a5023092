//! The acting methods of the CPI contract: parses a request into a typed call and runs the call.

use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value};

use crate::cid::{Cid, DiskCid, NetworkCid, SnapshotCid, StemcellCid, VmCid};
use crate::cpi::contract::{
    CloudProperties, Contract, CreateDisk, CreateStemcell, CreateVm, CreatedNetwork, Metadata,
    VmResources,
};
use crate::error::{Error, ErrorKind, Result};
use crate::rpc::arguments::Arguments;
use crate::rpc::request::Request;
pub use crate::rpc::undo::Undo;
use crate::schema::printable;
use crate::units::MiB;

/// One method of [`Contract`] with its arguments.
#[derive(Debug)]
#[allow(missing_docs, reason = "each is the method of `Contract` with the same name")]
pub enum Call {
    CreateStemcell(CreateStemcell),
    DeleteStemcell(StemcellCid),
    CreateVm(Box<CreateVm>),
    DeleteVm(VmCid),
    HasVm(VmCid),
    RebootVm(VmCid),
    SetVmMetadata(VmCid, Metadata),
    CalculateVmCloudProperties(VmResources),
    CreateDisk(CreateDisk),
    DeleteDisk(DiskCid),
    HasDisk(DiskCid),
    AttachDisk(VmCid, DiskCid),
    DetachDisk(VmCid, DiskCid),
    GetDisks(VmCid),
    SetDiskMetadata(DiskCid, Metadata),
    SnapshotDisk(DiskCid, Metadata),
    DeleteSnapshot(SnapshotCid),
    ResizeDisk(DiskCid, MiB),
    UpdateDisk(DiskCid, MiB, CloudProperties),
    CreateNetwork(Map<String, Value>),
    DeleteNetwork(NetworkCid),
}

/// The outcome of a call that succeeded.
#[derive(Debug)]
pub struct Success {
    /// The response's `result`.
    pub result: Box<RawValue>,
    /// For a create: how to undo it if the response does not reach the caller.
    pub undo: Option<Undo>,
}

impl Call {
    /// Parses method and arguments of `request`.
    ///
    /// # Errors
    /// [`ErrorKind::BadRequest`] for a wrong argument, [`ErrorKind::NotSupported`] for an API
    /// version that the CPI does not support, and [`ErrorKind::NotImplemented`] for an unknown
    /// method.
    pub fn parse(request: &Request) -> Result<Self> {
        request.check_versions()?;
        let mut arguments = Arguments::of(request);
        let call = Self::read(&request.method, &mut arguments)?;
        arguments.finish()?;
        Ok(call)
    }

    fn read(method: &str, a: &mut Arguments<'_>) -> Result<Self> {
        Ok(match method {
            "create_stemcell" => Self::CreateStemcell(create_stemcell(a)?),
            "delete_stemcell" => Self::DeleteStemcell(a.cid("stemcell_cid")?),
            "create_vm" => Self::CreateVm(Box::new(create_vm(a)?)),
            "delete_vm" => Self::DeleteVm(a.cid("vm_cid")?),
            "has_vm" => Self::HasVm(a.cid("vm_cid")?),
            "reboot_vm" => Self::RebootVm(a.cid("vm_cid")?),
            "set_vm_metadata" => Self::SetVmMetadata(a.cid("vm_cid")?, a.metadata("metadata")?),
            "calculate_vm_cloud_properties" => {
                Self::CalculateVmCloudProperties(a.property("vm_resources")?)
            }
            "create_disk" => Self::CreateDisk(create_disk(a)?),
            "delete_disk" => Self::DeleteDisk(a.cid("disk_cid")?),
            "has_disk" => Self::HasDisk(a.cid("disk_cid")?),
            "attach_disk" => Self::AttachDisk(a.cid("vm_cid")?, a.cid("disk_cid")?),
            "detach_disk" => Self::DetachDisk(a.cid("vm_cid")?, a.cid("disk_cid")?),
            "get_disks" => Self::GetDisks(a.cid("vm_cid")?),
            "set_disk_metadata" => {
                Self::SetDiskMetadata(a.cid("disk_cid")?, a.metadata("metadata")?)
            }
            "snapshot_disk" => Self::SnapshotDisk(a.cid("disk_cid")?, a.metadata("metadata")?),
            "delete_snapshot" => Self::DeleteSnapshot(a.cid("snapshot_cid")?),
            "resize_disk" => Self::ResizeDisk(a.cid("disk_cid")?, a.property("new_size")?),
            "update_disk" => {
                Self::UpdateDisk(a.cid("disk_cid")?, a.property("new_size")?, cloud_properties(a)?)
            }
            "create_network" => Self::CreateNetwork(a.property("subnet")?),
            "delete_network" => Self::DeleteNetwork(a.cid("network_cid")?),
            "configure_networks" | "current_vm_id" | "ping" => {
                return Err(not_implemented(format!("no supported Director calls '{method}'")));
            }
            unknown => {
                return Err(not_implemented(format!("unknown method '{}'", printable(unknown))));
            }
        })
    }

    /// Chooses the cid of the object that the call creates, and returns the delete that undoes the
    /// create; `None` if the call creates nothing. With `host`, the name of one of several hosts,
    /// the cid has a tag that tells the host.
    pub fn choose_cid(&self, host: Option<&str>) -> Option<Undo> {
        fn new<C: Cid>(host: Option<&str>) -> C {
            host.map_or_else(C::random, C::random_on_host)
        }
        Some(match self {
            Self::CreateStemcell(_) => Undo::DeleteStemcell(new(host)),
            Self::CreateVm(_) => Undo::DeleteVm(new(host)),
            Self::CreateDisk(_) => Undo::DeleteDisk(new(host)),
            Self::SnapshotDisk(..) => Undo::DeleteSnapshot(new(host)),
            Self::CreateNetwork(_) => Undo::DeleteNetwork(new(host)),
            _ => return None,
        })
    }

    /// The cid of the object that the call is about: of the VM if it names a VM and a disk. `None`
    /// for a create.
    pub fn object(&self) -> Option<&str> {
        Some(match self {
            Self::DeleteStemcell(stemcell) => stemcell.as_str(),
            Self::DeleteVm(vm)
            | Self::HasVm(vm)
            | Self::RebootVm(vm)
            | Self::SetVmMetadata(vm, _)
            | Self::AttachDisk(vm, _)
            | Self::DetachDisk(vm, _)
            | Self::GetDisks(vm) => vm.as_str(),
            Self::DeleteDisk(disk)
            | Self::HasDisk(disk)
            | Self::SetDiskMetadata(disk, _)
            | Self::SnapshotDisk(disk, _)
            | Self::ResizeDisk(disk, _)
            | Self::UpdateDisk(disk, ..) => disk.as_str(),
            Self::DeleteSnapshot(snapshot) => snapshot.as_str(),
            Self::DeleteNetwork(network) => network.as_str(),
            Self::CreateStemcell(_)
            | Self::CreateVm(_)
            | Self::CreateDisk(_)
            | Self::CreateNetwork(_)
            | Self::CalculateVmCloudProperties(_) => return None,
        })
    }

    /// Calls the method of `verbs`.
    ///
    /// # Errors
    /// Those of the method.
    pub fn run(self, verbs: &dyn Contract) -> Result<Success> {
        match self {
            Self::CreateStemcell(stemcell) => {
                created(verbs.create_stemcell(stemcell)?, Undo::DeleteStemcell)
            }
            Self::DeleteStemcell(stemcell) => done(verbs.delete_stemcell(&stemcell)),
            Self::CreateVm(vm) => {
                let (cid, networks) = verbs.create_vm(*vm)?;
                // An array: from a plain string the Director would take the first character as the
                // cid.
                Ok(Success {
                    undo: Some(Undo::DeleteVm(cid.clone())),
                    ..answered(&(cid, networks))
                })
            }
            Self::DeleteVm(vm) => done(verbs.delete_vm(&vm)),
            Self::HasVm(vm) => verbs.has_vm(&vm).map(|has| answered(&has)),
            Self::RebootVm(vm) => done(verbs.reboot_vm(&vm)),
            Self::SetVmMetadata(vm, metadata) => done(verbs.set_vm_metadata(&vm, metadata)),
            Self::CalculateVmCloudProperties(resources) => verbs
                .calculate_vm_cloud_properties(resources)
                .map(|properties| answered(&properties)),
            Self::CreateDisk(disk) => created(verbs.create_disk(disk)?, Undo::DeleteDisk),
            Self::DeleteDisk(disk) => done(verbs.delete_disk(&disk)),
            Self::HasDisk(disk) => verbs.has_disk(&disk).map(|has| answered(&has)),
            Self::AttachDisk(vm, disk) => verbs.attach_disk(&vm, &disk).map(|hint| answered(&hint)),
            Self::DetachDisk(vm, disk) => done(verbs.detach_disk(&vm, &disk)),
            Self::GetDisks(vm) => verbs.get_disks(&vm).map(|disks| answered(&disks)),
            Self::SetDiskMetadata(disk, metadata) => done(verbs.set_disk_metadata(&disk, metadata)),
            Self::SnapshotDisk(disk, metadata) => {
                created(verbs.snapshot_disk(&disk, metadata)?, Undo::DeleteSnapshot)
            }
            Self::DeleteSnapshot(snapshot) => done(verbs.delete_snapshot(&snapshot)),
            Self::ResizeDisk(disk, size) => done(verbs.resize_disk(&disk, size)),
            Self::UpdateDisk(disk, size, properties) => {
                verbs.update_disk(&disk, size, properties).map(|new| answered(&new))
            }
            Self::CreateNetwork(subnet) => {
                let CreatedNetwork { cid, addresses, cloud_properties } =
                    verbs.create_network(subnet)?;
                let undo = Some(Undo::DeleteNetwork(cid.clone()));
                Ok(Success { undo, ..answered(&(cid, addresses, cloud_properties)) })
            }
            Self::DeleteNetwork(network) => done(verbs.delete_network(&network)),
        }
    }
}

fn create_stemcell(a: &mut Arguments<'_>) -> Result<CreateStemcell> {
    let (image, cloud_properties) = (a.property("image_path")?, cloud_properties(a)?);
    // API version 3 adds an object. The only key it defines is `tags`.
    let extra: Option<Map<String, Value>> = a.optional("extra")?;
    let tags = match extra.and_then(|mut extra| extra.remove("tags")) {
        Some(Value::Object(tags)) => tags,
        _ => Map::new(),
    };
    Ok(CreateStemcell { image, cloud_properties, tags })
}

fn create_vm(a: &mut Arguments<'_>) -> Result<CreateVm> {
    Ok(CreateVm {
        agent_id: a.agent_id("agent_id")?,
        stemcell: a.cid("stemcell_cid")?,
        cloud_properties: cloud_properties(a)?,
        networks: a.networks("networks")?,
        disks: a.cids("disk_cids")?,
        env: a.env("env")?,
    })
}

fn create_disk(a: &mut Arguments<'_>) -> Result<CreateDisk> {
    Ok(CreateDisk {
        size: a.property("size")?,
        cloud_properties: cloud_properties(a)?,
        vm: a.optional_cid("vm_cid")?,
    })
}

/// Reads cloud properties: null if the manifest has none.
fn cloud_properties(a: &mut Arguments<'_>) -> Result<CloudProperties> {
    a.optional("cloud_properties").map(Option::unwrap_or_default)
}

fn answered(result: &impl Serialize) -> Success {
    // Results are cids, booleans and maps with string keys, which always serialize.
    Success { result: to_raw_value(result).expect("a result is JSON"), undo: None }
}

fn created<T: Serialize + Clone>(cid: T, undo: impl FnOnce(T) -> Undo) -> Result<Success> {
    Ok(Success { undo: Some(undo(cid.clone())), ..answered(&cid) })
}

fn done(outcome: Result<()>) -> Result<Success> {
    outcome.map(|()| answered(&()))
}

fn not_implemented(message: String) -> Error {
    Error::new(ErrorKind::NotImplemented, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rpc::fake::{Calls, Fake};

    fn request(method: &str, arguments: &str) -> Request {
        Request::parse(&format!(r#"{{"method":"{method}","arguments":{arguments}}}"#)).unwrap()
    }

    /// The calls that the fake received, and the result.
    fn run(method: &str, arguments: &str) -> (Vec<String>, String) {
        let calls = Calls::default();
        let call = Call::parse(&request(method, arguments)).unwrap();
        let result = call.run(&Fake::new(calls.clone())).unwrap().result;
        (calls.take(), result.get().to_owned())
    }

    fn refusal(method: &str, arguments: &str) -> String {
        let error = Call::parse(&request(method, arguments)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadRequest, "{error}");
        error.report()
    }

    #[test]
    fn every_method_runs_and_its_result_has_the_contracts_shape() {
        for (method, arguments, call, result) in [
            ("create_stemcell", r#"["/i",{}]"#, "create_stemcell /i", r#""stemcell-new""#),
            ("delete_stemcell", r#"["sc-1"]"#, "delete_stemcell sc-1", "null"),
            (
                "create_vm",
                r#"["a","sc-1",{},{"n":{"type":"dynamic"}},["d-1"],{}]"#,
                "create_vm a",
                r#"["vm-new",{"n":{"type":"dynamic"}}]"#,
            ),
            ("delete_vm", r#"["vm-1"]"#, "delete_vm vm-1", "null"),
            ("has_vm", r#"["vm-1"]"#, "has_vm vm-1", "true"),
            ("reboot_vm", r#"["vm-1"]"#, "reboot_vm vm-1", "null"),
            (
                "set_vm_metadata",
                r#"["vm-1",{"index":"0"}]"#,
                r#"set_vm_metadata vm-1 {"index":"0"}"#,
                "null",
            ),
            (
                "calculate_vm_cloud_properties",
                r#"[{"ram":512,"cpu":2,"ephemeral_disk_size":1024}]"#,
                "calculate_vm_cloud_properties 512 MiB",
                r#"{"cpu":2}"#,
            ),
            ("create_disk", r#"[1024,{},"vm-1"]"#, "create_disk 1 GiB near vm-1", r#""disk-new""#),
            ("delete_disk", r#"["d-1"]"#, "delete_disk d-1", "null"),
            ("has_disk", r#"["d-1"]"#, "has_disk d-1", "false"),
            (
                "attach_disk",
                r#"["vm-1","d-1"]"#,
                "attach_disk vm-1 d-1",
                r#"{"path":"/dev/disk/by-id/virtio-d-1"}"#,
            ),
            ("detach_disk", r#"["vm-1","d-1"]"#, "detach_disk vm-1 d-1", "null"),
            ("get_disks", r#"["vm-1"]"#, "get_disks vm-1", r#"["disk-new"]"#),
            ("set_disk_metadata", r#"["d-1",{"a":1}]"#, r#"set_disk_metadata d-1 {"a":1}"#, "null"),
        ] {
            assert_eq!(run(method, arguments), (vec![call.to_owned()], result.to_owned()));
        }
    }

    #[test]
    fn optional_arguments_may_be_null_or_missing() {
        for (method, arguments, call) in [
            ("create_stemcell", r#"["/i",null]"#, "create_stemcell /i"),
            ("create_stemcell", r#"["/i"]"#, "create_stemcell /i"),
            ("create_stemcell", r#"["/i",{},{"tags":{}}]"#, "create_stemcell /i"),
            (
                "create_stemcell",
                r#"["/i",null,{"tags":{"a":"b"},"new":1}]"#,
                r#"create_stemcell /i {"a": String("b")}"#,
            ),
            ("create_disk", r#"[1,{},null]"#, "create_disk 1 MiB"),
            ("create_disk", r#"[1,null]"#, "create_disk 1 MiB"),
            ("create_vm", r#"["a","sc-1",null,{},[],{}]"#, "create_vm a"),
        ] {
            assert_eq!(run(method, arguments).0, [call]);
        }
    }

    #[test]
    fn a_refused_argument_is_named_by_position_and_name() {
        for (method, arguments, expected) in [
            ("has_vm", "[]", "argument 1, vm_cid: missing; expected a cid"),
            ("has_vm", "[null]", "argument 1, vm_cid: expected a cid, got null"),
            ("has_vm", r#"["vm-1","secret"]"#, "2 arguments given, 1 expected"),
            ("has_vm", r#"[{"a":"secret"}]"#, "argument 1, vm_cid: expected a cid, got an object"),
            ("has_vm", r#"[""]"#, "argument 1, vm_cid: must have 1 to 128 characters, has 0"),
            ("attach_disk", r#"["vm-1"]"#, "argument 2, disk_cid: missing; expected a cid"),
            (
                "create_disk",
                "[0,{}]",
                "argument 1, size: expected a whole number of MiB from 1 to 67108864, got 0",
            ),
            (
                "create_disk",
                "[-1,{}]",
                "argument 1, size: expected a whole number of MiB from 1 to 67108864, got -1",
            ),
            (
                "create_disk",
                "[1.5,{}]",
                "argument 1, size: expected a whole number of MiB from 1 to 67108864, got 1.5",
            ),
            (
                "create_disk",
                "[67108865,{}]",
                "argument 1, size: expected a whole number of MiB from 1 to 67108864, got 67108865",
            ),
            (
                "create_disk",
                r#"["1",{}]"#,
                "argument 1, size: expected a whole number of MiB from 1 to 67108864, got \"1\"",
            ),
            (
                "create_disk",
                r#"[1,"secret"]"#,
                "argument 2, cloud_properties: expected an object, got a string",
            ),
            ("create_disk", "[1,{},7]", "argument 3, vm_cid: expected a cid, got 7"),
            (
                "create_stemcell",
                r#"["image",{}]"#,
                "argument 1, image_path: expected an absolute path, got a string",
            ),
            (
                "create_stemcell",
                r#"["/i",{},[]]"#,
                "argument 3, extra: expected an object, got an array",
            ),
            (
                "create_vm",
                r#"["a b","s",{},{},[],{}]"#,
                "argument 1, agent_id: expected 1 to 128 letters, digits, '-', '_' and '.', \
                 got a string",
            ),
            (
                "create_vm",
                r#"["a","s",{},[],[],{}]"#,
                "argument 4, networks: expected an object, got an array",
            ),
            (
                "create_vm",
                r#"["a","s",{},{"n":{"type":"vip"}},[],{}]"#,
                "argument 4, networks.n.ip: missing; expected an IP address of a host",
            ),
            (
                "create_vm",
                r#"["a","s",{},{},null,{}]"#,
                "argument 5, disk_cids: expected an array of cids, got null",
            ),
            (
                "create_vm",
                r#"["a","s",{},{},["d",7],{}]"#,
                "argument 5, disk_cids.1: expected a cid, got 7",
            ),
            (
                "create_vm",
                r#"["a","s",{},{},[],"secret"]"#,
                "argument 6, env: expected an object, got a string",
            ),
            ("create_vm", r#"["a","s",{},{},[]]"#, "argument 6, env: missing; expected an object"),
            ("set_vm_metadata", r#"["vm-1"]"#, "argument 2, metadata: missing; expected an object"),
            (
                "set_vm_metadata",
                r#"["vm-1",null]"#,
                "argument 2, metadata: expected an object, got null",
            ),
            (
                "calculate_vm_cloud_properties",
                r#"[{"ram":1,"cpu":1}]"#,
                "argument 1, vm_resources.ephemeral_disk_size: missing; \
                 expected a whole number of MiB from 1 to 67108864",
            ),
        ] {
            assert_eq!(refusal(method, arguments), expected);
        }
    }

    #[test]
    fn missing_methods_fail_with_the_kinds_that_callers_act_on() {
        let kind = |method: &str, arguments: &str| {
            let run = |call: Call| call.run(&Fake::new(Calls::default()));
            Call::parse(&request(method, arguments)).and_then(run).unwrap_err().kind()
        };
        for method in ["ping", "current_vm_id", "configure_networks", "no_such_method", ""] {
            assert_eq!(kind(method, "[]"), ErrorKind::NotImplemented, "{method}");
        }
        for (method, arguments) in [
            ("snapshot_disk", r#"["d-1",{"index":0}]"#),
            ("delete_snapshot", r#"["snap-1"]"#),
            ("create_network", r#"[{"type":"manual"}]"#),
            ("delete_network", r#"["net-1"]"#),
        ] {
            assert_eq!(kind(method, arguments), ErrorKind::NotImplemented, "{method}");
        }
        assert_eq!(kind("resize_disk", r#"["d-1",2048]"#), ErrorKind::NotSupported);
        assert_eq!(kind("update_disk", r#"["d-1",2048,{}]"#), ErrorKind::NotSupported);
    }

    #[test]
    fn the_methods_of_the_configuration_are_those_of_the_contract() {
        // `info` has no arguments and is no Call.
        for method in crate::config::METHODS.iter().filter(|method| **method != "info") {
            let refused = Call::parse(&request(method, "[]")).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::BadRequest, "{method}");
        }
    }

    #[test]
    fn an_argument_over_its_bound_is_refused_with_the_bound() {
        let list = |count, item: &dyn Fn(usize) -> String| {
            (0..count).map(item).collect::<Vec<_>>().join(",")
        };
        let tags = |count| list(count, &|n| format!(r#""t{n}":"x""#));
        let networks = |count| list(count, &|n| format!(r#""n{n}":{{"type":"dynamic"}}"#));
        let disks = |count| list(count, &|n| format!(r#""disk-{n}""#));
        let long = |bytes| format!(r#"{{"a":"{}"}}"#, "x".repeat(bytes));
        let create_vm = |properties: &str, networks: &str, disks: &str, env: &str| {
            let networks = format!("{{{networks}}}");
            format!(r#"["a","s-1",{properties},{networks},[{disks}],{env}]"#)
        };
        let kib_65 = long(65 << 10);
        let mib_5 = long(5 << 20);
        let with_long = format!(r#""n":{{"type":"dynamic","x":{mib_5}}}"#);
        for (method, arguments, expected) in [
            (
                "set_vm_metadata",
                format!(r#"["vm-1",{kib_65}]"#),
                "argument 2, metadata: has 66568 bytes, the limit is 65536",
            ),
            (
                "set_disk_metadata",
                format!(r#"["d-1",{{{}}}]"#, tags(1001)),
                "argument 2, metadata: has 1001 entries, the limit is 1000",
            ),
            (
                "snapshot_disk",
                format!(r#"["d-1",{{{}}}]"#, tags(1001)),
                "argument 2, metadata: has 1001 entries, the limit is 1000",
            ),
            (
                "create_disk",
                format!("[1,{kib_65}]"),
                "argument 2, cloud_properties: has 66568 bytes, the limit is 65536",
            ),
            (
                "create_stemcell",
                format!(r#"["/i",{{}},{{"tags":{kib_65}}}]"#),
                "argument 3, extra: has 66577 bytes, the limit is 65536",
            ),
            (
                "create_network",
                format!("[{kib_65}]"),
                "argument 1, subnet: has 66568 bytes, the limit is 65536",
            ),
            (
                "create_vm",
                create_vm(&kib_65, "", "", "{}"),
                "argument 3, cloud_properties: has 66568 bytes, the limit is 65536",
            ),
            (
                "create_vm",
                create_vm("{}", &networks(65), "", "{}"),
                "argument 4, networks: has 65 entries, the limit is 64",
            ),
            (
                "create_vm",
                create_vm("{}", &with_long, "", "{}"),
                "argument 4, networks: has 5242917 bytes, the limit is 4194304",
            ),
            (
                "create_vm",
                create_vm("{}", "", &disks(257), "{}"),
                "argument 5, disk_cids: has 257 entries, the limit is 256",
            ),
            (
                "create_vm",
                create_vm("{}", "", "", &mib_5),
                "argument 6, env: has 5242888 bytes, the limit is 4194304",
            ),
        ] {
            assert_eq!(refusal(method, &arguments), expected);
        }
        for (method, arguments) in [
            ("set_disk_metadata", format!(r#"["d-1",{{{}}}]"#, tags(1000))),
            ("create_vm", create_vm("{}", &networks(64), &disks(256), &long(1 << 19))),
        ] {
            assert!(Call::parse(&request(method, &arguments)).is_ok(), "{method}");
        }
    }

    #[test]
    fn a_hostile_method_name_is_cut_and_escaped() {
        let error = Call::parse(&request(&("\\u001b\\n".to_owned() + &"x".repeat(9000)), "[]"))
            .unwrap_err()
            .report();
        assert!(error.starts_with(r"unknown method '\u{1b}\nxxx") && error.len() < 150, "{error}");
    }
}
