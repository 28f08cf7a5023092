//! Calls carried out on this host.

use std::time::Instant;

use tracing::{error, info, info_span, warn};

use super::call::{Call, Success};
use super::request::Request;
use super::response::Response;
use super::response_writer::Delivery;
use super::{Executed, Executor};
use crate::cpi::verbs::Verbs;
use crate::error::Error;
use crate::schema::printable;

/// Carries calls out by its verbs, and undoes a create whose answer reached nobody: without its cid nobody can delete it.
/// An answer that the pipe took and nobody read looks like any other.
#[derive(Debug)]
pub struct LocalExecutor<V>(V);

impl<V: Verbs> LocalExecutor<V> {
    /// Carries out by `verbs`.
    pub fn new(verbs: V) -> Self {
        Self(verbs)
    }
}

impl<V: Verbs> Executor for LocalExecutor<V> {
    fn execute(&self, request: &Request, call: Call) -> Executed<'_> {
        let span =
            info_span!("call", method = request.method, request_id = request.context.request_id());
        let entered = span.enter();
        let begin = Instant::now();
        let outcome = call.run(&self.0).map_err(|error| error.during(printable(&request.method)));
        let elapsed_ms = begin.elapsed().as_millis();
        let (response, undo) = match outcome {
            Ok(Success { result, undo }) => {
                info!(elapsed_ms, "done");
                (Response::success(&*result), undo)
            }
            Err(failure) => {
                let response = Response::failure(&failure);
                warn!(elapsed_ms, error = response.error_type(), "{}", one_line(&failure));
                (response, None)
            }
        };
        drop(entered);
        let made = undo.is_some();
        let on_delivery = move |delivery| {
            let _call = span.entered();
            match (delivery, undo) {
                (Delivery::Received, _) => self.0.acknowledge(),
                (Delivery::Unknown(silence), undo) => {
                    let undo =
                        undo.map(|undo| format!("; if nobody has it, what is left goes by {undo}"));
                    warn!(
                        "nobody said that they took the answer: {silence}{}",
                        undo.unwrap_or_default()
                    );
                }
                (Delivery::Lost(unanswered), undo) => {
                    warn!("nobody took the answer: {unanswered}");
                    let Some(undo) = undo else { return };
                    match undo.run(&self.0) {
                        Ok(()) => warn!("undone: {undo}"),
                        Err(failure) => error!("not undone: {undo}: {}", one_line(&failure)),
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
