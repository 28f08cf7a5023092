//! Calls carried out on one host elsewhere.

use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::caller::{Host, Image, Told, Untold};
use super::wire::{CallQuestion, Question};
use crate::config::Config;
use crate::cpi::default_deadline;
use crate::error::{Error, ErrorKind, Result};
use crate::rpc::call::{Call, Undo};
use crate::rpc::request::Request;
use crate::rpc::response::Response;
use crate::rpc::{Carried, Carrier};
use crate::schema::printable;

/// What a host has beyond its own deadline to say that it was exceeded.
const GRACE: Duration = Duration::from_secs(10);

/// How long it may take to undo a create whose answer did not come.
const UNDOES: Duration = Duration::from_secs(60);

/// Has calls carried out on one host.
pub struct OneHost {
    host: Host,
    config: Config,
    /// What the request's context says to the host beside its own keys.
    told: Map<String, Value>,
}

impl OneHost {
    /// Has them carried out on `host`, which is `told` so much of the configuration.
    pub fn new(host: Host, config: Config, told: Map<String, Value>) -> Self {
        Self { host, config, told }
    }

    fn ask(&self, request: &Request, call: &Call) -> Result<Told> {
        let began = Instant::now();
        let deadline = began + self.config.deadline(&request.method, default_deadline(&request.method)) + GRACE;
        let image = match call {
            Call::CreateStemcell(stemcell) => Some(Image::at(&stemcell.image)?),
            _ => None,
        };
        let undo = call.creates();
        let question = Question::Call(CallQuestion {
            request: request.forwarded(&self.told),
            cid: undo.as_ref().map(|undo| undo.call().1.to_owned()),
            image: image.as_ref().map(|image| image.size),
        });
        let told = self.host.ask(&question, image.as_ref(), deadline);
        told.map_err(|Untold { error, asked }| match undo.filter(|_| asked) {
            Some(undo) => self.undo(request, &undo, error),
            None => error,
        })
    }

    /// Has the host remove what it may have created, because of `error`, which then says what came of it.
    fn undo(&self, request: &Request, undo: &Undo, error: Error) -> Error {
        let (method, cid) = undo.call();
        let removal = json!({"method": method, "arguments": [cid]}).to_string();
        let removal = Request::parse(&removal).expect("a request").forwarded(&self.told);
        let question = Question::Call(CallQuestion { request: removal, ..CallQuestion::default() });
        let undone = self.host.ask(&question, None, Instant::now() + UNDOES);
        match undone {
            Ok(told) if is_success(&told.text) => {
                let again = request.method == "create_vm";
                let kind = if again { ErrorKind::VmCreationFailed { retry: true } } else { error.kind() };
                error.with_kind(kind).during("nothing of it is left")
            }
            Ok(_) | Err(_) => {
                error.hint(format!("'{cid}' may be there: `{method}` removes it, and does no harm if not"))
            }
        }
    }
}

/// Whether an answer says that it was done, or that there was nothing to do.
fn is_success(answer: &str) -> bool {
    let answer: Value = serde_json::from_str(answer).unwrap_or_default();
    let error = &answer["error"];
    let gone = ["Bosh::Clouds::DiskNotFound", "Bosh::Clouds::NetworkNotFound"];
    answer.is_object() && (error.is_null() || gone.iter().any(|kind| error["type"] == *kind))
}

impl Carrier for OneHost {
    fn carry(&self, request: &Request, call: Call) -> Carried<'_> {
        let answer = self.ask(request, &call).and_then(|told| {
            let strange = || Error::new(ErrorKind::Host, format!("host '{}' gave no answer of a CPI", self.host.name));
            Response::forwarded(told.text.clone()).map(|response| (response, told)).ok_or_else(strange)
        });
        match answer {
            Ok((response, told)) => {
                let made = told.is_waited_on();
                Carried { response, made, delivered: Box::new(move |delivery| told.tell(&delivery)) }
            }
            Err(error) => {
                let error = error.during(printable(&request.method));
                tracing::warn!("{}", error.report().replace('\n', " "));
                Carried { response: Response::failure(&error), made: false, delivered: Box::new(|_| {}) }
            }
        }
    }
}
