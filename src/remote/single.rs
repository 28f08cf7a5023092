//! Calls that one host elsewhere executes.

use serde_json::{Map, Value};

use super::client::Client;
use super::forwarded_call::{Answered, ForwardedCall, carried};
use crate::config::Config;
use crate::rpc::call::Call;
use crate::rpc::request::Request;
use crate::rpc::{Executed, Executor};

/// Forwards calls to one host.
pub struct SingleHost {
    client: Client,
    config: Config,
    /// Keys of the configuration that go into each request's context.
    context: Map<String, Value>,
}

impl SingleHost {
    /// Forwards calls to the host of `client`, with `context` added to each request's context.
    pub fn new(client: Client, config: Config, context: Map<String, Value>) -> Self {
        Self { client, config, context }
    }
}

impl Executor for SingleHost {
    fn execute(&self, request: &Request, call: Call) -> Executed<'_> {
        let forwarded = ForwardedCall::new(request, &call, &self.config, &self.context);
        let answered =
            forwarded.and_then(|call| call.send(&self.client, call.call.choose_cid(None).as_ref()));
        carried(request, answered.map(Answered::into_outcome))
    }
}
