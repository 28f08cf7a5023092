//! JSON objects that keep the order of their keys and the text of their values.
//!
//! The order of create_vm's networks is the manifest's and decides which NIC is `eth0`. The agent
//! gets env verbatim. `serde_json`'s own map sorts keys and prints values anew, so it keeps
//! neither.

use std::collections::HashSet;
use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::value::RawValue;

/// A JSON object with ordered keys and verbatim values. Of a repeated key, the last value counts,
/// as in the clients' JSON parsers.
#[derive(Clone, Default)]
pub struct Object(Vec<(String, Box<RawValue>)>);

impl Object {
    /// The text of the value at `key`.
    pub fn get(&self, key: &str) -> Option<&RawValue> {
        self.0.iter().find(|(name, _)| name == key).map(|(_, value)| &**value)
    }

    /// Sets `key` to `value`, in its old place or at the end.
    ///
    /// # Panics
    /// If `value` has no JSON form. Strings, numbers and maps of strings have one.
    pub fn set(&mut self, key: &str, value: &(impl Serialize + ?Sized)) {
        let value = serde_json::value::to_raw_value(value).expect("a plain value is JSON");
        match self.0.iter_mut().find(|(name, _)| name == key) {
            Some((_, old)) => *old = value,
            None => self.0.push((key.to_owned(), value)),
        }
    }

    /// Keys and texts of their values, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &RawValue)> {
        self.0.iter().map(|(name, value)| (name.as_str(), &**value))
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether it has no keys.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Removes all but the last entry of each key.
    fn without_repeats(mut self) -> Self {
        let mut seen = HashSet::new();
        let keep: Vec<bool> =
            self.0.iter().rev().map(|(name, _)| seen.insert(name.as_str())).collect();
        if keep.contains(&false) {
            let mut keep = keep.into_iter().rev();
            self.0.retain(|_| keep.next().expect("one mark for each key"));
        }
        self
    }
}

/// Shows the keys only: values of requests may be secret.
impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.iter().map(|(name, _)| name)).finish()
    }
}

impl Serialize for Object {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, value) in &self.0 {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = Object;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object, A::Error> {
                let mut object = Object::default();
                while let Some(entry) = map.next_entry()? {
                    object.0.push(entry);
                }
                Ok(object.without_repeats())
            }
        }

        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_and_text_survive() {
        let text = r#"{"z":1.0e2,"a":null,"m":{"y":1, "x":18446744073709551616}}"#;
        let object: Object = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&object).unwrap(), text);
    }

    #[test]
    fn the_last_of_a_repeated_key_counts() {
        let object: Object = serde_json::from_str(r#"{"a":1,"b":2,"a":3,"c":4,"b":5}"#).unwrap();
        assert_eq!(serde_json::to_string(&object).unwrap(), r#"{"a":3,"c":4,"b":5}"#);
    }

    #[test]
    fn setting_replaces_in_place_or_appends() {
        let mut object: Object = serde_json::from_str(r#"{"mac":null,"ip":"::1"}"#).unwrap();
        object.set("mac", "52:54:00:00:00:01");
        object.set("use_dhcp", &true);
        assert_eq!(
            serde_json::to_string(&object).unwrap(),
            r#"{"mac":"52:54:00:00:00:01","ip":"::1","use_dhcp":true}"#
        );
    }

    #[test]
    fn values_do_not_show_in_debug() {
        let object: Object = serde_json::from_str(r#"{"key":"hunter2"}"#).unwrap();
        assert_eq!(format!("{object:?}"), r#"{"key"}"#);
    }
}
