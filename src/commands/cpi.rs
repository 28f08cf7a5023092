//! No command: answer one request of the Director or bosh-cli.

use std::path::Path;

use crate::config::{self, Document, TransportKind};
use crate::cpi::Cpi;
use crate::error::Result;
use crate::log;
use crate::remote::caller::Host;
use crate::remote::group::Group;
use crate::remote::one::OneHost;
use crate::rpc::request::Request;
use crate::rpc::{self, Carrier, Here, outlet::Outlet};

/// Answers the request on standard input. Configuration and log come up only when something is to be done, so
/// `info` works, and works fast, on a host whose configuration does not.
///
/// # Errors
/// Only when standard output can not be had; every other failure is an answer.
pub fn run(config: Option<&Path>) -> Result<()> {
    let outlet = Outlet::stdout()?;
    rpc::serve(std::io::stdin(), outlet, |request| carrier(config, request));
    Ok(())
}

/// Who carries the request out: this host, or one elsewhere.
fn carrier(config: Option<&Path>, request: &Request) -> Result<Box<dyn Carrier>> {
    let file = config::path(config);
    let document = Document::read(file.as_deref())?;
    let config = document.config()?;
    log::init(&config.log);
    let context = request.context.properties();
    let config = config.with_context(context, config::CONTEXT_KEYS)?;
    if !config.hosts.is_empty() {
        return Ok(Box::new(Group::new(config, document.for_host(context))));
    }
    if config.transport.kind == TransportKind::Local {
        return Ok(Box::new(Here::new(
            Cpi::new(config, file).called_by(request.context.director()),
        )));
    }
    let host = Host::only(config.transport.clone());
    Ok(Box::new(OneHost::new(host, config, document.for_host(context))))
}
