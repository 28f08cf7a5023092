//! A call that a host executes: the request it receives, its deadline, and the removal of what it
//! may have created if no answer arrives.

use std::io;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::client::{CallError, Client, Reply, StemcellImage};
use super::protocol::CallRequest;
use crate::config::Config;
use crate::cpi::deadlines::default_timeout;
use crate::error::{Error, ErrorKind, Result};
use crate::rpc::Executed;
use crate::rpc::call::Call;
use crate::rpc::request::Request;
use crate::rpc::response::Response;
use crate::rpc::response_writer::Delivery;
use crate::rpc::undo::Undo;
use crate::schema::printable;

/// Time after its own deadline that a host has to report that the deadline has passed.
const LATE_ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Time a host has to remove what a create without an answer may have created.
const UNDO_TIMEOUT: Duration = Duration::from_secs(60);

/// A call in the form that any host can execute.
#[derive(Clone)]
pub struct ForwardedCall<'a> {
    /// The CPI request it was parsed from.
    pub request: &'a Request,
    /// The call.
    pub call: &'a Call,
    /// Keys of the client's configuration that go into the request's context.
    context: &'a Map<String, Value>,
    /// Time a host has.
    timeout: Duration,
    /// When the answer must have arrived.
    pub deadline: Instant,
    /// See [`CallRequest::same_group`].
    same_group: Option<usize>,
    /// See [`CallRequest::replicated`].
    replicated: bool,
    image: Option<StemcellImage<'a>>,
}

/// A host's answer: the response, and the reply that reports its delivery to the host.
pub struct Answered {
    /// The CPI response.
    pub response: Response,
    /// The host's reply.
    pub reply: Reply,
}

/// The response of a call, and the replies of the hosts that wait for a report about its delivery.
pub type Outcome = Result<(Response, Vec<Reply>)>;

impl<'a> ForwardedCall<'a> {
    /// Prepares `call`, which was parsed from `request`. Its deadline is that of `config`, counted
    /// from now. `context` is added to the request's context.
    ///
    /// # Errors
    /// If the image of a create_stemcell cannot be read.
    pub fn new(
        request: &'a Request,
        call: &'a Call,
        config: &Config,
        context: &'a Map<String, Value>,
    ) -> Result<Self> {
        let timeout = config.deadline(&request.method, default_timeout(&request.method))
            + LATE_ANSWER_TIMEOUT;
        let image = match call {
            Call::CreateStemcell(stemcell) => Some(StemcellImage::new(&stemcell.image)?),
            _ => None,
        };
        let deadline = Instant::now() + timeout;
        Ok(Self {
            request,
            call,
            context,
            timeout,
            deadline,
            same_group: None,
            replicated: false,
            image,
        })
    }

    /// Returns the call with its deadline counted from now. Queries to all hosts before the call do
    /// not use up its time.
    #[must_use]
    pub fn with_new_deadline(&self) -> Self {
        Self { deadline: Instant::now() + self.timeout, ..self.clone() }
    }

    /// Returns the call for a host that may have at most `same_group` VMs of the new VM's group.
    #[must_use]
    pub fn with_same_group(&self, same_group: Option<usize>) -> Self {
        Self { same_group, ..self.clone() }
    }

    /// Returns the call for several hosts that create the same object.
    #[must_use]
    pub fn replicated(&self) -> Self {
        Self { replicated: true, ..self.clone() }
    }

    /// Has the host of `client` execute the call. `undo` names the cid of what it creates.
    ///
    /// # Errors
    /// [`ErrorKind::Host`] or [`ErrorKind::Timeout`], with the host's name. The new object is then
    /// removed, or the error says how to remove it.
    pub fn send(&self, client: &Client, undo: Option<&Undo>) -> Result<Answered> {
        let answered = self.exchange(client, self.call_request(), undo)?;
        answered.ok_or_else(|| {
            Error::new(ErrorKind::Internal, "a host answered a condition that the call has not")
        })
    }

    /// Has the host of `client` execute the call if it has all of `cids`. Returns `None` if not.
    ///
    /// # Errors
    /// As [`ForwardedCall::send`].
    pub fn send_if_present(
        &self,
        client: &Client,
        cids: &[&str],
        undo: Option<&Undo>,
    ) -> Result<Option<Answered>> {
        let only_with = cids.iter().map(|cid| (*cid).to_owned()).collect();
        self.exchange(client, CallRequest { only_with, ..self.call_request() }, undo)
    }

    fn exchange(
        &self,
        client: &Client,
        call: CallRequest,
        undo: Option<&Undo>,
    ) -> Result<Option<Answered>> {
        let call = CallRequest { cid: undo.map(|undo| undo.call().1.to_owned()), ..call };
        let (error, sent) = match client.call(call, self.image.as_ref(), self.deadline) {
            Ok(None) => return Ok(None),
            Ok(Some(reply)) => match answered(client, reply, undo) {
                Ok(answered) => return Ok(Some(answered)),
                Err(error) => (error, true),
            },
            Err(CallError { error, sent }) => (error, sent),
        };
        Err(match undo.filter(|_| sent) {
            Some(undo) => self.undo(client, undo, error),
            None => error,
        })
    }

    fn call_request(&self) -> CallRequest {
        CallRequest {
            request: self.request.forwarded(self.context),
            image: self.image.as_ref().map(|image| image.size),
            same_group: self.same_group,
            replicated: self.replicated,
            ..CallRequest::default()
        }
    }

    /// Has the host remove what it may have created, after the call failed with `error`. Returns
    /// `error` with the result of the removal.
    fn undo(&self, client: &Client, undo: &Undo, error: Error) -> Error {
        if self.remove(client, undo) {
            let kind = match undo {
                Undo::DeleteVm(_) => ErrorKind::VmCreationFailed { retry: true },
                _ => error.kind(),
            };
            return error.with_kind(kind).during("no object of this call remains");
        }
        let (method, cid) = undo.call();
        let host = &client.name;
        error.hint(format!(
            "'{cid}' may exist on host '{host}': `{method}` removes it, and succeeds if it does \
             not exist"
        ))
    }

    /// Has the host remove what it may have created, and cancels the create if it has not begun.
    /// Returns whether the host has done so.
    pub fn remove(&self, client: &Client, undo: &Undo) -> bool {
        let (method, cid) = undo.call();
        let removal = json!({"method": method, "arguments": [cid]}).to_string();
        let removal = Request::parse(&removal).expect("a valid request").forwarded(self.context);
        let call = CallRequest { request: removal, cancels: true, ..CallRequest::default() };
        let reply = client.call(call, None, Instant::now() + UNDO_TIMEOUT);
        matches!(reply, Ok(Some(reply)) if is_removed(&reply.text))
    }
}

/// Returns the answer in `reply`. Refuses a create that returns another cid than the client chose:
/// the client could not have that object removed.
fn answered(client: &Client, reply: Reply, undo: Option<&Undo>) -> Result<Answered> {
    let refused =
        |what: &str| Error::new(ErrorKind::Host, format!("host '{}' {what}", client.name));
    let Some(response) = Response::forwarded(reply.text.clone()) else {
        return Err(refused("sent no CPI response"));
    };
    let answered = Answered { response, reply };
    match (answered.result(), undo.map(|undo| undo.call().1)) {
        (Some(result), Some(cid)) if result != cid && result[0] != cid => {
            let refusal = io::ErrorKind::InvalidData.into();
            answered.reply.report_delivery(&Delivery::Lost(refusal));
            Err(refused(&format!("created another object than '{cid}'")))
        }
        _ => Ok(answered),
    }
}

/// Returns whether the response to a delete says that the object does not exist any longer.
fn is_removed(response: &str) -> bool {
    let response: Value = serde_json::from_str(response).unwrap_or_default();
    let error = &response["error"];
    let not_found = ["Bosh::Clouds::DiskNotFound", "Bosh::Clouds::NetworkNotFound"];
    response.is_object() && (error.is_null() || not_found.iter().any(|kind| error["type"] == *kind))
}

impl Answered {
    /// Returns whether the call succeeded.
    pub fn is_success(&self) -> bool {
        self.result().is_some()
    }

    /// Returns the result; `None` after an error.
    pub fn result(&self) -> Option<Value> {
        let mut response: Value = serde_json::from_str(&self.reply.text).ok()?;
        response["error"].is_null().then(|| response["result"].take())
    }

    /// Returns the outcome of a call that one host has executed.
    pub fn into_outcome(self) -> (Response, Vec<Reply>) {
        (self.response, vec![self.reply])
    }
}

/// Returns the response to `request`. Its delivery is reported to every host that replied.
pub fn carried<'a>(request: &Request, outcome: Outcome) -> Executed<'a> {
    match outcome {
        Ok((response, replies)) => {
            let made = replies.iter().any(Reply::is_host_waiting);
            let delivered = move |delivery: Delivery| {
                replies.into_iter().for_each(|reply| reply.report_delivery(&delivery));
            };
            Executed { response, made, on_delivery: Box::new(delivered) }
        }
        Err(error) => {
            let error = error.during(printable(&request.method));
            tracing::warn!("{}", error.report().replace('\n', " "));
            let response = Response::failure(&error);
            Executed { response, made: false, on_delivery: Box::new(|_| {}) }
        }
    }
}
