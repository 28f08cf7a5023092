//! Calls carried out on one host elsewhere.

use serde_json::{Map, Value};

use super::caller::Host;
use super::errand::{Errand, carried};
use crate::config::Config;
use crate::rpc::call::Call;
use crate::rpc::request::Request;
use crate::rpc::{Executed, Executor};

/// Has calls carried out on one host.
pub struct OneHost {
    host: Host,
    config: Config,
    /// What the request's context says to the host beside its own keys.
    told: Map<String, Value>,
}

impl OneHost {
    /// Has them carried out on `host`, which is `told` so much of the configuration.
    pub fn new(host: Host, config: Config, told: Map<String, Value>) -> Self {
        Self { host, config, told }
    }
}

impl Executor for OneHost {
    fn execute(&self, request: &Request, call: Call) -> Executed<'_> {
        let errand = Errand::new(request, &call, &self.config, &self.told);
        let answered =
            errand.and_then(|errand| errand.send(&self.host, call.choose_cid(None).as_ref()));
        carried(request, answered.map(|answered| (answered.response, vec![answered.told])))
    }
}
