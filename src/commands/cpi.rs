//! No command: answer one request of the Director or bosh-cli.

use std::path::Path;

use crate::config::{self, Config};
use crate::cpi::Cpi;
use crate::error::Result;
use crate::log;
use crate::rpc::{self, Here, outlet::Outlet};

/// Answers the request on standard input. Configuration and log come up only when something is to be done, so
/// `info` works, and works fast, on a host whose configuration does not.
///
/// # Errors
/// Only when standard output can not be had; every other failure is an answer.
pub fn run(config: Option<&Path>) -> Result<()> {
    let outlet = Outlet::stdout()?;
    rpc::serve(std::io::stdin(), outlet, |request| {
        let file = config::file(config);
        let config = Config::load(file.as_deref())?;
        log::init(&config.log);
        let config = config.with_context(request.context.properties(), config::CONTEXT_KEYS)?;
        Ok(Box::new(Here::new(Cpi::new(config, file).called_by(request.context.director()))))
    });
    Ok(())
}
