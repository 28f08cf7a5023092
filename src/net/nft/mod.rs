//! nftables over netlink: compares, replaces and drops tables with their sets, chains and rules.
//!
//! Hosts need neither the `nft` program nor its C library. `rule` encodes rules for the kernel, and
//! `text` shows them in nft's syntax.
//!
//! Every rule carries a fingerprint of itself as its comment. The kernel returns comments
//! unchanged, but not the rule's bytes, so tables are compared by their fingerprints. A rule that
//! was added, removed, moved or written by another version of the CPI makes the table differ.

mod batch;
mod field;
pub(in crate::net) mod foreign;
mod rule;
mod set;
mod text;
mod transaction;

use std::fmt;

use netlink_bindings::nftables::{Nfgenmsg, Request};
use netlink_bindings::utils::{chop_header, find_attr};
use netlink_socket2::{NetlinkSocket, ReplyError};
use nix::errno::Errno;
use nix::libc;

pub(super) use self::batch::Step;
use self::batch::batch;
use self::transaction::KernelError;
pub(super) use field::*;
pub(super) use rule::{Match, Rule, Verdict};
pub(super) use set::{DataType, Element, Part, RawElement, Set, SetKind};

use crate::error::{Error, ErrorKind, Result};

/// A table. `Display` shows nft's syntax.
#[derive(Debug)]
pub(super) struct Table {
    pub family: Family,
    /// At most 255 bytes (`NFT_NAME_MAXLEN`).
    pub name: String,
    pub sets: Vec<Set>,
    pub chains: Vec<Chain>,
}

/// Which packets a table sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    /// IPv4 and IPv6 packets that this host sends, receives or routes.
    Inet,
    /// Frames between the ports of the host's bridges.
    Bridge,
}

/// Rules that the kernel evaluates in order. The chain accepts a packet that none of them decides.
#[derive(Debug)]
pub(super) struct Chain {
    pub name: &'static str,
    /// The hook at which packets enter; `None` for a chain that only other chains call.
    pub hook: Option<Hook>,
    pub rules: Vec<Rule>,
}

/// A hook of a base chain: its type, its point on a packet's way through the kernel, and its
/// priority.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hook {
    /// nft's chain type: `filter` or `nat`.
    chain_type: &'static str,
    point: HookPoint,
    priority: i32,
}

/// Netfilter's hooks (`linux/netfilter.h`, `enum nf_inet_hooks`); bridges have the same.
#[derive(Debug, Clone, Copy)]
pub(super) enum HookPoint {
    Prerouting = 0,
    Input = 1,
    Forward = 2,
    Output = 3,
    Postrouting = 4,
}

impl Hook {
    /// May rewrite the source address (`NF_IP_PRI_NAT_SRC`).
    pub const SOURCE_NAT: Self =
        Self { chain_type: "nat", point: HookPoint::Postrouting, priority: 100 };

    /// May rewrite the destination address of packets from other machines (`NF_IP_PRI_NAT_DST`).
    pub const DESTINATION_NAT: Self =
        Self { chain_type: "nat", point: HookPoint::Prerouting, priority: -100 };

    /// May rewrite the destination address of packets from this host.
    pub const OUTPUT_DESTINATION_NAT: Self =
        Self { chain_type: "nat", point: HookPoint::Output, priority: -100 };

    /// May drop packets.
    pub const fn filter(point: HookPoint, priority: i32) -> Self {
        Self { chain_type: "filter", point, priority }
    }
}

impl Family {
    /// `NFPROTO_INET`, `NFPROTO_BRIDGE`.
    fn header(self) -> Nfgenmsg {
        let family = match self {
            Self::Inet => libc::NFPROTO_INET,
            Self::Bridge => libc::NFPROTO_BRIDGE,
        };
        Nfgenmsg { nfgen_family: family as u8, ..Nfgenmsg::default() }
    }
}

/// The outcome of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub(super) enum Outcome {
    Done,
    /// The kernel changed nothing: something differed from the state the transaction is based on.
    Stale,
}

/// Whether the kernel has the table with exactly these rules.
pub(super) fn is_current(table: &Table) -> Result<bool> {
    let wanted: Vec<_> = table
        .chains
        .iter()
        .flat_map(|chain| {
            chain
                .rules
                .iter()
                .map(|rule| (chain.name.to_owned(), rule.comment(&table.declaration(chain))))
        })
        .collect();
    let found = fingerprints(table)
        .map_err(|error| reply_failed("list the rules of", &table.name, &error))?;
    Ok(!wanted.is_empty() && found == wanted)
}

/// Replaces any table of that name in one transaction: no packet sees half of it.
pub(super) fn replace(table: &Table) -> Result<()> {
    transaction::send(&batch(&[Step::ReplaceTable(table)], None))
        .map_err(|error| kernel_failed("write", &table.name, error))
}

/// Removes the table, if it exists. A kernel without nftables has none.
pub(super) fn drop_table(family: Family, name: &str) -> Result<()> {
    match transaction::send(&batch(&[Step::DropTable(family, name)], None)) {
        Err(error) if matches!(error.errno, Errno::ENOENT | Errno::EOPNOTSUPP) => Ok(()),
        result => result.map_err(|error| kernel_failed("remove", name, error)),
    }
}

/// Carries out all steps in one transaction, or none. With a `generation`, only if the host's
/// nftables has not changed since [`generation`] returned it.
pub(super) fn commit(steps: &[Step<'_>], generation: Option<u32>) -> Result<Outcome> {
    let Some((_, table)) = steps.first().map(Step::table) else { return Ok(Outcome::Done) };
    // A replaced table contains nothing that another program may have removed. ENOENT then means
    // that the kernel lacks a part of nftables.
    let replaces_table = steps.iter().any(|step| matches!(step, Step::ReplaceTable(_)));
    match transaction::send(&batch(steps, generation)) {
        Ok(()) => Ok(Outcome::Done),
        Err(error) if error.errno == Errno::ERESTART => Ok(Outcome::Stale),
        Err(error) if error.errno == Errno::ENOENT && !replaces_table => Ok(Outcome::Stale),
        Err(error) => Err(kernel_failed("write", table, error)),
    }
}

/// Returns the number of the host's latest nftables transaction.
pub(super) fn generation() -> Result<u32> {
    let fail = |error: ReplyError| reply_failed("ask for the generation of", "", &error);
    let request = Request::new().op_getgen_do(&Nfgenmsg::new());
    let mut socket = NetlinkSocket::new();
    let mut reply = socket.request(&request).map_err(|error| fail(error.into()))?;
    let (_, generation) = reply.recv_one().map_err(fail)?;
    generation.get_id().map_err(|error| fail(error.into()))
}

/// Returns the set's elements, or `None` if the set does not exist.
pub(super) fn elements(table: &Table, set: &Set) -> Result<Option<Vec<RawElement>>> {
    let mut request = Request::new().op_getsetelem_dump(&table.family.header());
    request.encode().push_table_bytes(table.name.as_bytes()).push_set_bytes(set.name.as_bytes());
    let mut socket = NetlinkSocket::new();
    let mut found = Vec::new();
    let mut list = || -> Result<(), ReplyError> {
        let mut reply = socket.request(&request)?;
        while let Some((_, list)) = reply.recv().transpose()? {
            let (bytes, mut at) = (list.get_elements().map_or(&[][..], |list| list.get_buf()), 0);
            while let Some((_, element)) = chop_header(bytes, &mut at) {
                let value = |attribute| {
                    let value =
                        find_attr(element, attribute).and_then(|data| find_attr(data, VALUE));
                    value.map(<[u8]>::to_vec)
                };
                let first = value(KEY).unwrap_or_default();
                let last = value(KEY_END).unwrap_or_else(|| first.clone());
                found.push(RawElement { first, last, data: value(DATA).unwrap_or_default() });
            }
        }
        Ok(())
    };
    match list() {
        Err(error) if errno(&error) == Some(Errno::ENOENT) => Ok(None),
        listed => listed
            .map(|()| Some(found))
            .map_err(|error| reply_failed("list the elements of", &table.name, &error)),
    }
}

/// `NFTA_SET_ELEM_KEY`, `NFTA_SET_ELEM_DATA`, `NFTA_SET_ELEM_KEY_END`, `NFTA_DATA_VALUE`.
const KEY: u16 = 1;
const DATA: u16 = 2;
const KEY_END: u16 = 10;
const VALUE: u16 = 1;

/// Returns chain and comment of every rule of the table, in order; none if the table does not
/// exist.
fn fingerprints(table: &Table) -> Result<Vec<(String, Vec<u8>)>, ReplyError> {
    let mut request = Request::new().op_getrule_dump(&table.family.header());
    request.encode().push_table_bytes(table.name.as_bytes());
    let mut socket = NetlinkSocket::new();
    let mut reply = socket.request(&request)?;
    let mut rules = Vec::new();
    while let Some((_, rule)) = reply.recv().transpose()? {
        let chain = rule.get_chain()?.to_string_lossy().into_owned();
        rules.push((chain, rule.get_userdata().unwrap_or_default().to_vec()));
    }
    Ok(rules)
}

impl Table {
    /// Returns the declarations a rule of `chain` depends on: its hook and the table's sets.
    fn declaration(&self, chain: &Chain) -> String {
        let sets: Vec<_> = self.sets.iter().map(ToString::to_string).collect();
        format!(
            "{} {}",
            chain.hook.map(|hook| hook.to_string()).unwrap_or_default(),
            sets.join(" ")
        )
    }
}

/// Kernel modules that the CPI's tables need besides `nf_tables`. The kernel loads them itself if
/// it finds modprobe.
const MODULES: &str = "nft_meta_bridge nft_chain_nat nft_nat nft_masq nft_fib_inet nft_ct";

fn errno(error: &ReplyError) -> Option<Errno> {
    error.as_io_error().raw_os_error().map(Errno::from_raw)
}

fn reply_failed(doing: &str, table: &str, error: &ReplyError) -> Error {
    failure(doing, table, errno(error)).because(error.to_string())
}

fn kernel_failed(doing: &str, table: &str, error: KernelError) -> Error {
    failure(doing, table, Some(error.errno)).because(error)
}

fn failure(doing: &str, table: &str, errno: Option<Errno>) -> Error {
    let of =
        if table.is_empty() { "nftables".to_owned() } else { format!("nftables table '{table}'") };
    let error = Error::new(ErrorKind::Host, format!("{doing} {of}"));
    match errno {
        Some(Errno::EPERM) => error.hint(super::NEEDS_ROOT),
        Some(Errno::EOPNOTSUPP | Errno::EPROTONOSUPPORT | Errno::EINVAL) => {
            error.hint("the kernel may lack nftables: modprobe nf_tables")
        }
        Some(Errno::ENOENT) => {
            error.hint(format!("the kernel may lack a part of nftables: modprobe -a {MODULES}"))
        }
        _ => error,
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = match self.family {
            Family::Inet => "inet",
            Family::Bridge => "bridge",
        };
        writeln!(f, "table {family} {} {{", self.name)?;
        for set in &self.sets {
            writeln!(f, "    {set}")?;
        }
        for chain in &self.chains {
            writeln!(f, "    chain {} {{", chain.name)?;
            if let Some(hook) = chain.hook {
                writeln!(f, "        {hook}; policy accept;")?;
            }
            for rule in &chain.rules {
                writeln!(f, "        {rule}")?;
            }
            writeln!(f, "    }}")?;
        }
        write!(f, "}}")
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let point = match self.point {
            HookPoint::Prerouting => "prerouting",
            HookPoint::Input => "input",
            HookPoint::Forward => "forward",
            HookPoint::Output => "output",
            HookPoint::Postrouting => "postrouting",
        };
        write!(f, "type {} hook {point} priority {}", self.chain_type, self.priority)
    }
}

#[cfg(test)]
mod tests {
    use nix::sched::{CloneFlags, unshare};

    use super::*;

    /// The kernel returns ENOENT both for a part it lacks and for a table another program removed.
    /// If the former counted as a race, the caller would retry for nothing.
    #[test]
    #[allow(clippy::print_stderr)]
    fn a_part_the_kernel_lacks_is_an_error_and_a_removed_set_is_stale() {
        let tried = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).ok()?;
            let set = Set::exact("not-there", &[DataType::Link]);
            let rules = vec![Rule {
                matches: vec![Match::InSet(vec![IIFNAME], set.name)],
                verdict: Verdict::Drop,
            }];
            let chains = vec![Chain { name: "alone", hook: None, rules }];
            let table = Table {
                family: Family::Inet,
                name: "bosh-qemu-test".to_owned(),
                sets: Vec::new(),
                chains,
            };
            let element =
                Element::new(vec![Part::Link(crate::link_name::LinkName::parse("bqn0").unwrap())])
                    .encode();
            Some((
                commit(&[Step::ReplaceTable(&table)], None),
                commit(&[Step::AddElements(&table, &set, &[element])], None),
            ))
        });
        let Some((lacking, removed)) = tried.join().unwrap() else {
            return eprintln!("SKIP nft::a_part_the_kernel_lacks: no network namespace of its own");
        };
        let lacking = lacking.unwrap_err();
        assert_eq!(lacking.kind(), ErrorKind::Host);
        assert!(lacking.report().contains("modprobe -a nft_meta_bridge"), "{}", lacking.report());
        assert_eq!(removed.unwrap(), Outcome::Stale);
    }
}
