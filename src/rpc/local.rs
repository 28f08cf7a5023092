//! Runs calls on this host.

use std::time::Instant;

use tracing::{error, info, info_span, warn};

use super::call::{Call, Success};
use super::request::Request;
use super::response::Response;
use super::response_writer::Delivery;
use super::{Executed, Executor};
use crate::cpi::contract::Contract;
use crate::error::Error;
use crate::schema::printable;

/// Runs calls with the methods of a CPI, and undoes a create if its response did not reach the
/// caller: without the cid no caller can delete the object. A response that the pipe accepted
/// counts as received, even if the reader ends without reading it.
#[derive(Debug)]
pub struct LocalExecutor<V>(V);

impl<V: Contract> LocalExecutor<V> {
    /// An executor that calls `verbs`.
    pub fn new(verbs: V) -> Self {
        Self(verbs)
    }
}

impl<V: Contract> Executor for LocalExecutor<V> {
    fn execute(&self, request: &Request, call: Call) -> Executed<'_> {
        let span =
            info_span!("call", method = request.method, request_id = request.context.request_id());
        let entered = span.enter();
        let begin = Instant::now();
        let object = call.object().map(str::to_owned);
        let outcome = call.run(&self.0).map_err(|error| error.during(printable(&request.method)));
        let elapsed_ms = begin.elapsed().as_millis();
        let (response, undo) = match outcome {
            Ok(Success { result, undo }) => {
                let cid = undo.as_ref().map(|undo| undo.call().1).or(object.as_deref());
                // Other results are documents, which may hold values of the request.
                let is_boolean = matches!(result.get(), "true" | "false");
                info!(cid, result = is_boolean.then(|| result.get()), elapsed_ms, "done");
                (Response::success(&*result), undo)
            }
            Err(failure) => {
                let response = Response::failure(&failure);
                let (cid, error) = (object.as_deref(), response.error_type());
                warn!(cid, elapsed_ms, error, "{}", one_line(&failure));
                (response, None)
            }
        };
        drop(entered);
        let made = undo.is_some();
        let on_delivery = move |delivery| {
            let _call = span.entered();
            match (delivery, undo) {
                (Delivery::Received, _) => self.0.acknowledge(),
                (Delivery::Unknown(reason), undo) => {
                    let undo = undo.map(|undo| {
                        format!("; if the caller does not have it, {undo} removes the object")
                    });
                    warn!(
                        "the caller did not acknowledge the response: {reason}{}",
                        undo.unwrap_or_default()
                    );
                }
                (Delivery::Lost(reason), undo) => {
                    warn!("the response did not reach the caller: {reason}");
                    let Some(undo) = undo else { return };
                    match undo.run(&self.0) {
                        Ok(()) => warn!("undone: {undo}"),
                        Err(failure) => error!("cannot undo: {undo}: {}", one_line(&failure)),
                    }
                }
            }
        };
        Executed { response, made, on_delivery: Box::new(on_delivery) }
    }
}

fn one_line(error: &Error) -> String {
    error.report().replace('\n', " ")
}
