//! Encodes and decodes lines of QMP. Pure.

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use super::error::MonitorError;
use super::event::{Event, Timestamp};

/// Longest line accepted, bytes. The longest known reply, `query-qmp-schema`, has 236 kB in QEMU
/// 10.0.
pub(super) const LONGEST_LINE: usize = 2 << 20;
/// Longest line of an event, bytes. QEMU's events have a few hundred. Events are queued, so their
/// sum counts.
const LONGEST_EVENT: usize = 16 << 10;
/// Longest text from QEMU in a message of this program, characters.
const LONGEST_TEXT: usize = 400;

/// One message from QEMU.
#[derive(Debug)]
pub(super) enum Message {
    Greeting,
    Event(Event),
    Reply { id: u64, result: Result<Box<RawValue>, ErrorReply> },
}

/// QEMU's error reply.
#[derive(Debug, Deserialize)]
pub(super) struct ErrorReply {
    class: String,
    desc: String,
}

impl ErrorReply {
    pub(super) fn into_error(self, command: &str) -> MonitorError {
        MonitorError::Refused {
            command: command.to_owned(),
            class: printable(&self.class),
            desc: printable(&self.desc),
        }
    }
}

/// All fields of all kinds of messages. Those present determine the kind.
#[derive(Deserialize)]
struct Line {
    #[serde(rename = "QMP")]
    greeting: Option<serde::de::IgnoredAny>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
    timestamp: Option<Timestamp>,
    // `Option` would parse the reply `null` as no reply.
    #[serde(default, rename = "return", deserialize_with = "present")]
    answer: Option<Box<RawValue>>,
    error: Option<ErrorReply>,
    id: Option<u64>,
}

fn present<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

/// Parses one line, without its line feed.
pub(super) fn decode(line: &[u8]) -> Result<Message, MonitorError> {
    let length = line.len();
    let line: Line = serde_json::from_slice(line).map_err(|e| {
        MonitorError::Protocol(format!("a line of {length} bytes is not a message: {e}"))
    })?;
    match line {
        Line { greeting: Some(_), .. } => Ok(Message::Greeting),
        Line { event: Some(_), .. } if length > LONGEST_EVENT => {
            Err(MonitorError::Protocol(format!("an event of {length} bytes")))
        }
        Line { event: Some(name), data, timestamp, .. } => {
            Ok(Message::Event(Event { name, data, time: timestamp.and_then(Timestamp::time) }))
        }
        Line { answer: Some(answer), id: Some(id), .. } => {
            Ok(Message::Reply { id, result: Ok(answer) })
        }
        Line { error: Some(reply), id: Some(id), .. } => {
            Ok(Message::Reply { id, result: Err(reply) })
        }
        // QEMU failed to parse a command so far that it could not even read the id.
        Line { error: Some(reply), .. } => Err(MonitorError::Protocol(printable(&reply.desc))),
        _ => Err(MonitorError::Protocol("a message is neither event nor reply".into())),
    }
}

/// Encodes one command as a line.
pub(super) fn encode<A: Serialize>(
    id: u64,
    command: &str,
    arguments: &A,
) -> Result<Vec<u8>, MonitorError> {
    #[derive(Serialize)]
    struct Command<'a, A> {
        execute: &'a str,
        arguments: &'a A,
        id: u64,
    }
    let mut line = serde_json::to_vec(&Command { execute: command, arguments, id })
        .map_err(|e| MonitorError::Protocol(format!("arguments of '{command}': {e}")))?;
    line.push(b'\n');
    Ok(line)
}

/// Prepares QEMU's `text` for a message or a log: truncated, and without control characters.
pub(super) fn printable(text: &str) -> String {
    let mut shown = String::new();
    for c in text.chars().take(LONGEST_TEXT) {
        if c.is_control() { shown.extend(c.escape_default()) } else { shown.push(c) }
    }
    if text.chars().nth(LONGEST_TEXT).is_some() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn event_with_unknown_fields_is_an_event() {
        let line = br#"{"event": "NEW", "data": {"x": 1}, "more": [],
            "timestamp": {"seconds": 1, "microseconds": 2}}"#;
        let Ok(Message::Event(event)) = decode(line) else { panic!() };
        assert_eq!((event.name.as_str(), event.data), ("NEW", json!({"x": 1})));
    }

    #[test]
    fn null_is_a_reply() {
        assert!(matches!(
            decode(br#"{"return": null, "id": 3}"#),
            Ok(Message::Reply { id: 3, result: Ok(_) })
        ));
    }

    #[test]
    fn invalid_line_is_an_error_that_does_not_quote_it() {
        for line in [
            &b"HTTP/1.1 200 OK"[..],
            b"{}",
            b"[]",
            b"",
            b"\xff",
            br#"{"id": 1}"#,
            br#"{"return": {}}"#,
        ] {
            let error = decode(line).unwrap_err().to_string();
            assert!(error.starts_with("monitor protocol: "), "{error}");
            assert!(!error.contains("HTTP"), "{error}");
        }
    }

    #[test]
    fn text_from_qemu_is_truncated_and_escaped() {
        assert_eq!(printable("a\nb\x1b[2J"), "a\\nb\\u{1b}[2J");
        assert_eq!(printable(&"ä".repeat(1000)).chars().count(), LONGEST_TEXT + 1);
    }

    proptest::proptest! {
        #[test]
        fn no_line_panics(line in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let _ = decode(&line);
        }
    }
}
