//! Stemcells of a group: every host has each of them, under one cid.

use std::io;

use super::client::Reply;
use super::forwarded_call::{Answered, ForwardedCall, Outcome};
use super::members::{Member, Members};
use crate::error::{Error, ErrorKind, Result};
use crate::rpc::response::Response;
use crate::rpc::response_writer::Delivery;
use crate::rpc::undo::Undo;

/// Has all hosts import the image at the same time. A host that has the image does not receive it
/// again. A draining host that does not answer is left out: it gets no VMs.
///
/// # Errors
/// The first failure of another host. The hosts that succeeded then remove the stemcell.
pub(super) fn create(members: &Members, call: &ForwardedCall<'_>) -> Outcome {
    let undo = call.call.choose_cid(None);
    let sent = if members.all().len() > 1 { call.replicated() } else { call.clone() };
    let answers = members.at_once(|member| sent.send(&member.client, undo.as_ref()));
    let mut created = Vec::new();
    let mut failed = None;
    for (member, answer) in members.all().iter().zip(answers) {
        match answer {
            Ok(answered) if answered.is_success() => created.push((member, answered)),
            Err(error) if member.draining => {
                tracing::warn!(
                    host = member.client.name,
                    "the draining host does not have the stemcell: {}",
                    error.report()
                );
            }
            other => failed = failed.or(Some(other)),
        }
    }
    match failed {
        None => merged(created.into_iter().map(|(_, answered)| answered).collect()),
        Some(failed) => {
            roll_back(created, call, undo.as_ref());
            failed.map(Answered::into_outcome)
        }
    }
}

/// Has the hosts that created the stemcell remove it: the Director does not receive its cid.
fn roll_back(created: Vec<(&Member, Answered)>, call: &ForwardedCall<'_>, undo: Option<&Undo>) {
    std::thread::scope(|threads| {
        for (member, answered) in created {
            threads.spawn(move || {
                let lost = io::ErrorKind::NotConnected.into();
                answered.reply.report_delivery(&Delivery::Lost(lost));
                // A host that finished long before the others no longer waits for that report.
                if let Some(undo) = undo.filter(|undo| !call.remove(&member.client, undo)) {
                    let (method, cid) = undo.call();
                    let host = &member.client.name;
                    tracing::warn!(host, "'{cid}' may remain on the host: `{method}` removes it");
                }
            });
        }
    });
}

/// Has all hosts delete the stemcell. Deleting one that a host does not have succeeds.
///
/// # Errors
/// If a host does not answer.
pub(super) fn delete(members: &Members, call: &ForwardedCall<'_>) -> Outcome {
    let answers = members.at_once(|member| call.send(&member.client, None));
    let mut answers: Vec<_> = answers.into_iter().collect::<Result<_>>()?;
    match answers.iter().position(|answer| !answer.is_success()) {
        Some(failed) => Ok(answers.swap_remove(failed).into_outcome()),
        None => merged(answers),
    }
}

/// Returns the first response with the replies of all hosts.
fn merged(answers: Vec<Answered>) -> Outcome {
    let (responses, replies): (Vec<Response>, Vec<Reply>) =
        answers.into_iter().map(|answered| (answered.response, answered.reply)).unzip();
    match responses.into_iter().next() {
        Some(first) => Ok((first, replies)),
        None => Err(Error::new(
            ErrorKind::Host,
            "no host has the stemcell: all are draining, and none answers",
        )
        .hint("`bosh-qemu-cpi host status` shows why the hosts do not answer")),
    }
}
