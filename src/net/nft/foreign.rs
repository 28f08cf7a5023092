//! Reads the tables of other programs with chains at the input or forward hook of IP. Never changes
//! them.

use netlink_bindings::nftables::{Nfgenmsg, Request};
use netlink_socket2::{NetlinkSocket, ReplyError};
use nix::libc;

use super::reply_failed;
use crate::error::Result;
use crate::link_name::LinkName;

/// Prefix of the names of the CPI's tables.
const TABLE_PREFIX: &str = "bosh-qemu-";

/// Another program's table with a chain at the input or forward hook.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::net) struct ForeignTable {
    /// `ip`, `ip6` or `inet`.
    pub family: &'static str,
    pub table: String,
    /// The forward chain that drops every packet its rules do not accept.
    pub forward_drop_chain: Option<String>,
    /// The input chain that drops every packet its rules do not accept.
    pub input_drop_chain: Option<String>,
    /// Names of all its chains.
    pub chains: Vec<String>,
    /// Its rules in the kernel's encoding.
    pub rules: Vec<u8>,
}

impl ForeignTable {
    /// Whether any rule names the link. In rules, a whole name ends with a NUL.
    pub fn has_rule_for(&self, link: &LinkName) -> bool {
        let name = [link.as_str().as_bytes(), b"\0"].concat();
        self.rules.windows(name.len()).any(|bytes| bytes == name)
    }
}

/// Returns the tables of other programs with a chain at the input or forward hook of IP. A kernel
/// without nftables has none.
pub(in crate::net) fn tables() -> Result<Vec<ForeignTable>> {
    let mut tables = chains().map_err(|error| reply_failed("list the chains of", "", &error))?;
    tables.retain(|(_, has_hook)| *has_hook);
    let mut found = Vec::new();
    for (mut table, _) in tables {
        table.rules = rules(&table)
            .map_err(|error| reply_failed("list the rules of", &table.table, &error))?;
        found.push(table);
    }
    Ok(found)
}

/// Returns every table, and whether it has a chain at one of the two hooks.
fn chains() -> std::result::Result<Vec<(ForeignTable, bool)>, ReplyError> {
    let mut tables: Vec<(ForeignTable, bool)> = Vec::new();
    let mut socket = NetlinkSocket::new();
    let request = Request::new().op_getchain_dump(&Nfgenmsg::new());
    let mut reply = socket.request(&request)?;
    while let Some((header, chain)) = reply.recv().transpose()? {
        let text = |text: &std::ffi::CStr| text.to_string_lossy().into_owned();
        let (table, name) = (text(chain.get_table()?), text(chain.get_name()?));
        let Some(family) = family(header.nfgen_family) else { continue };
        if table.starts_with(TABLE_PREFIX) {
            continue;
        }
        let position = tables.iter().position(|(t, _)| t.table == table && t.family == family);
        let index = position.unwrap_or_else(|| {
            tables.push((ForeignTable { family, table, ..ForeignTable::default() }, false));
            tables.len() - 1
        });
        let (entry, has_hook) = &mut tables[index];
        let hook = chain.get_hook().ok().and_then(|hook| hook.get_num().ok());
        let drops = chain.get_policy().is_ok_and(|policy| policy == libc::NF_DROP as u32);
        let drop_chain = match hook.map(|hook| hook as libc::c_int) {
            Some(libc::NF_INET_FORWARD) => Some(&mut entry.forward_drop_chain),
            Some(libc::NF_INET_LOCAL_IN) => Some(&mut entry.input_drop_chain),
            _ => None,
        };
        *has_hook |= drop_chain.is_some();
        if let Some(drop_chain) = drop_chain.filter(|_| drops) {
            *drop_chain = Some(name.clone());
        }
        entry.chains.push(name);
    }
    Ok(tables)
}

fn rules(table: &ForeignTable) -> std::result::Result<Vec<u8>, ReplyError> {
    let family =
        FAMILIES.iter().find(|(_, name)| *name == table.family).map_or(0, |(number, _)| *number);
    let mut request = Request::new()
        .op_getrule_dump(&Nfgenmsg { nfgen_family: family as u8, ..Nfgenmsg::default() });
    request.encode().push_table_bytes(table.table.as_bytes());
    let mut socket = NetlinkSocket::new();
    let mut reply = socket.request(&request)?;
    let mut bytes = Vec::new();
    while let Some((_, rule)) = reply.recv().transpose()? {
        bytes.extend_from_slice(rule.get_buf());
    }
    Ok(bytes)
}

const FAMILIES: [(libc::c_int, &str); 3] =
    [(libc::NFPROTO_IPV4, "ip"), (libc::NFPROTO_IPV6, "ip6"), (libc::NFPROTO_INET, "inet")];

fn family(number: u8) -> Option<&'static str> {
    FAMILIES.iter().find(|(family, _)| *family == libc::c_int::from(number)).map(|(_, name)| *name)
}
