//! The JSON-RPC interface of the CPI: one JSON request on stdin, one JSON response on stdout.
//!
//! ```text
//!  stdin ──▶ request ──▶ call ───────────▶ Executor ──▶ response ──▶ ResponseWriter ──▶ stdout
//!            read to      typed arguments;   acts         one JSON     writes once; if the caller
//!            EOF first    errors end here,                object       has closed the pipe, the
//!                         before any change                            executor undoes a create
//! ```
//!
//! `rpc` owns the format of requests and responses and the Director's names of errors. It knows no
//! state, no host and no configuration. Every failure, panics included, becomes a response with
//! `result`, `error` and `log`.

pub mod arguments;
pub mod call;
#[cfg(test)]
mod fake;
mod local;
pub mod request;
pub mod response;
pub mod response_writer;
pub mod undo;

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

/// Image formats that `create_stemcell` accepts, as stemcells and bosh-cli name them. `qemu-light`
/// is this CPI's own: its cloud properties name an image file on the host.
pub const STEMCELL_FORMATS: [&str; 3] = ["openstack-qcow2", "openstack-raw", "qemu-light"];

/// Runs calls: the CPI of this host, or a client of the CPI on remote hosts.
pub trait Executor {
    /// Runs `call`, the parsed form of `request`.
    fn execute(&self, request: &Request, call: Call) -> Executed<'_>;
}

/// The outcome of a call whose response was not sent yet.
pub struct Executed<'a> {
    /// The response to send.
    pub response: Response,
    /// Whether the call created an object. The caller can delete it only if the response arrives.
    pub made: bool,
    /// Called once with the fate of the response.
    pub on_delivery: Box<dyn FnOnce(Delivery) + 'a>,
}

/// Reads the one request in `input` and writes its response to `writer`. Calls `executor` only for
/// a well-formed call of an acting method: `info` and a malformed request need no configuration.
///
/// A panic is answered, too, and ends the process, so this must be the last thing a process does.
pub fn serve(
    input: impl Read,
    writer: ResponseWriter,
    executor: impl FnOnce(&Request) -> Result<Box<dyn Executor>>,
) {
    answer(request::read(input), &writer.answer_panics(), executor);
}

/// Like [`serve`], for a request that was already read.
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
    let response = match text.and_then(|text| prepare(&text, executor)) {
        Ok(Prepared::Info) => Response::success(&info()),
        Ok(Prepared::Call { request, call, executor }) => {
            let Executed { response, made, on_delivery } = executor.execute(&request, *call);
            crash::point!("done, not answered");
            return on_delivery(writer.send(&response, made));
        }
        Err(error) => Response::failure(&error),
    };
    // The call changed nothing, so a lost response does no harm. No log is set up to report it.
    let _ = writer.send(&response, false);
}

/// The result of `info`: the capabilities of this program, whatever the state of its host. Callers
/// send any API version or none, because they learn the version from the result.
fn info() -> Value {
    json!({"api_version": request::API_VERSIONS.end(), "stemcell_formats": STEMCELL_FORMATS})
}

enum Prepared {
    Info,
    Call { request: Request, call: Box<Call>, executor: Box<dyn Executor> },
}

fn prepare(
    text: &str,
    executor: impl FnOnce(&Request) -> Result<Box<dyn Executor>>,
) -> Result<Prepared> {
    let request = Request::parse(text)?;
    if request.method == "info" {
        return Ok(Prepared::Info);
    }
    let named = |error: Error| error.during(printable(&request.method));
    let call = Box::new(Call::parse(&request).map_err(named)?);
    let executor = executor(&request).map_err(named)?;
    Ok(Prepared::Call { request, call, executor })
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

    /// The response to `request`, and the calls that the fake received.
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
    fn a_call_is_run_and_answered() {
        let (answer, calls) =
            ask(r#"{"method":"has_vm","arguments":["vm-1"],"context":{},"api_version":2}"#);
        assert_eq!(answer, json!({"result": true, "error": null, "log": ""}));
        assert_eq!(calls.take(), ["has_vm vm-1"]);
    }

    #[test]
    fn info_and_malformed_requests_need_no_executor() {
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
    fn info_has_the_keys_of_both_callers() {
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
    fn a_create_whose_response_is_lost_is_undone() {
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
    fn a_call_that_creates_nothing_is_not_undone() {
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
