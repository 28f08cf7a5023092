//! No command: answer one request of the Director or bosh-cli.

use std::path::Path;

use crate::config::Config;
use crate::cpi::verbs::Verbs;
use crate::error::{Error, ErrorKind, Result};
use crate::log;
use crate::rpc::{self, outlet::Outlet};

/// Answers the request on standard input. Configuration and log come up only when something is to be done, so
/// `info` works, and works fast, on a host whose configuration does not.
///
/// # Errors
/// Only when standard output can not be had; every other failure is an answer.
pub fn run(config: Option<&Path>) -> Result<()> {
    let outlet = Outlet::stdout()?;
    rpc::serve(std::io::stdin(), outlet, |request| {
        let config = Config::load(config)?;
        log::init(&config.log);
        verbs(config.with_context(request.context.properties())?)
    });
    Ok(())
}

fn verbs(_config: Config) -> Result<Box<dyn Verbs>> {
    Err(Error::new(ErrorKind::NotImplemented, "nothing but info is implemented"))
}
