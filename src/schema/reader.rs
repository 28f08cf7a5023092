//! Reads a JSON object key by key.

use serde_json::{Map, Value};

use super::suggestion::suggest;
use super::text::printable;
use super::{Expected, Problem, Property, SchemaError};

/// The keys of one object that are not read yet. A key that is left at the end is unknown.
pub struct Reader<'a> {
    left: Map<String, Value>,
    known: &'a [&'static str],
}

impl<'a> Reader<'a> {
    /// Begins to read `value`. `known` has all keys of the document, for suggestions.
    pub fn new(value: &Value, known: &'a [&'static str]) -> Result<Self, SchemaError> {
        match value {
            Value::Object(map) => Ok(Self { left: map.clone(), known }),
            other => Err(SchemaError::value(Expected::secret("an object"), other)),
        }
    }

    /// Takes the value of `name` or of one of its `aliases`. Two of them are an error.
    pub fn take<T: Property>(
        &mut self,
        name: &'static str,
        aliases: &[&'static str],
        default: impl FnOnce() -> Option<T>,
    ) -> Result<T, SchemaError> {
        let mut found: Option<(&str, Value)> = None;
        for spelling in std::iter::once(&name).chain(aliases) {
            let Some(value) = self.left.remove(*spelling) else { continue };
            if found.is_some() {
                return Err(SchemaError {
                    path: (*spelling).into(),
                    problem: Problem::Twice(name),
                });
            }
            found = Some((spelling, value));
        }
        match found {
            Some((spelling, value)) => T::from_json(&value).map_err(|e| e.under(spelling)),
            None => default().or_else(T::absent).ok_or_else(|| SchemaError {
                path: name.into(),
                problem: Problem::Missing(T::EXPECTED),
            }),
        }
    }

    /// Refuses a key that was not taken.
    pub fn finish(self) -> Result<(), SchemaError> {
        let Some(name) = self.left.keys().next() else { return Ok(()) };
        Err(SchemaError {
            path: printable(name),
            problem: Problem::Unknown { suggestion: suggest(name, self.known) },
        })
    }
}
