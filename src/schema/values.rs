//! Types of values in documents.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::Serialize;
use serde_json::{Map, Value};

use super::text::{is_control, printable};
use super::{Expected, Key, Problem, Property, SchemaError};
use crate::link_name::LinkName;
use crate::units::MiB;

impl<T: Property> Property for Option<T> {
    const EXPECTED: Expected = T::EXPECTED;

    fn from_json(value: &Value) -> Result<Self, SchemaError> {
        if value.is_null() { Ok(None) } else { T::from_json(value).map(Some) }
    }

    fn absent() -> Option<Self> {
        Some(None)
    }

    fn keys() -> Vec<Key> {
        T::keys()
    }
}

impl<T: Property> Property for BTreeMap<String, T> {
    const EXPECTED: Expected = Expected::secret("an object of named entries");

    fn from_json(value: &Value) -> Result<Self, SchemaError> {
        let Value::Object(map) = value else {
            return Err(SchemaError::value(Self::EXPECTED, value));
        };
        ensure_entries(map.len())?;
        let entry = |(key, value): (&String, &Value)| {
            check_key(key)?;
            T::from_json(value)
                .map(|value| (key.clone(), value))
                .map_err(|e| e.under(&printable(key)))
        };
        map.iter().map(entry).collect()
    }

    fn absent() -> Option<Self> {
        Some(BTreeMap::new())
    }

    fn keys() -> Vec<Key> {
        T::keys()
    }
}

/// The most entries of a list or of an object with entries that its author names.
const MAX_ENTRIES: usize = 4096;

fn ensure_entries(count: usize) -> Result<(), SchemaError> {
    if count <= MAX_ENTRIES {
        return Ok(());
    }
    // The text names the constant above, which `concat!` cannot.
    let (expected, found) = ("at most 4096 entries", count.to_string());
    Err(SchemaError { path: String::new(), problem: Problem::Value { expected, found } })
}

/// Checks the name of an entry that its author chooses: messages, logs and tables show it.
///
/// # Errors
/// For a name with control characters. The path of the error is the escaped name.
pub fn check_key(key: &str) -> Result<(), SchemaError> {
    if !key.contains(is_control) {
        return Ok(());
    }
    let (expected, found) = ("a name without control characters", "one with them".to_owned());
    Err(SchemaError { path: printable(key), problem: Problem::Value { expected, found } })
}

impl<T: Property> Property for Vec<T> {
    const EXPECTED: Expected = Expected::secret("an array");

    fn from_json(value: &Value) -> Result<Self, SchemaError> {
        let Value::Array(items) = value else {
            return Err(SchemaError::value(Self::EXPECTED, value));
        };
        ensure_entries(items.len())?;
        let item =
            |(i, value): (usize, &Value)| T::from_json(value).map_err(|e| e.under(&i.to_string()));
        items.iter().enumerate().map(item).collect()
    }

    fn absent() -> Option<Self> {
        Some(Vec::new())
    }

    fn keys() -> Vec<Key> {
        T::keys()
    }
}

impl Property for bool {
    const EXPECTED: Expected = Expected::choice("true or false", &["true", "false"]);

    fn from_json(value: &Value) -> Result<Self, SchemaError> {
        value.as_bool().ok_or_else(|| SchemaError::value(Self::EXPECTED, value))
    }
}

impl Property for String {
    const EXPECTED: Expected = Expected::text("a non-empty string");

    fn from_json(value: &Value) -> Result<Self, SchemaError> {
        match value.as_str() {
            Some(text) if !text.is_empty() && !text.contains('\0') => Ok(text.to_owned()),
            _ => Err(SchemaError::value(Self::EXPECTED, value)),
        }
    }
}

impl Property for PathBuf {
    const EXPECTED: Expected = Expected::text("an absolute path");

    fn from_json(value: &Value) -> Result<Self, SchemaError> {
        match value.as_str() {
            Some(text) if text.starts_with('/') && !text.contains('\0') => Ok(text.into()),
            _ => Err(SchemaError::value(Self::EXPECTED, value)),
        }
    }
}

impl Property for MiB {
    const EXPECTED: Expected = Expected::number("a whole number of MiB from 1 to 67108864");

    fn from_json(value: &Value) -> Result<Self, SchemaError> {
        let size = value.as_u64().filter(|mib| *mib > 0).and_then(MiB::new);
        size.ok_or_else(|| SchemaError::value(Self::EXPECTED, value))
    }
}

impl Property for LinkName {
    const EXPECTED: Expected =
        Expected::text("a link name of 1 to 15 letters, digits, \".\", \"_\" and \"-\"");

    fn from_json(value: &Value) -> Result<Self, SchemaError> {
        let name = value.as_str().and_then(|text| LinkName::parse(text).ok());
        name.ok_or_else(|| SchemaError::value(Self::EXPECTED, value))
    }
}

impl Property for Map<String, Value> {
    const EXPECTED: Expected = Expected::secret("an object");

    fn from_json(value: &Value) -> Result<Self, SchemaError> {
        let map = value.as_object().ok_or_else(|| SchemaError::value(Self::EXPECTED, value))?;
        map.keys().try_for_each(|key| check_key(key))?;
        Ok(map.clone())
    }

    fn absent() -> Option<Self> {
        Some(Map::new())
    }
}

/// A whole number from `MIN` to `MAX`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Whole<const MIN: u64, const MAX: u64>(u64);

impl<const MIN: u64, const MAX: u64> Whole<MIN, MAX> {
    /// `number`. The compiler checks its range.
    pub const fn of(number: u64) -> Self {
        assert!(number >= MIN && number <= MAX);
        Self(number)
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// Makes [`Whole`] a property for each range in use, with the range in words.
macro_rules! whole {
    ($($min:literal ..= $max:literal),* $(,)?) => {$(
        impl Property for Whole<$min, $max> {
            const EXPECTED: Expected =
                Expected::number(concat!("a whole number from ", $min, " to ", $max));

            fn from_json(value: &Value) -> Result<Self, SchemaError> {
                let number = value.as_u64().filter(|n| ($min..=$max).contains(n));
                number.map(Self).ok_or_else(|| SchemaError::value(Self::EXPECTED, value))
            }
        }
    )*};
}

whole! {
    0..=128,
    0..=1048576,
    1..=16,
    1..=128,
    1..=512,
    1..=4094,
    1..=65535,
    1..=10000,
    1..=86400,
    1..=1000000000,
    576..=65535,
}

/// A secret: settings or a credential. Neither its `Debug` nor an error of its document shows it.
#[derive(Clone, PartialEq, Eq, Default, Serialize)]
#[serde(transparent)]
pub struct Redacted<T>(pub T);

impl<T> fmt::Debug for Redacted<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl<T: Property> Property for Redacted<T> {
    const EXPECTED: Expected = Expected::secret(T::EXPECTED.words());

    fn from_json(value: &Value) -> Result<Self, SchemaError> {
        T::from_json(value).map(Self).map_err(SchemaError::redacted)
    }

    fn absent() -> Option<Self> {
        T::absent().map(Self)
    }
}
