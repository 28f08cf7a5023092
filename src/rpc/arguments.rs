//! A request's arguments, taken one by one in the contract's order.

use serde_json::Value;
use serde_json::value::RawValue;

use crate::cid::Cid;
use crate::cpi::networks::Networks;
use crate::cpi::verbs::{AgentId, Env};
use crate::error::{Error, ErrorKind, Result};
use crate::rpc::request::Request;
use crate::schema::{Property, SchemaError};

/// Takes arguments by position. Every error names position and name, none a value.
pub struct Arguments<'a> {
    values: &'a [Box<RawValue>],
    taken: usize,
}

impl<'a> Arguments<'a> {
    /// Those of `request`.
    pub fn of(request: &'a Request) -> Self {
        Self { values: &request.arguments, taken: 0 }
    }

    /// A value of a type that documents have, too.
    pub fn property<T: Property>(&mut self, name: &str) -> Result<T> {
        let what = self.label(name);
        let text = self.take().ok_or_else(|| missing(&what, T::EXPECTED.words()))?;
        T::from_json(&value(text)).map_err(|e| e.in_request(&what))
    }

    /// The same, or null, or nothing at the end.
    pub fn optional<T: Property>(&mut self, name: &str) -> Result<Option<T>> {
        let what = self.label(name);
        self.take().map_or(Ok(None), |text| {
            Option::from_json(&value(text)).map_err(|e| e.in_request(&what))
        })
    }

    /// A cid.
    pub fn cid<T: Cid>(&mut self, name: &str) -> Result<T> {
        let what = self.label(name);
        let text = self.take().ok_or_else(|| missing(&what, CID))?;
        cid(&value(text), &what)
    }

    /// A cid, or null or nothing.
    pub fn optional_cid<T: Cid>(&mut self, name: &str) -> Result<Option<T>> {
        let what = self.label(name);
        let given = self.take().map(value).filter(|value| !value.is_null());
        given.map(|value| cid(&value, &what)).transpose()
    }

    /// An array of cids.
    pub fn cids<T: Cid>(&mut self, name: &str) -> Result<Vec<T>> {
        let what = self.label(name);
        let text = self.take().ok_or_else(|| missing(&what, "an array of cids"))?;
        match value(text) {
            Value::Array(items) => items
                .iter()
                .enumerate()
                .map(|(i, item)| cid(item, &format!("{what}.{i}")))
                .collect(),
            other => Err(SchemaError::value("an array of cids", &other).in_request(&what)),
        }
    }

    /// The agent's id.
    pub fn agent_id(&mut self, name: &str) -> Result<AgentId> {
        let what = self.label(name);
        let value = value(self.take().ok_or_else(|| missing(&what, AgentId::EXPECTED))?);
        let id = value.as_str().and_then(AgentId::parse);
        id.ok_or_else(|| SchemaError::value(AgentId::EXPECTED, &value).in_request(&what))
    }

    /// Networks in the order they were written.
    pub fn networks(&mut self, name: &str) -> Result<Networks> {
        let what = self.label(name);
        let text = self.take().ok_or_else(|| missing(&what, "an object of networks"))?;
        Networks::from_json(text).map_err(|e| e.in_request(&what))
    }

    /// What the agent is told, as it was written.
    pub fn env(&mut self, name: &str) -> Result<Env> {
        let what = self.label(name);
        let text = self.take().ok_or_else(|| missing(&what, "an object"))?;
        Env::new(text)
            .ok_or_else(|| SchemaError::value("an object", &value(text)).in_request(&what))
    }

    /// Fails if more was given than the contract has.
    pub fn finish(self) -> Result<()> {
        let (given, taken) = (self.values.len(), self.taken);
        if given <= taken {
            return Ok(());
        }
        Err(Error::new(ErrorKind::BadRequest, format!("{given} arguments given, {taken} expected")))
    }

    /// How the next argument is called in errors.
    fn label(&self, name: &str) -> String {
        format!("argument {}, {name}", self.taken + 1)
    }

    fn take(&mut self) -> Option<&'a RawValue> {
        let value = self.values.get(self.taken).map(|value| &**value);
        self.taken += 1;
        value
    }
}

const CID: &str = "a cid";

fn cid<T: Cid>(value: &Value, what: &str) -> Result<T> {
    let text = value.as_str().ok_or_else(|| SchemaError::value(CID, value).in_request(what))?;
    T::parse(text).map_err(|error| Error::new(ErrorKind::BadRequest, format!("{what}: {error}")))
}

fn missing(what: &str, expected: &str) -> Error {
    Error::new(ErrorKind::BadRequest, format!("{what}: missing; expected {expected}"))
}

/// The value of a text that [`Request::parse`] has checked.
fn value(text: &RawValue) -> Value {
    serde_json::from_str(text.get()).unwrap_or_default()
}
