//! The Director's side of the door: one JSON request on stdin, one JSON answer on stdout.
//!
//! ```text
//!  stdin ──▶ request ──▶ call (typed arguments) ──▶ Executor ──▶ response ──▶ writer ──▶ stdout
//!            read to      refused here, before        acts        one JSON     written once;
//!            EOF first    anything is touched                     object       gone? undo a create
//! ```
//!
//! `rpc` owns the form of requests and answers and the names of errors; it knows no state, no host and no
//! configuration. Whatever goes wrong, panics included, becomes an answer with `result`, `error` and `log`.

pub mod arguments;
pub mod call;
#[cfg(test)]
mod fake;
mod local;
pub mod request;
pub mod response;
pub mod response_writer;

use std::io::Read;

use serde_json::{Value, json};

use crate::crash;
use crate::error::{Error, Result};
use crate::schema::printable;
use call::Call;
use request::Request;
use response::Response;
use response_writer::{Delivery, ResponseWriter};

pub use local::LocalExecutor;

/// Image formats that `create_stemcell` takes, as stemcells and bosh-cli name them. `qemu-light` is ours: its
/// cloud properties point to an image on the host.
pub const STEMCELL_FORMATS: [&str; 3] = ["openstack-qcow2", "openstack-raw", "qemu-light"];

/// Who carries calls out: the CPI of this host, or somebody who has one elsewhere do it.
pub trait Executor {
    /// Carries out `call`, which `request` is.
    fn execute(&self, request: &Request, call: Call) -> Executed<'_>;
}

/// What came of a call, before its caller hears of it.
pub struct Executed<'a> {
    /// The answer.
    pub response: Response,
    /// Whether something was made that nobody can delete who was not told of it.
    pub made: bool,
    /// Hears what became of the answer.
    pub on_delivery: Box<dyn FnOnce(Delivery) + 'a>,
}

/// Answers the one request in `input` on `writer`. `executor` is asked for only when something is to be done: neither
/// `info` nor a malformed request needs a configuration.
///
/// Panics are answered, too, which makes this the last a process does.
pub fn serve(
    input: impl Read,
    writer: ResponseWriter,
    executor: impl FnOnce(&Request) -> Result<Box<dyn Executor>>,
) {
    answer(request::read(input), &writer.answer_panics(), executor);
}

/// Answers the request `text`, as [`serve`].
pub fn serve_text(
    text: String,
    writer: ResponseWriter,
    executor: impl FnOnce(&Request) -> Result<Box<dyn Executor>>,
) {
    answer(request::bounded(text), &writer.answer_panics(), executor);
}

fn answer(
    text: Result<String>,
    writer: &ResponseWriter,
    executor: impl FnOnce(&Request) -> Result<Box<dyn Executor>>,
) {
    let response = match text.and_then(|text| admit(&text, executor)) {
        Ok(Admitted::Info) => Response::success(&info()),
        Ok(Admitted::Call { request, call, executor }) => {
            let Executed { response, made, on_delivery } = executor.execute(&request, *call);
            crash::point!("done, not answered");
            return on_delivery(writer.send(&response, made));
        }
        Err(error) => Response::failure(&error),
    };
    // Nothing was done, so nothing is lost with the answer, and no log is up to say so.
    let _ = writer.send(&response, false);
}

/// The result of `info`: what this program can do, whatever the state of its host. It is asked with any API version
/// or none, being how the version is found.
fn info() -> Value {
    json!({"api_version": request::API_VERSIONS.end(), "stemcell_formats": STEMCELL_FORMATS})
}

enum Admitted {
    Info,
    Call { request: Request, call: Box<Call>, executor: Box<dyn Executor> },
}

fn admit(
    text: &str,
    executor: impl FnOnce(&Request) -> Result<Box<dyn Executor>>,
) -> Result<Admitted> {
    let request = Request::parse(text)?;
    if request.method == "info" {
        return Ok(Admitted::Info);
    }
    let named = |error: Error| error.during(printable(&request.method));
    let call = Box::new(Call::parse(&request).map_err(named)?);
    let executor = executor(&request).map_err(named)?;
    Ok(Admitted::Call { request, call, executor })
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
        answer(
            Ok(request.to_owned()),
            &ResponseWriter::new(File::from(OwnedFd::from(cpi))),
            |_| Ok(Box::new(LocalExecutor::new(verbs))),
        );
        let mut text = String::new();
        caller.read_to_string(&mut text).unwrap();
        (serde_json::from_str(&text).unwrap(), calls)
    }

    #[test]
    fn a_call_is_carried_out_and_answered() {
        let (answer, calls) =
            ask(r#"{"method":"has_vm","arguments":["vm-1"],"context":{},"api_version":2}"#);
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
            answer(
                Ok(request.to_owned()),
                &ResponseWriter::new(File::from(OwnedFd::from(cpi))),
                |_| {
                    asked.set(true);
                    Err(Error::new(ErrorKind::BadConfig, "no configuration"))
                },
            );
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
        let expected =
            "attach_disk: argument 2, disk_cid: character '/' at position 1 is not allowed";
        assert!(error["message"].as_str().unwrap().starts_with(expected), "{error}");
        let (answer, _) = ask(r#"{"method":"snapshot_disk","arguments":["disk-1",{}]}"#);
        assert_eq!(answer["error"]["message"], "snapshot_disk: snapshots are not implemented");
        assert!(calls.take().is_empty());
    }

    #[test]
    fn a_create_nobody_hears_of_is_undone() {
        for (request, expected) in [
            (
                r#"{"method":"create_disk","arguments":[1,{}]}"#,
                ["create_disk 1 MiB", "delete_disk disk-new"],
            ),
            (
                r#"{"method":"create_stemcell","arguments":["/x",null]}"#,
                ["create_stemcell /x", "delete_stemcell stemcell-new"],
            ),
            (
                r#"{"method":"create_vm","arguments":["a","s-1",{},{},[],{}]}"#,
                ["create_vm a", "delete_vm vm-new"],
            ),
        ] {
            let (caller, cpi) = UnixStream::pair().unwrap();
            drop(caller);
            let calls = Calls::default();
            let verbs = Fake::new(calls.clone());
            answer(
                Ok(request.to_owned()),
                &ResponseWriter::new(File::from(OwnedFd::from(cpi))),
                |_| Ok(Box::new(LocalExecutor::new(verbs))),
            );
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
        answer(
            Ok(request.to_owned()),
            &ResponseWriter::new(File::from(OwnedFd::from(cpi))),
            |_| Ok(Box::new(LocalExecutor::new(verbs))),
        );
        assert_eq!(calls.take(), ["attach_disk vm-1 disk-1"]);
    }
}
