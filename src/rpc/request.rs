//! The request: reads it completely and parses its four keys.

use std::io::Read;

use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::error::{Error, ErrorKind, Result};
use crate::ordered::Object;

/// The largest request that is parsed, bytes. Real ones have about 10 kB, nearly all of it
/// certificates.
pub const MAX_BYTES: u64 = 16 << 20;

/// The longest context, bytes: a cpi-config entry of [`MAX_HOSTS`](crate::config::MAX_HOSTS) hosts
/// with a key each.
const MAX_CONTEXT: usize = 4 << 20;

/// Versions of the CPI API that this CPI supports.
pub const API_VERSIONS: std::ops::RangeInclusive<u64> = 2..=3;

/// The oldest stemcell API version whose agent reads its settings from the VM instead of a
/// registry.
const MIN_STEMCELL_API_VERSION: u64 = 2;

/// One request of the Director or bosh-cli.
#[derive(Debug)]
pub struct Request {
    /// The method's name.
    pub method: String,
    /// The arguments, each byte for byte. Checked to be JSON throughout.
    pub arguments: Vec<Box<RawValue>>,
    /// The caller's context.
    pub context: Context,
    /// The version of the CPI API that the caller uses. The Director omits it for `info`; bosh-cli
    /// sends 1 there.
    pub api_version: Option<u64>,
}

/// The request's context. The properties of a cpi-config entry stand beside the built-in keys and
/// replace those of the same name, so any key may be missing or have any type.
#[derive(Default)]
pub struct Context(Map<String, Value>);

/// The context's keys that do not come from a cpi-config entry.
const BUILT_IN: [&str; 3] = ["director_uuid", "request_id", "vm"];

#[derive(Serialize)]
struct Forwarded<'a> {
    method: &'a str,
    arguments: &'a [Box<RawValue>],
    context: Map<String, Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    api_version: Option<u64>,
}

/// Reads `input` to its end and discards the part over [`MAX_BYTES`]: the Director writes the whole
/// request before it reads, and fails with EPIPE if the CPI answers first.
///
/// # Errors
/// [`ErrorKind::BadRequest`] if the request is longer than [`MAX_BYTES`] or not UTF-8.
pub fn read(mut input: impl Read) -> Result<String> {
    let mut bytes = Vec::new();
    let read = input.by_ref().take(MAX_BYTES).read_to_end(&mut bytes);
    let more = read.and_then(|_| std::io::copy(&mut input, &mut std::io::sink()));
    match more {
        Err(error) => Err(Error::os("read the request from standard input", error)),
        Ok(0) => String::from_utf8(bytes).map_err(|error| {
            bad(format!(
                "the request is not UTF-8: byte {} is invalid",
                error.utf8_error().valid_up_to() + 1
            ))
        }),
        Ok(more) => Err(too_long(MAX_BYTES + more)),
    }
}

/// Checks the length of a request that was already read.
///
/// # Errors
/// [`ErrorKind::BadRequest`] if `text` is longer than [`MAX_BYTES`].
pub fn bounded(text: String) -> Result<String> {
    if text.len() as u64 <= MAX_BYTES { Ok(text) } else { Err(too_long(text.len() as u64)) }
}

fn too_long(bytes: u64) -> Error {
    bad(format!("the request has {bytes} bytes, the limit is {MAX_BYTES}"))
}

impl Request {
    /// Parses the four keys. Ignores other keys, uses the last of a repeated key, and treats null
    /// like a missing key for `context` and `api_version`.
    ///
    /// # Errors
    /// [`ErrorKind::BadRequest`] with the key's name, never its value.
    pub fn parse(text: &str) -> Result<Self> {
        // Parses the whole text once, so that the parts that stay unparsed (env, networks) are
        // known to be well-formed, nested at most 128 deep, with numbers in range.
        let value: Value = serde_json::from_str(text).map_err(|error| not_json(text, &error))?;
        if !value.is_object() {
            return Err(bad("the request is not a JSON object"));
        }
        let keys: Object = serde_json::from_str(text).map_err(|error| not_json(text, &error))?;
        let method = required(&keys, "method", "a string")?;
        let arguments = required(&keys, "arguments", "an array")?;
        if let Some(bytes) = keys.get("context").map(|text| text.get().len())
            && bytes > MAX_CONTEXT
        {
            let message = format!("'context' of the request has {bytes} bytes");
            return Err(bad(format!("{message}, the limit is {MAX_CONTEXT}")));
        }
        let context = optional(&keys, "context", "an object")?.unwrap_or_default();
        let api_version = optional(&keys, "api_version", "a whole number")?;
        Ok(Self { method, arguments, context: Context(context), api_version })
    }

    /// The request as text for another host: the arguments byte for byte, the context with `keys`
    /// instead of the cpi-config entry's properties.
    pub fn forwarded(&self, keys: &Map<String, Value>) -> String {
        let own = BUILT_IN.iter().filter_map(|key| self.context.0.get_key_value(*key));
        let context: Map<_, _> =
            keys.iter().chain(own).map(|(key, value)| (key.clone(), value.clone())).collect();
        let request = Forwarded {
            method: &self.method,
            arguments: &self.arguments,
            context,
            api_version: self.api_version,
        };
        serde_json::to_string(&request).expect("a request is JSON")
    }

    /// Checks the request's API version and, for create_vm, the stemcell's.
    ///
    /// # Errors
    /// [`ErrorKind::NotSupported`]: callers ignore `NotImplemented` for some methods, but not this.
    pub fn check_versions(&self) -> Result<()> {
        let refused = |message| Err(Error::new(ErrorKind::NotSupported, message));
        match self.api_version {
            Some(version) if !API_VERSIONS.contains(&version) => {
                let (least, most) = (API_VERSIONS.start(), API_VERSIONS.end());
                return refused(format!(
                    "CPI API version {version} is not supported, only {least} to {most}"
                ));
            }
            _ => {}
        }
        match self.context.stemcell_api_version() {
            Some(version) if self.method == "create_vm" && version < MIN_STEMCELL_API_VERSION => {
                refused(format!(
                    "the stemcell's API version {version} needs a registry, which this CPI does \
                     not have: use a stemcell with API version {MIN_STEMCELL_API_VERSION} or later"
                ))
            }
            _ => Ok(()),
        }
    }
}

impl Context {
    /// The Director's id of this call, such as `cpi-123456`. Returns `None` for any other format,
    /// because the id goes to the log.
    pub fn request_id(&self) -> Option<&str> {
        let id = self.0.get("request_id")?.as_str()?;
        let tail = id.strip_prefix("cpi-")?;
        (tail.len() <= 32 && tail.chars().all(|c| c.is_ascii_alphanumeric() || c == '-'))
            .then_some(id)
    }

    /// The uuid of the Director or of the create-env state that calls.
    pub fn director(&self) -> Option<&str> {
        self.0.get("director_uuid")?.as_str().filter(|uuid| uuid.len() <= 255)
    }

    /// The API version of the stemcell's agent. Unrelated to [`Request::api_version`].
    pub fn stemcell_api_version(&self) -> Option<u64> {
        self.0.get("vm")?.get("stemcell")?.get("api_version")?.as_u64()
    }

    /// All keys. They include the properties of a cpi-config entry, which are secret.
    pub fn properties(&self) -> &Map<String, Value> {
        &self.0
    }
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

fn optional<T: serde::de::DeserializeOwned>(
    keys: &Object,
    key: &str,
    expected: &str,
) -> Result<Option<T>> {
    let Some(text) = keys.get(key) else { return Ok(None) };
    serde_json::from_str(text.get())
        .map_err(|_| bad(format!("'{key}' of the request is not {expected}")))
}

fn required<T: serde::de::DeserializeOwned>(keys: &Object, key: &str, expected: &str) -> Result<T> {
    optional(keys, key, expected)?.ok_or_else(|| bad(format!("the request has no '{key}'")))
}

fn not_json(text: &str, error: &serde_json::Error) -> Error {
    if text.trim().is_empty() {
        return bad("the request is empty").hint(
            "send one JSON object on standard input; for the operator's commands see --help",
        );
    }
    // serde_json's text of a syntax error contains no value of the request.
    bad(format!("the request is not JSON: {error}"))
}

fn bad(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::BadRequest, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        Request::parse(text).unwrap_err().report()
    }

    #[test]
    fn a_request_needs_method_and_arguments_alone() {
        let request = Request::parse(r#" {"arguments":[],"method":"info"} "#).unwrap();
        assert_eq!(request.method, "info");
        assert_eq!(request.api_version, None);
        assert_eq!(request.context.request_id(), None);
        assert!(
            Request::parse(r#"{"method":"info","arguments":[],"context":null,"api_version":null}"#)
                .is_ok()
        );
    }

    #[test]
    fn repeated_and_unknown_keys_are_accepted() {
        let text =
            r#"{"method":1,"x":[],"arguments":{},"method":"has_vm","arguments":["vm-1"],"y":2}"#;
        let request = Request::parse(text).unwrap();
        assert_eq!((request.method.as_str(), request.arguments.len()), ("has_vm", 1));
    }

    #[test]
    fn an_error_names_the_key_without_its_value() {
        for (text, expected) in [
            (
                "",
                "the request is empty\nHint: send one JSON object on standard input; for the \
                 operator's commands see --help",
            ),
            ("{", "the request is not JSON: EOF while parsing an object at line 1 column 1"),
            ("{} {}", "the request is not JSON: trailing characters at line 1 column 4"),
            (r#"["secret"]"#, "the request is not a JSON object"),
            ("null", "the request is not a JSON object"),
            ("{}", "the request has no 'method'"),
            (r#"{"method":{"a":"secret"}}"#, "'method' of the request is not a string"),
            (r#"{"method":null}"#, "the request has no 'method'"),
            (r#"{"method":"info"}"#, "the request has no 'arguments'"),
            (
                r#"{"method":"info","arguments":"secret"}"#,
                "'arguments' of the request is not an array",
            ),
            (
                r#"{"method":"info","arguments":[],"context":"secret"}"#,
                "'context' of the request is not an object",
            ),
            (
                r#"{"method":"info","arguments":[],"api_version":"2"}"#,
                "'api_version' of the request is not a whole number",
            ),
            (
                r#"{"method":"info","arguments":[],"api_version":-1}"#,
                "'api_version' of the request is not a whole number",
            ),
            (
                r#"{"method":"\ud800"}"#,
                "the request is not JSON: unexpected end of hex escape at line 1 column 18",
            ),
        ] {
            assert_eq!(refusal(text), expected, "{text}");
        }
    }

    #[test]
    fn deep_nesting_is_refused_instead_of_overflowing_the_stack() {
        let deep = "[".repeat(100_000) + &"]".repeat(100_000);
        for text in [
            deep.clone(),
            format!(r#"{{"method":"info","arguments":[{deep}]}}"#),
            format!(r#"{{"x":{deep}}}"#),
        ] {
            assert!(
                refusal(&text).starts_with("the request is not JSON: recursion limit exceeded")
            );
        }
    }

    #[test]
    fn input_is_read_to_its_end_and_bounded() {
        let mut input = std::io::repeat(b' ').take(MAX_BYTES + 1000);
        let error = read(&mut input).unwrap_err();
        assert_eq!(error.report(), "the request has 16778216 bytes, the limit is 16777216");
        assert_eq!(input.limit(), 0);
        assert_eq!(
            read(&b"\"\xff\""[..]).unwrap_err().report(),
            "the request is not UTF-8: byte 2 is invalid"
        );
        assert_eq!(read(&b"{}"[..]).unwrap(), "{}");
        let long = bounded(" ".repeat(usize::try_from(MAX_BYTES).unwrap() + 1)).unwrap_err();
        assert_eq!(long.report(), "the request has 16777217 bytes, the limit is 16777216");
        assert_eq!(bounded("{}".to_owned()).unwrap(), "{}");
    }

    #[test]
    fn a_long_context_is_refused() {
        let context = "x".repeat(MAX_CONTEXT);
        let text = format!(r#"{{"method":"m","arguments":[],"context":{{"a":"{context}"}}}}"#);
        let expected = "'context' of the request has 4194312 bytes, the limit is 4194304";
        assert_eq!(refusal(&text), expected);
    }

    fn versions(method: &str, context: &str, api_version: &str) -> Result<()> {
        let text = format!(
            r#"{{"method":"{method}","arguments":[],"context":{context},"api_version":{api_version}}}"#
        );
        Request::parse(&text).unwrap().check_versions()
    }

    #[test]
    fn the_api_versions_of_cpi_and_stemcell_are_checked_separately() {
        let stemcell = |version| format!(r#"{{"vm":{{"stemcell":{{"api_version":{version}}}}}}}"#);
        assert!(versions("create_vm", &stemcell("3"), "2").is_ok());
        assert!(versions("create_vm", &stemcell("4"), "3").is_ok());
        assert!(versions("create_vm", "{}", "null").is_ok());
        assert!(versions("delete_vm", &stemcell("1"), "2").is_ok());
        for (context, api_version) in
            [(stemcell("1"), "2"), (stemcell("3"), "1"), (stemcell("3"), "4")]
        {
            let error = versions("create_vm", &context, api_version).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotSupported, "{context} {api_version}");
        }
    }

    #[test]
    fn a_cpi_config_may_replace_built_in_keys_of_the_context() {
        for context in
            [r#"{"vm":"x","request_id":7}"#, r#"{"vm":{"stemcell":[]},"request_id":"s3cret"}"#]
        {
            let request =
                Request::parse(&format!(r#"{{"method":"m","arguments":[],"context":{context}}}"#))
                    .unwrap();
            assert_eq!(request.context.stemcell_api_version(), None);
            assert_eq!(request.context.request_id(), None);
            assert!(!format!("{request:?}").contains("s3cret"));
        }
        let request = Request::parse(
            r#"{"method":"m","arguments":[],"context":{"request_id":"cpi-123456"}}"#,
        )
        .unwrap();
        assert_eq!(request.context.request_id(), Some("cpi-123456"));
    }
}
