//! A call on its way to a host: what is asked, until when, and what is done if no answer comes.

use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::client::{CallError, Client, Image, Reply};
use super::protocol::CallRequest;
use crate::config::Config;
use crate::cpi::default_deadline;
use crate::error::{Error, ErrorKind, Result};
use crate::rpc::Carried;
use crate::rpc::call::{Call, Undo};
use crate::rpc::outlet::Delivery;
use crate::rpc::request::Request;
use crate::rpc::response::Response;
use crate::schema::printable;

/// What a host has beyond its own deadline to say that it was exceeded.
const GRACE: Duration = Duration::from_secs(10);

/// How long it may take to undo a create whose answer did not come.
const UNDOES: Duration = Duration::from_secs(60);

/// A call, as any host may be asked to carry it out.
#[derive(Clone)]
pub struct ForwardedCall<'a> {
    /// What it was read from.
    pub request: &'a Request,
    /// The call.
    pub call: &'a Call,
    /// What the request's context says to the host beside its own keys.
    told: &'a Map<String, Value>,
    /// How long a host has.
    patience: Duration,
    /// When an answer must be there.
    pub deadline: Instant,
    /// How many VMs that had better not be with the new one the host may have.
    alike: Option<usize>,
    /// Whether other hosts are asked to make the same.
    everywhere: bool,
    image: Option<Image<'a>>,
}

/// An answer, and the host that gave it and may wait to hear what became of it.
pub struct Answered {
    /// The answer.
    pub response: Response,
    /// From whom.
    pub told: Reply,
}

impl<'a> ForwardedCall<'a> {
    /// `call`, which `request` is, to be carried out in the time that `config` gives it, counted from now.
    ///
    /// # Errors
    /// If it comes with an image that can not be read.
    pub fn new(
        request: &'a Request,
        call: &'a Call,
        config: &Config,
        told: &'a Map<String, Value>,
    ) -> Result<Self> {
        let patience = config.deadline(&request.method, default_deadline(&request.method)) + GRACE;
        let image = match call {
            Call::CreateStemcell(stemcell) => Some(Image::at(&stemcell.image)?),
            _ => None,
        };
        let deadline = Instant::now() + patience;
        Ok(Self { request, call, told, patience, deadline, alike: None, everywhere: false, image })
    }

    /// The same with all of its time ahead: what was asked before, of all hosts, was not the call.
    #[must_use]
    pub fn afresh(&self) -> Self {
        Self { deadline: Instant::now() + self.patience, ..self.clone() }
    }

    /// The same for a host that may have so many VMs that had better not be with the new one.
    #[must_use]
    pub fn beside(&self, alike: Option<usize>) -> Self {
        Self { alike, ..self.clone() }
    }

    /// The same for several hosts, which are to make the same.
    #[must_use]
    pub fn everywhere(&self) -> Self {
        Self { everywhere: true, ..self.clone() }
    }

    /// Has `host` carry it out. What is created has the cid that `undo` would remove.
    ///
    /// # Errors
    /// [`ErrorKind::Host`] or [`ErrorKind::Timeout`], naming the host; what was created then is gone, or the error says how
    /// to remove it.
    pub fn send(&self, host: &Client, undo: Option<&Undo>) -> Result<Answered> {
        let answered = self.ask(host, self.call_request(), undo)?;
        answered.ok_or_else(|| {
            Error::new(ErrorKind::Internal, "a condition that was not set is not met")
        })
    }

    /// Has `host` carry it out if it has `cids`; `None` if it has not.
    ///
    /// # Errors
    /// As [`ForwardedCall::send`].
    pub fn send_if_there(
        &self,
        host: &Client,
        cids: &[&str],
        undo: Option<&Undo>,
    ) -> Result<Option<Answered>> {
        let only_with = cids.iter().map(|cid| (*cid).to_owned()).collect();
        self.ask(host, CallRequest { only_with, ..self.call_request() }, undo)
    }

    fn ask(
        &self,
        host: &Client,
        call: CallRequest,
        undo: Option<&Undo>,
    ) -> Result<Option<Answered>> {
        let call = CallRequest { cid: undo.map(|undo| undo.call().1.to_owned()), ..call };
        let (error, asked) = match host.call(call, self.image.as_ref(), self.deadline) {
            Ok(None) => return Ok(None),
            Ok(Some(told)) => match answered(host, told, undo) {
                Ok(answered) => return Ok(Some(answered)),
                Err(error) => (error, true),
            },
            Err(CallError { error, asked }) => (error, asked),
        };
        Err(match undo.filter(|_| asked) {
            Some(undo) => self.undo(host, undo, error),
            None => error,
        })
    }

    fn call_request(&self) -> CallRequest {
        let image = self.image.as_ref().map(|image| image.size);
        let request = self.request.forwarded(self.told);
        CallRequest {
            request,
            image,
            same_group: self.alike,
            replicated: self.everywhere,
            ..CallRequest::default()
        }
    }

    /// Has `host` remove what it may have created, because of `error`, which then says what came of it.
    pub fn undo(&self, host: &Client, undo: &Undo, error: Error) -> Error {
        if self.is_undone(host, undo) {
            let again = matches!(undo, Undo::DeleteVm(_));
            let kind =
                if again { ErrorKind::VmCreationFailed { retry: true } } else { error.kind() };
            return error.with_kind(kind).during("nothing of it is left");
        }
        let (method, cid) = undo.call();
        let host = &host.name;
        error.hint(format!(
            "'{cid}' may be on host '{host}': `{method}` removes it, and does no harm if not"
        ))
    }

    /// Has `host` remove what it may have created, and make it no more if it has not begun. Whether that is done.
    pub fn is_undone(&self, host: &Client, undo: &Undo) -> bool {
        let (method, cid) = undo.call();
        let removal = json!({"method": method, "arguments": [cid]}).to_string();
        let removal = Request::parse(&removal).expect("a request").forwarded(self.told);
        let call = CallRequest { request: removal, cancels: true, ..CallRequest::default() };
        let told = host.call(call, None, Instant::now() + UNDOES);
        matches!(told, Ok(Some(told)) if is_done(&told.text))
    }
}

/// What `host` answered. A success of a create that names another cid than was chosen is none: nobody could have that removed.
fn answered(host: &Client, told: Reply, undo: Option<&Undo>) -> Result<Answered> {
    let strange = |what: &str| Error::new(ErrorKind::Host, format!("host '{}' {what}", host.name));
    let Some(response) = Response::forwarded(told.text.clone()) else {
        return Err(strange("gave no answer of a CPI"));
    };
    let answered = Answered { response, told };
    match (answered.result(), undo.map(|undo| undo.call().1)) {
        (Some(result), Some(cid)) if result != cid && result[0] != cid => {
            let unheard = std::io::ErrorKind::InvalidData.into();
            answered.told.tell(&Delivery::Lost(unheard));
            Err(strange(&format!("says that it made something else than '{cid}'")))
        }
        _ => Ok(answered),
    }
}

/// Whether an answer says that it was done, or that there was nothing to do.
fn is_done(answer: &str) -> bool {
    let answer: Value = serde_json::from_str(answer).unwrap_or_default();
    let error = &answer["error"];
    let gone = ["Bosh::Clouds::DiskNotFound", "Bosh::Clouds::NetworkNotFound"];
    answer.is_object() && (error.is_null() || gone.iter().any(|kind| error["type"] == *kind))
}

impl Answered {
    /// Whether it says that the call was carried out.
    pub fn is_success(&self) -> bool {
        self.result().is_some()
    }

    /// The result; `None` if it is an error.
    pub fn result(&self) -> Option<Value> {
        let mut answer: Value = serde_json::from_str(&self.told.text).ok()?;
        answer["error"].is_null().then(|| answer["result"].take())
    }
}

/// What came of `request`, for who asked. Every host that answered hears what became of the answer.
pub fn carried<'a>(request: &Request, outcome: Result<(Response, Vec<Reply>)>) -> Carried<'a> {
    match outcome {
        Ok((response, told)) => {
            let made = told.iter().any(Reply::is_waited_on);
            let delivered =
                move |delivery: Delivery| told.into_iter().for_each(|told| told.tell(&delivery));
            Carried { response, made, delivered: Box::new(delivered) }
        }
        Err(error) => {
            let error = error.during(printable(&request.method));
            tracing::warn!("{}", error.report().replace('\n', " "));
            Carried {
                response: Response::failure(&error),
                made: false,
                delivered: Box::new(|_| {}),
            }
        }
    }
}
