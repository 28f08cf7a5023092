//! Errors of documents, and the rule which refused values they quote.
//!
//! ```text
//!                       in a file of the operator   in a request
//!   Expected::public    quoted                      quoted
//!   Expected::text      quoted                      numbers and booleans only
//!   Expected::secret    JSON type only              JSON type only
//! ```
//!
//! Every [`Property`](super::Property) has an [`Expected`], so each type takes the decision. Arrays
//! and objects are never quoted. A quote is escaped and has at most 64 characters.

use std::fmt;

use serde_json::Value;

use super::reader::suggest;
use crate::error::{Error, ErrorKind};

/// Characters of a value in a quote.
const QUOTE_LENGTH: usize = 64;

/// The error of a document, with the path of its key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {problem}")]
pub struct SchemaError {
    /// Keys from the root, joined with dots: `networks.default.mtu`.
    pub path: String,
    /// The problem of that key.
    pub problem: Problem,
}

/// The problem of one key. Its text is safe to show in a response to a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// The document has no such key.
    #[error(
        "unknown key{}",
        .suggestion.map(|word| format!("; did you mean '{word}'?")).unwrap_or_default()
    )]
    Unknown {
        /// The known key that is most similar.
        suggestion: Option<&'static str>,
    },
    /// A required key is missing.
    #[error("missing; expected {0}")]
    Missing(Expected),
    /// The value has the wrong type or is out of range.
    #[error("expected {expected}, got {found}")]
    Refused {
        /// What the key accepts.
        expected: Expected,
        /// The value, as far as a message may show it.
        found: Found,
    },
    /// The value conflicts with another part of the document.
    #[error("expected {expected}, got {found}")]
    Value {
        /// What the key accepts.
        expected: &'static str,
        /// The conflict in words, without a value that may be secret.
        found: String,
    },
    /// The document has two spellings of one key.
    #[error("given twice: it is another name for '{0}'")]
    Twice(&'static str),
}

/// What a key accepts, and where an error may quote a refused value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    words: &'static str,
    quoting: Quoting,
    choices: &'static [&'static str],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Quoting {
    Always,
    InFiles,
    Never,
}

impl Expected {
    /// A value that is no secret: a number, an address, a name, a cid. `words` reads "a whole
    /// number from 1 to 16".
    pub const fn public(words: &'static str) -> Self {
        Self { words, quoting: Quoting::Always, choices: &[] }
    }

    /// One word of a closed list. An error suggests the most similar one.
    pub const fn choice(words: &'static str, choices: &'static [&'static str]) -> Self {
        Self { words, quoting: Quoting::Always, choices }
    }

    /// Free text, which may be a credential in a request.
    pub const fn text(words: &'static str) -> Self {
        Self { words, quoting: Quoting::InFiles, choices: &[] }
    }

    /// A secret, or a container that may hold secrets.
    pub const fn secret(words: &'static str) -> Self {
        Self { words, quoting: Quoting::Never, choices: &[] }
    }

    /// What is accepted, in words.
    pub const fn words(self) -> &'static str {
        self.words
    }
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.words)
    }
}

/// Words alone stand for free text.
impl From<&'static str> for Expected {
    fn from(words: &'static str) -> Self {
        Self::text(words)
    }
}

/// A refused value: its JSON type, and a quote if [`Expected`] allows one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    kind: &'static str,
    quote: Option<Box<str>>,
    /// Whether only an error of a file may show the quote.
    only_in_files: bool,
}

impl Found {
    fn new(expected: Expected, value: &Value) -> Self {
        let (kind, quote, is_text) = match value {
            Value::Null => ("null", None, false),
            Value::Bool(boolean) => ("a boolean", Some(boolean.to_string()), false),
            Value::Number(number) => ("a number", Some(number.to_string()), false),
            Value::String(text) if text.is_empty() => ("an empty string", None, false),
            Value::String(text) => ("a string", Some(quoted(text, expected.choices)), true),
            Value::Array(_) => ("an array", None, false),
            Value::Object(_) => ("an object", None, false),
        };
        let quote =
            quote.filter(|_| expected.quoting != Quoting::Never).map(String::into_boxed_str);
        let only_in_files = is_text && expected.quoting != Quoting::Always;
        Self { kind, quote, only_in_files }
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quote = self.quote.as_deref().filter(|_| !self.only_in_files);
        f.write_str(quote.unwrap_or(self.kind))
    }
}

/// `text` in quotes, and the word of `choices` that is similar to it.
fn quoted(text: &str, choices: &[&'static str]) -> String {
    let mut quote = String::from("\"");
    for character in text.chars().take(QUOTE_LENGTH) {
        match character {
            '\'' => quote.push('\''),
            other => quote.extend(other.escape_debug()),
        }
    }
    let is_cut = text.chars().nth(QUOTE_LENGTH).is_some();
    quote.push_str(if is_cut { "…\"" } else { "\"" });
    let same = choices.iter().copied().find(|choice| choice.eq_ignore_ascii_case(text));
    if let Some(similar) = same.or_else(|| suggest(text, choices)) {
        quote.push_str("; did you mean \"");
        quote.push_str(similar);
        quote.push_str("\"?");
    }
    quote
}

impl SchemaError {
    /// `value` is not what a key accepts.
    pub fn value(expected: impl Into<Expected>, value: &Value) -> Self {
        let expected = expected.into();
        let problem = Problem::Refused { expected, found: Found::new(expected, value) };
        Self { path: String::new(), problem }
    }

    /// The same problem, one level further down.
    #[must_use]
    pub fn under(mut self, key: &str) -> Self {
        self.path =
            if self.path.is_empty() { key.to_owned() } else { format!("{key}.{}", self.path) };
        self
    }

    /// The same problem without a quoted value.
    #[must_use]
    pub(super) fn redacted(mut self) -> Self {
        if let Problem::Refused { found, .. } = &mut self.problem {
            found.quote = None;
        }
        self
    }

    /// As an error of the request. `what` names the argument.
    pub fn in_request(self, what: &str) -> Error {
        Error::new(ErrorKind::BadRequest, self.under(what).to_string())
    }

    /// As an error of the operator's file `source`: the configuration, a template, a profile.
    pub fn in_file(mut self, source: &str) -> Error {
        if let Problem::Refused { found, .. } = &mut self.problem {
            found.only_in_files = false;
        }
        Error::new(ErrorKind::BadConfig, format!("'{source}': {self}"))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const TEXT: Expected = Expected::text("a word");
    const SECRET: Expected = Expected::secret("a word");
    const CHOICE: Expected = Expected::choice("\"kvm\" or \"tcg\"", &["kvm", "tcg"]);

    fn in_request(expected: Expected, value: &Value) -> String {
        SchemaError::value(expected, value).under("key").in_request("argument").report()
    }

    fn in_file(expected: Expected, value: &Value) -> String {
        SchemaError::value(expected, value).under("key").in_file("f").report()
    }

    #[test]
    fn a_choice_is_quoted_with_a_suggestion() {
        let expected = "argument.key: expected \"kvm\" or \"tcg\", got \"KVM\"; did you mean \
                        \"kvm\"?";
        assert_eq!(in_request(CHOICE, &json!("KVM")), expected);
        assert_eq!(
            in_file(CHOICE, &json!("tgc")),
            "'f': key: expected \"kvm\" or \"tcg\", got \"tgc\"; did you mean \"tcg\"?"
        );
    }

    #[test]
    fn free_text_is_quoted_for_a_file_only() {
        assert_eq!(
            in_request(TEXT, &json!("hunter2")),
            "argument.key: expected a word, got a string"
        );
        assert_eq!(in_request(TEXT, &json!(7)), "argument.key: expected a word, got 7");
        assert_eq!(in_file(TEXT, &json!("hunter2")), "'f': key: expected a word, got \"hunter2\"");
    }

    #[test]
    fn a_secret_is_never_quoted() {
        for (value, kind) in [
            (json!("hunter2"), "a string"),
            (json!(7), "a number"),
            (json!(true), "a boolean"),
            (json!(["hunter2"]), "an array"),
            (json!({"hunter2": 1}), "an object"),
        ] {
            assert_eq!(in_file(SECRET, &value), format!("'f': key: expected a word, got {kind}"));
            assert!(in_request(SECRET, &value).ends_with(kind), "{value}");
            // A list or an object is not quoted even if the key is public.
            assert!(value.as_str().is_some() || !in_file(CHOICE, &value).contains("hunter2"));
        }
    }

    #[test]
    fn a_quote_is_escaped_and_cut() {
        let long = format!("a\n\u{1b}\"{}", "b".repeat(300));
        let message = in_request(CHOICE, &json!(long));
        assert!(
            message.ends_with(&format!("got \"a\\n\\u{{1b}}\\\"{}…\"", "b".repeat(60))),
            "{message}"
        );
    }
}
