//! nftables over netlink, as far as we use it: a table with its chains and rules is compared, replaced or dropped.
//!
//! No `nft` program and no C library: hosts need not have them. `rule` says how a rule looks in the kernel.
//!
//! Every rule carries a fingerprint of itself as its comment. The kernel hands comments back unchanged, but not the
//! rule's bytes, so fingerprints are what is compared: a rule that was added, lost, moved or written by another
//! version of ours makes the table differ.

mod rule;

use std::fmt;

use netlink_bindings::nftables::{Chained, Nfgenmsg, Request};
use netlink_bindings::traits::Pusher;
use netlink_socket2::{NetlinkSocket, ReplyError};
use nix::errno::Errno;
use nix::libc;

pub(super) use rule::{Match, Rule, Verdict};

use crate::error::{Error, ErrorKind, Result};

/// A table of the family `inet`: IPv4 and IPv6. Its `Display` is nftables' language.
#[derive(Debug)]
pub(super) struct Table {
    /// At most 255 bytes (`NFT_NAME_MAXLEN`).
    pub name: String,
    pub chains: Vec<Chain>,
}

/// Rules that are asked in order, at one place of a packet's way. What none of them decides is accepted.
#[derive(Debug)]
pub(super) struct Chain {
    pub name: &'static str,
    pub hook: Hook,
    pub rules: Vec<Rule>,
}

/// A place of a packet's way through the kernel.
#[derive(Debug, Clone, Copy)]
pub(super) enum Hook {
    /// `type nat hook postrouting priority srcnat`: the source address may be rewritten.
    SourceNat,
}

impl Hook {
    /// Chain type, hook and priority (`linux/netfilter.h`, `NF_INET_POST_ROUTING`, `NF_IP_PRI_NAT_SRC`).
    fn raw(self) -> (&'static str, u32, i32) {
        match self {
            Self::SourceNat => ("nat", 4, 100),
        }
    }
}

/// Whether the kernel has the table with exactly these rules.
pub(super) fn holds(table: &Table) -> Result<bool> {
    let wanted: Vec<_> = table
        .chains
        .iter()
        .flat_map(|chain| chain.rules.iter().map(|rule| (chain.name.to_owned(), rule.comment(chain.hook.raw()))))
        .collect();
    let found = fingerprints(&table.name).map_err(|error| failed("list the rules of", &table.name, &error))?;
    Ok(!wanted.is_empty() && found == wanted)
}

/// Puts the table in place of any of that name, in one transaction: no packet sees half of it.
pub(super) fn replace(table: &Table) -> Result<()> {
    transact(|batch| {
        // Without the first, the second would fail where there is no such table.
        new_table(batch, &table.name);
        delete_table(batch, &table.name);
        new_table(batch, &table.name);
        for chain in &table.chains {
            new_chain(batch, &table.name, chain);
            for rule in &chain.rules {
                new_rule(batch, &table.name, chain, rule);
            }
        }
    })
    .map_err(|error| failed("write", &table.name, &error))
}

/// Removes the table, if it is there. A kernel without nftables has none.
pub(super) fn drop_table(name: &str) -> Result<()> {
    match transact(|batch| delete_table(batch, name)) {
        Err(error) if matches!(errno(&error), Some(Errno::ENOENT | Errno::EOPNOTSUPP)) => Ok(()),
        result => result.map_err(|error| failed("remove", name, &error)),
    }
}

/// Chain and comment of every rule of the table, in order; none if there is no table.
fn fingerprints(table: &str) -> Result<Vec<(String, Vec<u8>)>, ReplyError> {
    let mut request = Request::new().op_getrule_dump(&inet());
    request.encode().push_table_bytes(table.as_bytes());
    let mut socket = NetlinkSocket::new();
    let mut reply = socket.request(&request)?;
    let mut rules = Vec::new();
    while let Some((_, rule)) = reply.recv().transpose()? {
        let chain = rule.get_chain()?.to_string_lossy().into_owned();
        rules.push((chain, rule.get_userdata().unwrap_or_default().to_vec()));
    }
    Ok(rules)
}

fn transact(fill: impl FnOnce(&mut Chained<'_>)) -> Result<(), ReplyError> {
    let mut socket = NetlinkSocket::new();
    // More than any batch of ours has messages; replies are told apart by them.
    let mut batch = Chained::new(socket.reserve_seq(1 << 16));
    let mut nftables = Nfgenmsg::new();
    nftables.set_res_id(libc::NFNL_SUBSYS_NFTABLES as u16);
    batch.request().op_batch_begin_do(&nftables);
    fill(&mut batch);
    batch.request().op_batch_end_do(&nftables);
    socket.request_chained(&batch.finalize())?.recv_all()
}

fn new_table(batch: &mut Chained<'_>, name: &str) {
    batch.request().set_create().op_newtable_do(&inet()).encode().push_name_bytes(name.as_bytes());
}

fn delete_table(batch: &mut Chained<'_>, name: &str) {
    batch.request().op_deltable_do(&inet()).encode().push_name_bytes(name.as_bytes());
}

fn new_chain(batch: &mut Chained<'_>, table: &str, chain: &Chain) {
    let (kind, hook, priority) = chain.hook.raw();
    let mut request = batch.request().set_create().op_newchain_do(&inet());
    let attributes = request.encode().push_table_bytes(table.as_bytes()).push_name_bytes(chain.name.as_bytes());
    let attributes = attributes.nested_hook().push_num(hook).push_priority(priority).end_nested();
    attributes.push_policy(libc::NF_ACCEPT as u32).push_type_bytes(kind.as_bytes());
}

fn new_rule(batch: &mut Chained<'_>, table: &str, chain: &Chain, rule: &Rule) {
    let mut request = batch.request().set_create().set_append().op_newrule_do(&inet());
    let attributes = request.encode().push_table_bytes(table.as_bytes()).push_chain_bytes(chain.name.as_bytes());
    let mut expressions = attributes.nested_expressions();
    expressions.as_vec_mut().extend(rule.expressions());
    expressions.end_nested().push_userdata(&rule.comment(chain.hook.raw()));
}

fn inet() -> Nfgenmsg {
    Nfgenmsg { nfgen_family: libc::NFPROTO_INET as u8, ..Nfgenmsg::default() }
}

fn errno(error: &ReplyError) -> Option<Errno> {
    error.as_io_error().raw_os_error().map(Errno::from_raw)
}

fn failed(doing: &str, table: &str, error: &ReplyError) -> Error {
    let failure = Error::new(ErrorKind::Host, format!("{doing} nftables table 'inet {table}'"));
    let failure = failure.because(error.to_string());
    match errno(error) {
        Some(Errno::EPERM) => failure.hint(super::NEEDS_ROOT),
        Some(Errno::EOPNOTSUPP | Errno::EPROTONOSUPPORT | Errno::EINVAL) => {
            failure.hint("the kernel may lack nftables: modprobe nf_tables")
        }
        Some(Errno::ENOENT) => {
            failure.hint("the kernel may lack a part of nftables: modprobe -a nft_chain_nat nft_masq")
        }
        _ => failure,
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "table inet {} {{", self.name)?;
        for chain in &self.chains {
            let hook = match chain.hook {
                Hook::SourceNat => "type nat hook postrouting priority srcnat",
            };
            writeln!(f, "    chain {} {{\n        {hook}; policy accept;", chain.name)?;
            for rule in &chain.rules {
                writeln!(f, "        {rule}")?;
            }
            writeln!(f, "    }}")?;
        }
        write!(f, "}}")
    }
}
