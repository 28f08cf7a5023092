//! Without a command: answers one CPI request of the Director or bosh-cli.

use std::io::{self, IsTerminal, Write};
use std::path::Path;

use crate::commands::local;
use crate::config::{self, Document, TransportKind};
use crate::cpi::Cpi;
use crate::cpi::context::Context;
use crate::cpi::properties;
use crate::error::{Error, Result};
use crate::log;
use crate::remote::client::Client;
use crate::remote::group::Group;
use crate::remote::single::SingleHost;
use crate::rpc::request::Request;
use crate::rpc::response::Response;
use crate::rpc::{self, Executor, LocalExecutor, response_writer::ResponseWriter};

/// Answers the request on standard input. Reads configuration and sets up the log only for methods
/// that act, so `info` works, and works fast, on a host whose configuration is broken.
///
/// Every failure is an answer.
///
/// # Errors
/// If not even the answer can be written.
pub fn run(config: Option<&Path>) -> Result<()> {
    if io::stdin().is_terminal() {
        let note = "reading a CPI request from the terminal, end it with Ctrl-D; for the \
                    operator's commands see --help";
        let _ = writeln!(io::stderr(), "{note}");
    }
    let writer = match ResponseWriter::stdout() {
        Ok(writer) => writer,
        // The process has no descriptor left.
        Err(error) => {
            let answer = Response::failure(&error);
            return io::stdout()
                .write_all(answer.as_bytes())
                .map_err(|e| Error::os("write the answer", e));
        }
    };
    rpc::serve(io::stdin(), writer, |request| executor(config, request));
    Ok(())
}

/// Chooses the executor by the configuration and the request's context: this host, one remote host
/// (`transport`) or a group of remote hosts (`hosts`).
fn executor(config: Option<&Path>, request: &Request) -> Result<Box<dyn Executor>> {
    let file = config::path(config);
    let document = Document::read(file.as_deref())?;
    let config = document.config()?;
    local::check_defaults(&config, file.as_deref())?;
    log::init(&config.log);
    let context = request.context.properties();
    let config = config.with_context(context, config::CONTEXT_KEYS)?;
    properties::check_defaults(&config).map_err(|error| error.in_request("context"))?;
    if !config.hosts.is_empty() {
        return Ok(Box::new(Group::new(config, document.for_host(context))));
    }
    if config.transport.kind == TransportKind::Local {
        return Ok(Box::new(LocalExecutor::new(Cpi::new(
            Context::new(config, file).called_by(request.context.director()),
        ))));
    }
    let host = Client::for_single_host(config.transport.clone());
    Ok(Box::new(SingleHost::new(host, config, document.for_host(context))))
}
