//! The hosts of a group, and queries to all of them at the same time.

use std::time::{Duration, Instant};

use super::client::{CallError, Client};
use super::forwarded_call::ForwardedCall;
use crate::cid::is_from_host;
use crate::config::Config;
use crate::error::{Error, Result};

/// Time a host has to answer a query. Half of the call's remaining time at most: another host still
/// has to execute the call if this one hangs.
const QUERY_TIMEOUT: Duration = Duration::from_secs(20);

/// One host of a group.
pub(super) struct Member {
    /// How it is reached, and its name.
    pub client: Client,
    /// Whether it gets no new VMs and disks.
    pub draining: bool,
}

/// All hosts of a group, in the order of the configuration; at least one.
pub(super) struct Members(Vec<Member>);

impl Members {
    /// Returns the `hosts` of `config`.
    pub fn new(config: &Config) -> Self {
        let member = |entry| {
            let client = Client::for_entry(entry);
            Member { client, draining: entry.draining }
        };
        Self(config.hosts.iter().map(member).collect())
    }

    /// Returns the members in order.
    pub fn all(&self) -> &[Member] {
        &self.0
    }

    /// Returns the members whose trace `cid` bears. Two names can have the same trace.
    pub fn named_in(&self, cid: &str) -> impl Iterator<Item = &Member> {
        self.0.iter().filter(move |member| is_from_host(cid, &member.client.name))
    }

    /// Runs `act` for every member at the same time, and returns the results in order.
    pub fn at_once<T: Send>(&self, act: impl Fn(&Member) -> T + Sync) -> Vec<T> {
        std::thread::scope(|threads| {
            let act = &act;
            let running: Vec<_> =
                self.0.iter().map(|member| threads.spawn(move || act(member))).collect();
            running.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        })
    }

    /// Sends `query` to every member at the same time, and returns the answers in order.
    pub fn query_all<T: Send>(
        &self,
        query: impl Fn(&Client) -> Result<T, CallError> + Sync,
    ) -> Vec<Result<T>> {
        self.at_once(|member| query(&member.client).map_err(|failed| failed.error))
    }

    /// Returns for each of `cids` the member that has it.
    ///
    /// # Errors
    /// If no member that answers has a cid, and another does not answer: that one may have it.
    pub fn find(&self, call: &ForwardedCall<'_>, cids: &[&str]) -> Result<Vec<Option<&Member>>> {
        let wanted: Vec<_> = cids.iter().map(|cid| (*cid).to_owned()).collect();
        let deadline = query_deadline(call);
        let answers = self.query_all(|client| client.find(&wanted, deadline));
        wanted.iter().map(|cid| self.member_with(cid, &answers)).collect()
    }

    fn member_with(
        &self,
        cid: &String,
        answers: &[Result<Vec<String>>],
    ) -> Result<Option<&Member>> {
        let has =
            |answer: &Result<Vec<String>>| answer.as_ref().is_ok_and(|found| found.contains(cid));
        let found = self.0.iter().zip(answers).find(|(_, answer)| has(answer));
        match (found, answers.iter().find_map(|answer| answer.as_ref().err())) {
            (Some((member, _)), _) => Ok(Some(member)),
            (None, None) => Ok(None),
            (None, Some(silent)) => {
                let message = format!(
                    "'{cid}' is on no host that answers, and one does not: {}",
                    silent.report()
                );
                Err(Error::new(silent.kind(), message)
                    .hint("bring that host back, or remove it from 'hosts' if it is lost for good"))
            }
        }
    }

    /// Returns the member that has `cid`, asking first the one whose trace the cid bears.
    ///
    /// # Errors
    /// As [`Members::find`].
    pub fn find_one(&self, call: &ForwardedCall<'_>, cid: &str) -> Result<Option<&Member>> {
        let wanted = [cid.to_owned()];
        for member in self.named_in(cid) {
            let found = member.client.find(&wanted, query_deadline(call));
            if !found.map_err(|failed| failed.error)?.is_empty() {
                return Ok(Some(member));
            }
        }
        Ok(self.find(call, &[cid])?.remove(0))
    }
}

/// Returns when a query before `call` must be answered.
pub(super) fn query_deadline(call: &ForwardedCall<'_>) -> Instant {
    let now = Instant::now();
    now + QUERY_TIMEOUT.min(call.deadline.saturating_duration_since(now) / 2)
}
