//! Documents that people write: `cpi.json`, cloud properties, machine templates, network profiles.
//!
//! [`document!`](crate::document) declares a document as a struct. The parser, the defaults and the
//! reference in `docs/` come from that one declaration. An unknown key is an error with a
//! suggestion, and every error names the path of its key. [`choice!`](crate::choice) declares a
//! word out of a closed list.
//!
//! [`Expected`] decides whether an error quotes a refused value, because it may be a secret.

mod error;
mod reader;
mod suggestion;
mod text;
mod values;

use serde::Serialize;
use serde_json::Value;

pub use error::{Expected, Found, Problem, SchemaError};
pub use reader::Reader;
pub use suggestion::suggest;
pub use text::{escaped, escaped_json, escaped_line, is_control, plain, printable};
pub use values::{Redacted, Whole, check_key};

/// One key of a document, for the reference.
#[derive(Debug)]
pub struct Key {
    /// Its name.
    pub name: &'static str,
    /// Other names of the key.
    pub aliases: &'static [&'static str],
    /// What the key accepts, in words.
    pub expected: &'static str,
    /// Its default, as JSON; `None`: it has none.
    pub default: fn() -> Option<Value>,
    /// Its documentation, Markdown.
    pub doc: &'static [&'static str],
    /// The keys below it.
    pub keys: fn() -> Vec<Key>,
}

/// A type of values in documents.
pub trait Property: Sized + Serialize {
    /// What is accepted, for errors and docs, and whether errors may quote a refused value.
    const EXPECTED: Expected;

    /// Reads one value.
    fn from_json(value: &Value) -> Result<Self, SchemaError>;

    /// Value of a missing key without a default; `None`: the key is required.
    fn absent() -> Option<Self> {
        None
    }

    /// The keys of a document.
    fn keys() -> Vec<Key> {
        Vec::new()
    }
}

/// Declares a document: see the [module](crate::schema).
///
/// A field is `name: Type;` (required, unless it is an `Option`), `name: Type = default;`, or
/// `name | "alias": Type …`.
#[macro_export]
macro_rules! document {
    (
        $(#[$meta:meta])*
        pub struct $name:ident {
            $(
                $(#[doc = $doc:literal])+
                $field:ident $(| $alias:literal)* : $ty:ty $(= $default:expr)? ;
            )*
        }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, serde::Serialize)]
        pub struct $name {
            $( $(#[doc = $doc])+ pub $field: $ty, )*
        }

        impl $crate::schema::Property for $name {
            const EXPECTED: $crate::schema::Expected =
                $crate::schema::Expected::secret("an object");

            fn from_json(value: &serde_json::Value) -> Result<Self, $crate::schema::SchemaError> {
                let known = &[$( stringify!($field), $($alias,)* )*];
                let mut reader = $crate::schema::Reader::new(value, known)?;
                let document = Self {
                    $( $field: reader.take(
                        stringify!($field),
                        &[$($alias),*],
                        || $crate::document!(@default $($default)?),
                    )?, )*
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
                    expected: <$ty as $crate::schema::Property>::EXPECTED.words(),
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

/// Declares a word out of a closed list: `pub enum Accel ("the list for errors") { Auto = "auto", …
/// }`.
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
            /// Its word.
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
            const EXPECTED: $crate::schema::Expected =
                $crate::schema::Expected::choice($expected, &[$($word),*]);

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
    fn more_entries_than_the_limit_are_refused() {
        let parts: serde_json::Map<_, _> =
            (0..4097).map(|n| (n.to_string(), json!({"path": "/"}))).collect();
        assert_eq!(
            refusal(&json!({"parts": parts})),
            "parts: expected at most 4096 entries, got 4097"
        );
        let list = Vec::<bool>::from_json(&json!(vec![true; 4097])).unwrap_err();
        assert_eq!(list.to_string(), ": expected at most 4096 entries, got 4097");
        assert_eq!(Vec::<bool>::from_json(&json!(vec![true; 4096])).unwrap().len(), 4096);
        assert_eq!(
            refusal(&json!({"parts": {"a\u{1b}": {"path": "/"}}})),
            "parts.a\\u{1b}: expected a name without control characters, got one with them"
        );
    }

    #[test]
    fn errors_name_the_path_and_the_value() {
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
            refusal(&json!({"count": "4"})),
            "count: expected a whole number from 1 to 16, got \"4\""
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
