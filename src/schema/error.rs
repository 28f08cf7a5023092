//! Errors of documents, and the rule which refused values they quote.
//!
//! ```text
//!                       in a file of the operator   in a request
//!   Expected::choice    quoted                      if similar to a choice
//!   Expected::number    quoted                      if it has the form of a number
//!   Expected::address   quoted                      if it has the form of an address
//!   Expected::text      quoted                      JSON type only
//!   Expected::secret    JSON type only              JSON type only
//! ```
//!
//! Every [`Property`](super::Property) has an [`Expected`], so each type takes the decision. A
//! request may have a secret at the wrong key, so the form of its values counts, too. JSON numbers
//! and booleans are quoted except for secrets; arrays and objects never are. A quote is escaped and
//! has at most 64 characters.

use std::fmt;

use serde_json::Value;

use super::suggestion::suggest;
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

/// What a key accepts, and whether an error may quote a refused value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    words: &'static str,
    form: Form,
}

/// Form of the values that a key accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Choice(&'static [&'static str]),
    Number,
    Address,
    Text,
    Secret,
}

impl Expected {
    /// One word of a closed list. An error suggests the most similar one.
    pub const fn choice(words: &'static str, choices: &'static [&'static str]) -> Self {
        Self { words, form: Form::Choice(choices) }
    }

    /// A number or a range of numbers. `words` reads "a whole number from 1 to 16".
    pub const fn number(words: &'static str) -> Self {
        Self { words, form: Form::Number }
    }

    /// An IP address, a subnet or a range of addresses.
    pub const fn address(words: &'static str) -> Self {
        Self { words, form: Form::Address }
    }

    /// A name, a path or other text, in whose place a request may have a credential.
    pub const fn text(words: &'static str) -> Self {
        Self { words, form: Form::Text }
    }

    /// A secret, or a container that may hold secrets.
    pub const fn secret(words: &'static str) -> Self {
        Self { words, form: Form::Secret }
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

/// Words alone stand for text.
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
        let (kind, quote, only_in_files) = match value {
            Value::Null => ("null", None, false),
            Value::Bool(boolean) => ("a boolean", Some(boolean.to_string()), false),
            Value::Number(number) => ("a number", Some(number.to_string()), false),
            Value::String(text) if text.is_empty() => ("an empty string", None, false),
            Value::String(text) => {
                ("a string", Some(expected.form.quote(text)), !expected.form.resembles(text))
            }
            Value::Array(_) => ("an array", None, false),
            Value::Object(_) => ("an object", None, false),
        };
        let quote = quote.filter(|_| expected.form != Form::Secret).map(String::into_boxed_str);
        Self { kind, quote, only_in_files }
    }
}

impl Form {
    /// Whether `text` looks like a mistyped value of this form rather than like a secret.
    fn resembles(self, text: &str) -> bool {
        match self {
            Self::Choice(_) => self.similar(text).is_some_and(|word| text.len() <= word.len() + 2),
            // With a unit: 4G, 512 MiB.
            Self::Number => {
                let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
                text.len() - number.len() <= 3
                    && number.starts_with(|c: char| c.is_ascii_digit() || "+-".contains(c))
                    && number.chars().all(|c| c.is_ascii_digit() || "+-., ".contains(c))
            }
            Self::Address => {
                text.contains(['.', ':'])
                    && text.chars().all(|c| c.is_ascii_hexdigit() || ".:/- ".contains(c))
            }
            Self::Text | Self::Secret => false,
        }
    }

    /// The choice that is similar to a mistyped `text`.
    fn similar(self, text: &str) -> Option<&'static str> {
        let Self::Choice(choices) = self else { return None };
        let same = choices.iter().copied().find(|choice| choice.eq_ignore_ascii_case(text));
        same.or_else(|| suggest(text, choices))
    }

    /// `text` in quotes, with a suggestion if a choice is similar.
    fn quote(self, text: &str) -> String {
        let mut quote = String::from("\"");
        for character in text.chars().take(QUOTE_LENGTH) {
            match character {
                '\'' => quote.push('\''),
                other => quote.extend(other.escape_debug()),
            }
        }
        let is_cut = text.chars().nth(QUOTE_LENGTH).is_some();
        quote.push_str(if is_cut { "…\"" } else { "\"" });
        if let Some(similar) = self.similar(text) {
            quote.push_str("; did you mean \"");
            quote.push_str(similar);
            quote.push_str("\"?");
        }
        quote
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quote = self.quote.as_deref().filter(|_| !self.only_in_files);
        f.write_str(quote.unwrap_or(self.kind))
    }
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
    fn a_request_is_quoted_only_where_it_resembles_what_is_expected() {
        let number = Expected::number("a number");
        let address = Expected::address("an address");
        for (expected, values) in [
            (CHOICE, ["KVM", "kvmm"]),
            (number, ["4G", "-1.5"]),
            (address, ["10.0.0.256/24", "fd00::1/129"]),
        ] {
            for value in values {
                let quoted = in_request(expected, &json!(value)).contains(&format!("\"{value}\""));
                assert!(quoted, "{value}");
            }
            let message = in_request(expected, &json!("hunter2"));
            assert!(message.ends_with("got a string"), "{message}");
            assert!(in_file(expected, &json!("hunter2")).contains("got \"hunter2\""));
        }
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
            // A list or an object is not quoted at any key.
            assert!(value.as_str().is_some() || !in_file(CHOICE, &value).contains("hunter2"));
        }
    }

    #[test]
    fn a_quote_is_escaped_and_cut() {
        let long = format!("a\n\u{1b}\"{}", "b".repeat(300));
        let message = in_file(TEXT, &json!(long));
        assert!(
            message.ends_with(&format!("got \"a\\n\\u{{1b}}\\\"{}…\"", "b".repeat(60))),
            "{message}"
        );
    }
}
