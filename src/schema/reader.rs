//! Reading an object key by key.

use serde_json::{Map, Value};

use super::{Problem, Property, SchemaError};

/// Takes the keys of one object one by one; what is left at the end is unknown.
pub struct Reader<'a> {
    left: Map<String, Value>,
    known: &'a [&'static str],
}

impl<'a> Reader<'a> {
    /// Reads `value`, which must be an object whose keys are all in `known`.
    pub fn new(value: &Value, known: &'a [&'static str]) -> Result<Self, SchemaError> {
        match value {
            Value::Object(map) => Ok(Self { left: map.clone(), known }),
            other => Err(SchemaError::value("an object", other)),
        }
    }

    /// Takes `name` or one of its `aliases`, but not two of them.
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

    /// Fails if a key is left that nobody took.
    pub fn finish(self) -> Result<(), SchemaError> {
        let Some(name) = self.left.keys().next() else { return Ok(()) };
        Err(SchemaError {
            path: printable(name),
            problem: Problem::Unknown { suggestion: suggest(name, self.known) },
        })
    }
}

/// A key as it may stand in a message: hostile keys are cut and their control characters escaped.
pub fn printable(key: &str) -> String {
    key.chars().take(64).flat_map(char::escape_debug).collect()
}

/// What a machine says that may be hostile, as it may stand in a message: no control characters but ends of lines.
pub fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { ' ' } else { c }).collect()
}

/// The word of `known` a person who typed `name` may have meant.
pub fn suggest(name: &str, known: &[&'static str]) -> Option<&'static str> {
    let short: String = name.chars().take(64).collect();
    known
        .iter()
        // Two letters swapped in a short word look unlike to the one measure, a suffix too many to the other.
        .filter(|word| {
            strsim::jaro_winkler(&short, word) > 0.8 || strsim::osa_distance(&short, word) == 1
        })
        .map(|word| (strsim::jaro_winkler(&short, word), *word))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, word)| word)
}
