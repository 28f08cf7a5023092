//! `vm list`, run and parsed.

use serde_json::Value;

use super::host::{Host, eventually};

/// Output of `vm list` with further arguments.
pub fn run_vm_list(host: &Host, words: &[&str]) -> String {
    let output =
        host.namespace().run(|| host.cpi().args(["vm", "list"]).args(words).output().unwrap());
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Output of `vm list --json`.
pub fn vm_list(host: &Host) -> Value {
    serde_json::from_str(&run_vm_list(host, &["--json"])).unwrap()
}

/// The same on a host where no QEMU hangs. On a busy host a healthy QEMU may miss the timeout, so
/// the command is repeated until every QEMU answers.
pub fn list_when_all_answer(host: &Host) -> Value {
    eventually("every QEMU answers", || {
        let listed = vm_list(host);
        listed.as_array().unwrap().iter().all(|line| line["state"] != "silent").then_some(listed)
    })
}
