//! The arguments of a request, read one by one in the order of the CPI contract.

use serde_json::Value;
use serde_json::value::RawValue;

use crate::cid::Cid;
use crate::cpi::contract::networks::Networks;
use crate::cpi::contract::{AgentId, Env, Metadata};
use crate::error::{Error, ErrorKind, Result};
use crate::rpc::request::Request;
use crate::schema::{Property, SchemaError};

/// The longest argument, bytes. Every record of an object keeps its tags and its properties, and
/// every call that reads the record reads them. Real ones have a few kB.
const MAX_ARGUMENT: usize = 64 << 10;

/// The longest env and the longest networks, bytes. They go to the agent; env has certificates.
const MAX_SETTINGS: usize = 4 << 20;

/// The most networks of a VM. Each group of them is a NIC, and a VM has 32 at most.
const MAX_NETWORKS: usize = 64;

/// The most disks that create_vm may name. No VM has slots for more.
const MAX_DISKS: usize = 256;

/// The most tags of an object.
const MAX_TAGS: usize = 1000;

/// Reads arguments by position. Every error names the argument's position and name, never its
/// value.
pub struct Arguments<'a> {
    values: &'a [Box<RawValue>],
    /// How many were read.
    position: usize,
}

impl<'a> Arguments<'a> {
    /// The arguments of `request`, none read.
    pub fn of(request: &'a Request) -> Self {
        Self { values: &request.arguments, position: 0 }
    }

    /// Reads a value of a type that configuration documents use, too.
    pub fn property<T: Property>(&mut self, name: &str) -> Result<T> {
        let what = self.label(name);
        let text = self.take().ok_or_else(|| missing(&what, T::EXPECTED.words()))?;
        ensure_bytes(&what, text, MAX_ARGUMENT)?;
        T::from_json(&value(text)).map_err(|e| e.in_request(&what))
    }

    /// Reads tags: the metadata of a VM, a disk or a snapshot.
    pub fn metadata(&mut self, name: &str) -> Result<Metadata> {
        let what = self.label(name);
        let tags: Metadata = self.property(name)?;
        ensure_entries(&what, tags.len(), MAX_TAGS)?;
        Ok(tags)
    }

    /// Reads a value that may be null, or missing at the end.
    pub fn optional<T: Property>(&mut self, name: &str) -> Result<Option<T>> {
        let what = self.label(name);
        self.take().map_or(Ok(None), |text| {
            ensure_bytes(&what, text, MAX_ARGUMENT)?;
            Option::from_json(&value(text)).map_err(|e| e.in_request(&what))
        })
    }

    /// Reads a cid.
    pub fn cid<T: Cid>(&mut self, name: &str) -> Result<T> {
        let what = self.label(name);
        let text = self.take().ok_or_else(|| missing(&what, CID))?;
        cid(&value(text), &what)
    }

    /// Reads a cid that may be null, or missing at the end.
    pub fn optional_cid<T: Cid>(&mut self, name: &str) -> Result<Option<T>> {
        let what = self.label(name);
        let given = self.take().map(value).filter(|value| !value.is_null());
        given.map(|value| cid(&value, &what)).transpose()
    }

    /// Reads an array of cids.
    pub fn cids<T: Cid>(&mut self, name: &str) -> Result<Vec<T>> {
        let what = self.label(name);
        let text = self.take().ok_or_else(|| missing(&what, "an array of cids"))?;
        match value(text) {
            Value::Array(items) => {
                ensure_entries(&what, items.len(), MAX_DISKS)?;
                let item = |(i, item)| cid(item, &format!("{what}.{i}"));
                items.iter().enumerate().map(item).collect()
            }
            other => Err(SchemaError::value("an array of cids", &other).in_request(&what)),
        }
    }

    /// Reads the agent's id.
    pub fn agent_id(&mut self, name: &str) -> Result<AgentId> {
        let what = self.label(name);
        let value = value(self.take().ok_or_else(|| missing(&what, AgentId::EXPECTED))?);
        let id = value.as_str().and_then(AgentId::parse);
        id.ok_or_else(|| SchemaError::value(AgentId::EXPECTED, &value).in_request(&what))
    }

    /// Reads the networks, keeping their order.
    pub fn networks(&mut self, name: &str) -> Result<Networks> {
        let what = self.label(name);
        let text = self.take().ok_or_else(|| missing(&what, "an object of networks"))?;
        ensure_bytes(&what, text, MAX_SETTINGS)?;
        let networks = Networks::from_json(text).map_err(|e| e.in_request(&what))?;
        ensure_entries(&what, networks.iter().len(), MAX_NETWORKS)?;
        Ok(networks)
    }

    /// Reads the agent's env, kept byte for byte.
    pub fn env(&mut self, name: &str) -> Result<Env> {
        let what = self.label(name);
        let text = self.take().ok_or_else(|| missing(&what, "an object"))?;
        ensure_bytes(&what, text, MAX_SETTINGS)?;
        Env::new(text)
            .ok_or_else(|| SchemaError::value("an object", &value(text)).in_request(&what))
    }

    /// Ends the list.
    ///
    /// # Errors
    /// [`ErrorKind::BadRequest`] if the request has more arguments than were read.
    pub fn finish(self) -> Result<()> {
        let (given, expected) = (self.values.len(), self.position);
        if given <= expected {
            return Ok(());
        }
        let message = format!("{given} arguments given, {expected} expected");
        Err(Error::new(ErrorKind::BadRequest, message))
    }

    /// The next argument's name in errors.
    fn label(&self, name: &str) -> String {
        format!("argument {}, {name}", self.position + 1)
    }

    fn take(&mut self) -> Option<&'a RawValue> {
        let value = self.values.get(self.position).map(|value| &**value);
        self.position += 1;
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

fn ensure_bytes(what: &str, text: &RawValue, max: usize) -> Result<()> {
    ensure_at_most(what, text.get().len(), max, "bytes")
}

fn ensure_entries(what: &str, count: usize, max: usize) -> Result<()> {
    ensure_at_most(what, count, max, "entries")
}

fn ensure_at_most(what: &str, count: usize, max: usize, unit: &str) -> Result<()> {
    if count <= max {
        return Ok(());
    }
    let message = format!("{what}: has {count} {unit}, the limit is {max}");
    Err(Error::new(ErrorKind::BadRequest, message))
}

/// Parses a text that [`Request::parse`] has already checked to be JSON.
fn value(text: &RawValue) -> Value {
    serde_json::from_str(text.get()).unwrap_or_default()
}
