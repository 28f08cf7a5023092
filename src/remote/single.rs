//! Calls carried out on one host elsewhere.

use serde_json::{Map, Value};

use super::client::Client;
use super::forwarded_call::{ForwardedCall, carried};
use crate::config::Config;
use crate::rpc::call::Call;
use crate::rpc::request::Request;
use crate::rpc::{Carried, Carrier};

/// Has calls carried out on one host.
pub struct SingleHost {
    host: Client,
    config: Config,
    /// What the request's context says to the host beside its own keys.
    told: Map<String, Value>,
}

impl SingleHost {
    /// Has them carried out on `host`, which is `told` so much of the configuration.
    pub fn new(host: Client, config: Config, told: Map<String, Value>) -> Self {
        Self { host, config, told }
    }
}

impl Carrier for SingleHost {
    fn carry(&self, request: &Request, call: Call) -> Carried<'_> {
        let errand = ForwardedCall::new(request, &call, &self.config, &self.told);
        let answered =
            errand.and_then(|errand| errand.send(&self.host, call.creates(None).as_ref()));
        carried(request, answered.map(|answered| (answered.response, vec![answered.told])))
    }
}
