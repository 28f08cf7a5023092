//! The response: always one JSON object with `result`, `error` and `log`, each of the type that the
//! Director checks for.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::error::{Error, ErrorKind};
use crate::schema::{escaped, plain};

/// The longest error message, bytes. The Director reads one byte at a time: 4 s for each MB.
const MAX_MESSAGE: usize = 8 << 10;

/// The longest response of another host, bytes.
pub const MAX_FORWARDED: usize = 1 << 20;

/// One response. It always has all keys: the Director discards a response whose `log` is missing or
/// null.
#[derive(Debug)]
pub struct Response {
    json: String,
    error_type: Option<&'static str>,
    lacks_room: bool,
    crowded: bool,
}

#[derive(Serialize)]
struct Body<'a, T: ?Sized> {
    result: Option<&'a T>,
    error: Option<Failure>,
    /// Empty: the log goes to stderr, and the Director joins both.
    log: &'static str,
}

#[derive(Serialize)]
struct Failure {
    r#type: &'static str,
    message: String,
    ok_to_retry: bool,
}

/// A response as the Director's schema demands it (`external_cpi.rb`, Director 283).
#[derive(Deserialize)]
struct Forwarded<'a> {
    #[serde(borrow, default, deserialize_with = "present")]
    result: Option<&'a RawValue>,
    #[serde(default, deserialize_with = "present")]
    error: Option<Option<ForwardedFailure>>,
    log: Option<String>,
}

#[derive(Deserialize)]
struct ForwardedFailure {
    r#type: String,
    message: String,
    #[expect(dead_code, reason = "only whether it is there matters")]
    ok_to_retry: bool,
}

/// Deserializes a key that must exist but may be null.
fn present<'de, D: serde::Deserializer<'de>, T: Deserialize<'de>>(
    value: D,
) -> Result<Option<T>, D::Error> {
    T::deserialize(value).map(Some)
}

impl Response {
    /// The response of a call that succeeded with `result`.
    pub fn success<T: Serialize + ?Sized>(result: &T) -> Self {
        Self::of(write(&Body { result: Some(result), error: None, log: "" }))
    }

    /// The response of a call that failed with `error`.
    pub fn failure(error: &Error) -> Self {
        let (r#type, ok_to_retry) = director_type(error.kind());
        let failure = Failure {
            r#type,
            message: bounded(escaped(&error.report()).into_owned()),
            ok_to_retry,
        };
        Self {
            json: write(&Body::<()> { result: None, error: Some(failure), log: "" }),
            error_type: Some(r#type),
            lacks_room: error.lacks_room(),
            crowded: error.is_stale_placement(),
        }
    }

    fn of(json: String) -> Self {
        Self { json, error_type: None, lacks_room: false, crowded: false }
    }

    /// The response `text` of another host, byte for byte except for control characters in messages
    /// and log; `None` if the Director would not accept it.
    pub fn forwarded(text: String) -> Option<Self> {
        if text.len() > MAX_FORWARDED {
            return None;
        }
        let body: Forwarded = serde_json::from_str(&text).ok()?;
        let (Some(_), Some(error), Some(log)) = (body.result, body.error, body.log) else {
            return None;
        };
        let texts =
            error.iter().flat_map(|failure| [&failure.r#type, &failure.message]).chain([&log]);
        let is_plain = texts.into_iter().all(|text| *text == plain(text));
        Some(Self::of(if is_plain { text } else { cleaned(&text)? }))
    }

    /// The `Bosh::Clouds` type of the error, if the call failed on this host.
    pub fn error_type(&self) -> Option<&'static str> {
        self.error_type
    }

    /// Whether the call failed because this host lacks memory or disk space.
    pub fn lacks_room(&self) -> bool {
        self.lacks_room
    }

    /// Whether the call failed because concurrent creates put VMs of the same group on this host.
    pub fn is_crowded(&self) -> bool {
        self.crowded
    }

    /// The JSON without a newline at the end, so that a truncated response never parses.
    pub fn as_bytes(&self) -> &[u8] {
        self.json.as_bytes()
    }
}

/// The Director's type for a kind of failure, and whether the Director should retry. It retries
/// only `VMCreationFailed`. A type that is not in its list (cloud errors.rb, Director 283) would
/// become the generic `UnknownError`, so `StemcellNotFound`, which only bosh-cli knows, is not
/// used.
fn director_type(kind: ErrorKind) -> (&'static str, bool) {
    match kind {
        ErrorKind::BadRequest | ErrorKind::BadConfig => ("Bosh::Clouds::CpiError", false),
        ErrorKind::NotImplemented => ("Bosh::Clouds::NotImplemented", false),
        ErrorKind::NotSupported => ("Bosh::Clouds::NotSupported", false),
        ErrorKind::VmNotFound => ("Bosh::Clouds::VMNotFound", false),
        ErrorKind::DiskNotFound => ("Bosh::Clouds::DiskNotFound", false),
        ErrorKind::NetworkNotFound => ("Bosh::Clouds::NetworkNotFound", false),
        ErrorKind::NoDiskSpace => ("Bosh::Clouds::NoDiskSpace", false),
        ErrorKind::VmCreationFailed { retry } => ("Bosh::Clouds::VMCreationFailed", retry),
        ErrorKind::StemcellNotFound
        | ErrorKind::Conflict
        | ErrorKind::Timeout
        | ErrorKind::NotEnoughMemory { .. }
        | ErrorKind::StalePlacement
        | ErrorKind::Corrupt
        | ErrorKind::Host
        | ErrorKind::Internal => ("Bosh::Clouds::CloudError", false),
    }
}

fn write(body: &impl Serialize) -> String {
    serde_json::to_string(body).expect("an answer is JSON")
}

/// The response `text` without control characters in its messages and log.
fn cleaned(text: &str) -> Option<String> {
    let mut answer: Value = serde_json::from_str(text).ok()?;
    for place in ["/error/type", "/error/message", "/log"] {
        if let Some(Value::String(text)) = answer.pointer_mut(place) {
            *text = plain(text);
        }
    }
    Some(answer.to_string())
}

/// Cuts the middle out of a text that is too long: its start says what failed, its end has the hint
/// or the console's last lines.
fn bounded(text: String) -> String {
    if text.len() <= MAX_MESSAGE {
        return text;
    }
    let boundary = |from: usize, back: bool| {
        let mut at = from;
        while !text.is_char_boundary(at) {
            at = if back { at - 1 } else { at + 1 };
        }
        at
    };
    let head = boundary(MAX_MESSAGE / 2, true);
    let tail = boundary(text.len() - MAX_MESSAGE / 2, false);
    format!("{} [… {} bytes omitted …] {}", &text[..head], tail - head, &text[tail..])
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn parsed(response: &Response) -> Value {
        serde_json::from_slice(response.as_bytes()).unwrap()
    }

    #[test]
    fn every_response_has_all_keys() {
        assert_eq!(Response::success(&()).as_bytes(), br#"{"result":null,"error":null,"log":""}"#);
        let failed =
            Response::failure(&Error::new(ErrorKind::VmNotFound, "no vm 'vm-1'").hint("look"));
        assert_eq!(
            parsed(&failed),
            json!({"result": null, "log": "", "error": {
                "type": "Bosh::Clouds::VMNotFound", "message": "no vm 'vm-1'\nHint: look", "ok_to_retry": false}})
        );
    }

    #[test]
    fn only_a_failed_creation_may_be_worth_a_retry() {
        let retry = |retry| {
            let error = Error::new(ErrorKind::VmCreationFailed { retry }, "x");
            parsed(&Response::failure(&error))["error"]["ok_to_retry"].clone()
        };
        assert_eq!((retry(true), retry(false)), (json!(true), json!(false)));
    }

    #[test]
    fn an_unknown_stemcell_has_a_type_the_director_knows() {
        assert_eq!(director_type(ErrorKind::StemcellNotFound).0, "Bosh::Clouds::CloudError");
    }

    #[test]
    fn another_hosts_response_is_forwarded_without_control_characters() {
        let own = r#"{"result": null,"error":{"type":"T","message":"a\nHint: b","ok_to_retry":false}, "log":""}"#;
        assert_eq!(Response::forwarded(own.to_owned()).unwrap().as_bytes(), own.as_bytes());
        let hostile = json!({"result": null, "log": "\u{9b}0m", "error": {
            "type": "T", "message": "a\u{1b}[2J\r\nb", "ok_to_retry": false}});
        let cleaned = parsed(&Response::forwarded(hostile.to_string()).unwrap());
        assert_eq!(
            (&cleaned["error"]["message"], &cleaned["log"]),
            (&json!("a [2J \nb"), &json!(" 0m"))
        );
        let long = json!({"result": "x".repeat(MAX_FORWARDED), "error": null, "log": ""});
        assert!(Response::forwarded(long.to_string()).is_none());
    }

    #[test]
    fn a_message_has_no_control_character_but_its_line_ends() {
        let error = Error::new(ErrorKind::Host, "tar member 'a\u{1b}[2J\u{9b}\u{202e}b'");
        let response = parsed(&Response::failure(&error.hint("pack it again")));
        assert_eq!(
            response["error"]["message"],
            "tar member 'a\\u{1b}[2J\\u{9b}\\u{202e}b'\nHint: pack it again"
        );
    }

    #[test]
    fn a_long_message_keeps_both_ends() {
        let error = Error::new(ErrorKind::Host, format!("front {}", "ä\u{1F600}".repeat(100_000)))
            .hint("end");
        let response = parsed(&Response::failure(&error));
        let message = response["error"]["message"].as_str().unwrap();
        assert!(message.starts_with("front ä") && message.ends_with("Hint: end"), "{message}");
        assert!(message.len() < MAX_MESSAGE + 100);
    }
}
