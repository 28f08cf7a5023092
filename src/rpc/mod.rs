//! The Director's side of the door: one JSON request on stdin, one JSON answer on stdout.
//!
//! ```text
//!  stdin ──▶ request ──▶ call (typed arguments) ──▶ cpi::Verbs ──▶ response ──▶ outlet ──▶ stdout
//!            read to      refused here, before        acts          one JSON     written once;
//!            EOF first    anything is touched                       object       gone? undo a create
//! ```
//!
//! `rpc` owns the form of requests and answers and the names of errors; it knows no state, no host and no
//! configuration. Whatever goes wrong, panics included, becomes an answer with `result`, `error` and `log`.

pub mod arguments;
pub mod call;
#[cfg(test)]
mod fake;
pub mod outlet;
pub mod request;
pub mod response;

use std::io::Read;
use std::time::Instant;

use serde_json::{Value, json};
use tracing::{error, info, info_span, warn};

use crate::cpi::verbs::Verbs;
use crate::crash;
use crate::error::{Error, Result};
use crate::schema::printable;
use call::{Call, Success};
use outlet::Outlet;
use request::Request;
use response::Response;

/// Image formats that `create_stemcell` takes, as stemcells and bosh-cli name them. `qemu-light` is ours: its
/// cloud properties point to an image on the host.
pub const STEMCELL_FORMATS: [&str; 3] = ["openstack-qcow2", "openstack-raw", "qemu-light"];

/// Answers the one request in `input` on `outlet`. `verbs` is asked for only when something is to be done: neither
/// `info` nor a malformed request needs a configuration.
///
/// Panics are answered, too, which makes this the last a process does.
pub fn serve(input: impl Read, outlet: Outlet, verbs: impl FnOnce(&Request) -> Result<Box<dyn Verbs>>) {
    answer(input, &outlet.answer_panics(), verbs);
}

fn answer(input: impl Read, outlet: &Outlet, verbs: impl FnOnce(&Request) -> Result<Box<dyn Verbs>>) {
    let response = match admit(input, verbs) {
        Ok(Admitted::Info) => Response::success(&info()),
        Ok(Admitted::Call { request, call, verbs }) => return carry_out(&request, *call, verbs.as_ref(), outlet),
        Err(error) => Response::failure(&error),
    };
    // Nothing was done, so nothing is lost with the answer, and no log is up to say so.
    let _ = outlet.send(&response);
}

/// The result of `info`: what this program can do, whatever the state of its host. It is asked with any API version
/// or none, being how the version is found.
fn info() -> Value {
    json!({"api_version": request::API_VERSIONS.end(), "stemcell_formats": STEMCELL_FORMATS})
}

enum Admitted {
    Info,
    Call { request: Request, call: Box<Call>, verbs: Box<dyn Verbs> },
}

fn admit(input: impl Read, verbs: impl FnOnce(&Request) -> Result<Box<dyn Verbs>>) -> Result<Admitted> {
    let request = Request::parse(&request::read(input)?)?;
    if request.method == "info" {
        return Ok(Admitted::Info);
    }
    let named = |error: Error| error.during(printable(&request.method));
    let call = Box::new(Call::parse(&request).map_err(named)?);
    let verbs = verbs(&request).map_err(named)?;
    Ok(Admitted::Call { request, call, verbs })
}

/// Runs `call`, answers, and undoes a create whose answer reached nobody: without its cid nobody can delete it.
/// An answer that the pipe took and nobody read looks like any other.
fn carry_out(request: &Request, call: Call, verbs: &dyn Verbs, outlet: &Outlet) {
    let _call = info_span!("call", method = request.method, request_id = request.context.request_id()).entered();
    let begin = Instant::now();
    let outcome = call.run(verbs).map_err(|error| error.during(printable(&request.method)));
    let elapsed_ms = begin.elapsed().as_millis();
    let (response, undo) = match outcome {
        Ok(Success { result, undo }) => {
            info!(elapsed_ms, "done");
            (Response::success(&*result), undo)
        }
        Err(failure) => {
            let response = Response::failure(&failure);
            warn!(elapsed_ms, error = response.error_type(), "{}", one_line(&failure));
            (response, None)
        }
    };
    crash::point!("done, not answered");
    let Err(unanswered) = outlet.send(&response) else {
        return undo.iter().for_each(|undo| undo.is_void(verbs));
    };
    warn!("nobody took the answer: {unanswered}");
    let Some(undo) = undo else { return };
    match undo.run(verbs) {
        Ok(()) => warn!("undone: {undo}"),
        Err(failure) => error!("not undone: {undo}: {}", one_line(&failure)),
    }
}

fn one_line(error: &Error) -> String {
    error.report().replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::rc::Rc;

    use super::*;
    use crate::error::ErrorKind;
    use fake::{Calls, Fake};

    /// The answer to `request`, and what was done for it.
    fn ask(request: &str) -> (Value, Calls) {
        let (mut caller, cpi) = UnixStream::pair().unwrap();
        let calls = Calls::default();
        let verbs = Fake::new(calls.clone());
        answer(request.as_bytes(), &Outlet::new(File::from(OwnedFd::from(cpi))), |_| Ok(Box::new(verbs)));
        let mut text = String::new();
        caller.read_to_string(&mut text).unwrap();
        (serde_json::from_str(&text).unwrap(), calls)
    }

    #[test]
    fn a_call_is_carried_out_and_answered() {
        let (answer, calls) = ask(r#"{"method":"has_vm","arguments":["vm-1"],"context":{},"api_version":2}"#);
        assert_eq!(answer, json!({"result": true, "error": null, "log": ""}));
        assert_eq!(calls.take(), ["has_vm vm-1"]);
    }

    #[test]
    fn info_and_what_is_malformed_ask_for_nothing() {
        for request in [
            r#"{"method":"info","arguments":[]}"#,
            r#"{"method":"info","arguments":["x"],"api_version":1,"context":{"vm":7}}"#,
            r#"{"method":"has_vm","arguments":["../x"]}"#,
            "nonsense",
        ] {
            let asked = Rc::new(Cell::new(false));
            let (mut caller, cpi) = UnixStream::pair().unwrap();
            answer(request.as_bytes(), &Outlet::new(File::from(OwnedFd::from(cpi))), |_| {
                asked.set(true);
                Err(Error::new(ErrorKind::BadConfig, "no configuration"))
            });
            let mut text = String::new();
            caller.read_to_string(&mut text).unwrap();
            let answer: Value = serde_json::from_str(&text).unwrap();
            assert!(!asked.get(), "{request}");
            assert_eq!(answer["error"].is_null(), request.contains("info"), "{answer}");
        }
    }

    #[test]
    fn info_says_what_both_callers_want() {
        let (answer, _) = ask(r#"{"method":"info","arguments":[],"api_version":1}"#);
        let formats = ["openstack-qcow2", "openstack-raw", "qemu-light"];
        assert_eq!(answer["result"], json!({"api_version": 3, "stemcell_formats": formats}));
    }

    #[test]
    fn an_error_names_the_method_and_the_argument() {
        let (answer, calls) = ask(r#"{"method":"attach_disk","arguments":["vm-1","a/b"]}"#);
        let error = &answer["error"];
        assert_eq!(error["type"], "Bosh::Clouds::CpiError");
        let expected = "attach_disk: argument 2, disk_cid: character '/' at position 1 is not allowed";
        assert!(error["message"].as_str().unwrap().starts_with(expected), "{error}");
        let (answer, _) = ask(r#"{"method":"snapshot_disk","arguments":["disk-1",{}]}"#);
        assert_eq!(answer["error"]["message"], "snapshot_disk: snapshots are not implemented");
        assert!(calls.take().is_empty());
    }

    #[test]
    fn a_create_nobody_hears_of_is_undone() {
        for (request, expected) in [
            (r#"{"method":"create_disk","arguments":[1,{}]}"#, ["create_disk 1 MiB", "delete_disk disk-new"]),
            (
                r#"{"method":"create_stemcell","arguments":["/x",null]}"#,
                ["create_stemcell /x", "delete_stemcell stemcell-new"],
            ),
            (r#"{"method":"create_vm","arguments":["a","s-1",{},{},[],{}]}"#, ["create_vm a", "delete_vm vm-new"]),
        ] {
            let (caller, cpi) = UnixStream::pair().unwrap();
            drop(caller);
            let calls = Calls::default();
            let verbs = Fake::new(calls.clone());
            answer(request.as_bytes(), &Outlet::new(File::from(OwnedFd::from(cpi))), |_| Ok(Box::new(verbs)));
            assert_eq!(calls.take(), expected);
        }
    }

    #[test]
    fn what_makes_nothing_is_not_undone() {
        let (caller, cpi) = UnixStream::pair().unwrap();
        drop(caller);
        let calls = Calls::default();
        let verbs = Fake::new(calls.clone());
        let request = r#"{"method":"attach_disk","arguments":["vm-1","disk-1"]}"#;
        answer(request.as_bytes(), &Outlet::new(File::from(OwnedFd::from(cpi))), |_| Ok(Box::new(verbs)));
        assert_eq!(calls.take(), ["attach_disk vm-1 disk-1"]);
    }
}
