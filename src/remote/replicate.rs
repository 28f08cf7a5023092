//! Stemcells: on every host, under one cid.

use super::group::{Member, Outcome};
use crate::error::Result;
use crate::remote::forwarded_call::{Answered, ForwardedCall};
use crate::rpc::call::Undo;
use crate::rpc::outlet::Delivery;

/// Has all hosts import the image. It is sent to all at the same time, and to none that has it. A draining host that can
/// not be asked does without: it gets no VMs.
pub fn create(members: &[Member], errand: &ForwardedCall<'_>) -> Outcome {
    let undo = errand.call.creates(None);
    let several = if members.len() > 1 { errand.everywhere() } else { errand.clone() };
    let answers = at_once(members, |member| several.send(&member.host, undo.as_ref()));
    let mut made = Vec::new();
    let mut failed = None;
    for (member, answer) in members.iter().zip(answers) {
        match answer {
            Ok(answered) if answered.is_success() => made.push((member, answered)),
            Err(error) if member.draining => {
                tracing::warn!(
                    host = member.host.name,
                    "a draining host has not got the stemcell: {}",
                    error.report()
                );
            }
            other => failed = failed.or(Some(other)),
        }
    }
    match failed {
        None => together(made.into_iter().map(|(_, answered)| answered).collect()),
        Some(failed) => {
            take_back(made, errand, undo.as_ref());
            failed.map(Answered::into_outcome)
        }
    }
}

/// Has those who made it remove it: nobody will ever hear of it.
fn take_back(made: Vec<(&Member, Answered)>, errand: &ForwardedCall<'_>, undo: Option<&Undo>) {
    std::thread::scope(|threads| {
        for (member, answered) in made {
            threads.spawn(move || {
                let unheard = std::io::ErrorKind::NotConnected.into();
                answered.told.tell(&Delivery::Lost(unheard));
                // One that finished long before the others waits no more to be told.
                if let Some(undo) = undo.filter(|undo| !errand.is_undone(&member.host, undo)) {
                    let (method, cid) = undo.call();
                    let host = &member.host.name;
                    tracing::warn!(host, "'{cid}' may be left there: `{method}` removes it");
                }
            });
        }
    });
}

/// Has all hosts delete it, whether they have it or not.
pub fn delete(members: &[Member], errand: &ForwardedCall<'_>) -> Outcome {
    let answers = at_once(members, |member| errand.send(&member.host, None));
    let answers: Vec<_> = answers.into_iter().collect::<Result<_>>()?;
    match answers.iter().position(|answer| !answer.is_success()) {
        Some(failed) => Ok(answers.into_iter().nth(failed).expect("it was found").into_outcome()),
        None => together(answers),
    }
}

/// One answer for all.
fn together(answers: Vec<Answered>) -> Outcome {
    let (mut responses, told): (Vec<_>, Vec<_>) =
        answers.into_iter().map(|answered| (answered.response, answered.told)).unzip();
    let first = responses.drain(..).next();
    let nobody = || {
        crate::error::Error::new(
            crate::error::ErrorKind::Host,
            "no host could be asked: all are draining",
        )
    };
    Ok((first.ok_or_else(nobody)?, told))
}

fn at_once<T: Send>(members: &[Member], act: impl Fn(&Member) -> T + Sync) -> Vec<T> {
    std::thread::scope(|threads| {
        let acts: Vec<_> = members.iter().map(|member| threads.spawn(|| act(member))).collect();
        acts.into_iter().map(|act| act.join().expect("no panic")).collect()
    })
}
