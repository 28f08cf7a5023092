//! Documents that people write: `cpi.json`, cloud properties, machine templates, network profiles.
//!
//! [`document!`](crate::document) declares one as a struct. From that one declaration come the parser (unknown
//! keys are errors with a suggestion, every error names the path of its key), the defaults and the reference in
//! `docs/`. [`choice!`](crate::choice) does the same for a word out of a closed list.
//!
//! A value is never quoted in an error: it may be a secret. Its JSON type is.

mod reader;
mod values;

use serde::Serialize;
use serde_json::Value;

pub use reader::{Reader, plain, printable, suggest};
pub use values::{Redacted, Whole};

use crate::error::{Error, ErrorKind};

/// What is wrong with a document, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {problem}")]
pub struct SchemaError {
    /// Keys from the root, joined with dots: `networks.default.mtu`.
    pub path: String,
    /// What is wrong there.
    pub problem: Problem,
}

/// What can be wrong with one key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// No such key here.
    #[error("unknown key{}", .suggestion.map(|s| format!("; did you mean '{s}'?")).unwrap_or_default())]
    Unknown {
        /// The known key that looks most like it.
        suggestion: Option<&'static str>,
    },
    /// The key must be there.
    #[error("missing; expected {0}")]
    Missing(&'static str),
    /// The value has the wrong type or is out of range.
    #[error("expected {expected}, got {found}")]
    Value {
        /// What is accepted.
        expected: &'static str,
        /// What it is instead, without the value.
        found: String,
    },
    /// Two spellings of one key.
    #[error("given twice: it is another name for '{0}'")]
    Twice(&'static str),
}

impl SchemaError {
    /// `value` is not what `expected` says.
    pub fn value(expected: &'static str, value: &Value) -> Self {
        Self { path: String::new(), problem: Problem::Value { expected, found: kind_of(value) } }
    }

    /// The same problem, one level further down.
    #[must_use]
    pub fn under(mut self, key: &str) -> Self {
        self.path =
            if self.path.is_empty() { key.to_owned() } else { format!("{key}.{}", self.path) };
        self
    }

    /// As the request's fault, `what` naming the argument.
    pub fn in_request(self, what: &str) -> Error {
        Error::new(ErrorKind::BadRequest, self.under(what).to_string())
    }

    /// As the fault of the configuration file or template `source`.
    pub fn in_file(self, source: &str) -> Error {
        Error::new(ErrorKind::BadConfig, format!("'{source}': {self}"))
    }
}

/// The JSON type of `value` in words; numbers and booleans with their value, which is no secret.
fn kind_of(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(b) => format!("{b}"),
        Value::Number(n) => format!("{n}"),
        Value::String(s) if s.is_empty() => "an empty string".into(),
        Value::String(_) => "a string".into(),
        Value::Array(_) => "an array".into(),
        Value::Object(_) => "an object".into(),
    }
}

/// One key of a document, for the reference.
#[derive(Debug)]
pub struct Key {
    /// Its name.
    pub name: &'static str,
    /// Other names that mean the same.
    pub aliases: &'static [&'static str],
    /// What it accepts, in words.
    pub expected: &'static str,
    /// What it is without being given, as JSON; `None`: nothing.
    pub default: fn() -> Option<Value>,
    /// Its documentation, Markdown.
    pub doc: &'static [&'static str],
    /// The keys below it.
    pub keys: fn() -> Vec<Key>,
}

/// A type that can stand in a document.
pub trait Property: Sized + Serialize {
    /// What is accepted, for errors and docs: "a whole number of MiB from 1".
    const EXPECTED: &'static str;

    /// Reads one value.
    fn from_json(value: &Value) -> Result<Self, SchemaError>;

    /// What the key is when it is not there and has no default; `None`: it must be there.
    fn absent() -> Option<Self> {
        None
    }

    /// The keys below, for documents.
    fn keys() -> Vec<Key> {
        Vec::new()
    }
}

/// Declares a document: see the [module](crate::schema).
///
/// A field is `name: Type;` (must be given, or `Option`), `name: Type = default;`, or `name | "alias": Type …`.
#[macro_export]
macro_rules! document {
    (
        $(#[$meta:meta])*
        pub struct $name:ident {
            $( $(#[doc = $doc:literal])+ $field:ident $(| $alias:literal)* : $ty:ty $(= $default:expr)? ; )*
        }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, serde::Serialize)]
        pub struct $name {
            $( $(#[doc = $doc])+ pub $field: $ty, )*
        }

        impl $crate::schema::Property for $name {
            const EXPECTED: &'static str = "an object";

            fn from_json(value: &serde_json::Value) -> Result<Self, $crate::schema::SchemaError> {
                let mut reader = $crate::schema::Reader::new(value, &[$( stringify!($field), $($alias,)* )*])?;
                let document = Self {
                    $( $field: reader.take(stringify!($field), &[$($alias),*], || $crate::document!(@default $($default)?))?, )*
                };
                reader.finish()?;
                Ok(document)
            }

            fn absent() -> Option<Self> {
                // A document whose keys all have defaults is its own default.
                Self::from_json(&serde_json::Value::Object(serde_json::Map::new())).ok()
            }

            fn keys() -> Vec<$crate::schema::Key> {
                vec![$( $crate::schema::Key {
                    name: stringify!($field),
                    aliases: &[$($alias),*],
                    expected: <$ty as $crate::schema::Property>::EXPECTED,
                    default: || {
                        let value: Option<$ty> = $crate::document!(@default $($default)?);
                        value.map(|value| serde_json::to_value(value).unwrap_or_default())
                    },
                    doc: &[$($doc),+],
                    keys: <$ty as $crate::schema::Property>::keys,
                } ),*]
            }
        }
    };
    (@default) => { None };
    (@default $default:expr) => { Some($default) };
}

/// Declares a word out of a closed list: `pub enum Accel { Auto = "auto", … }`, the list for errors after it.
#[macro_export]
macro_rules! choice {
    (
        $(#[$meta:meta])*
        pub enum $name:ident ($expected:literal) {
            $( $(#[$variant_meta:meta])* $variant:ident = $word:literal, )*
        }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
        pub enum $name {
            $( $(#[$variant_meta])* #[serde(rename = $word)] $variant, )*
        }

        impl $name {
            /// The word for it.
            pub fn as_str(self) -> &'static str {
                match self { $( Self::$variant => $word, )* }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl $crate::schema::Property for $name {
            const EXPECTED: &'static str = $expected;

            fn from_json(value: &serde_json::Value) -> Result<Self, $crate::schema::SchemaError> {
                match value.as_str() {
                    $( Some($word) => Ok(Self::$variant), )*
                    _ => Err($crate::schema::SchemaError::value(Self::EXPECTED, value)),
                }
            }
        }
    };
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::PathBuf;

    use serde_json::json;

    use super::*;
    use crate::units::MiB;

    crate::document! {
        /// A document for these tests.
        pub struct Sample {
            /// How many.
            count | "number": Whole<1, 16> = Whole::of(3);
            /// How large.
            size: Option<MiB>;
            /// More of them.
            parts: BTreeMap<String, Part>;
        }
    }

    crate::document! {
        /// A part.
        pub struct Part {
            /// Where it is.
            path: PathBuf;
        }
    }

    fn refusal(value: &Value) -> String {
        Sample::from_json(value).unwrap_err().to_string()
    }

    #[test]
    fn defaults_and_aliases() {
        assert_eq!(Sample::from_json(&json!({})).unwrap().count.get(), 3);
        assert_eq!(Sample::from_json(&json!({"number": 4})).unwrap().count.get(), 4);
    }

    #[test]
    fn errors_name_the_path_and_never_the_text() {
        assert_eq!(refusal(&json!({"cuont": 1})), "cuont: unknown key; did you mean 'count'?");
        assert_eq!(
            refusal(&json!({"count": 1, "number": 1})),
            "number: given twice: it is another name for 'count'"
        );
        assert_eq!(
            refusal(&json!({"count": "secret"})),
            "count: expected a whole number from 1 to 16, got a string"
        );
        assert_eq!(
            refusal(&json!({"size": -1})),
            "size: expected a whole number of MiB from 1 to 67108864, got -1"
        );
        assert_eq!(
            refusal(&json!({"parts": {"a": {}}})),
            "parts.a.path: missing; expected an absolute path"
        );
        assert_eq!(
            refusal(&json!({"parts": {"a": {"path": "x"}}})),
            "parts.a.path: expected an absolute path, got a string"
        );
        assert_eq!(refusal(&json!([])), ": expected an object, got an array");
    }
}
