//! Rules: what they match and decide, encoded as the kernel's expressions.
//!
//! The kernel runs a rule as a small program over registers (`linux/netfilter/nf_tables.h`): it
//! loads a value into registers, compares it, and leaves the rule if the comparison fails. Each
//! [`Match`] is a few such steps.

use std::ffi::CStr;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netlink_bindings::nftables::{
    CmpOps, LookupFlags, MetaKeys, PayloadBase, PushExprListAttrs, Registers, VerdictCode,
};
use netlink_bindings::traits::Pusher;
use netlink_bindings::utils::{finalize_nested_header, push_header, push_nested_header};
use nix::libc;
use sha2::{Digest, Sha256};

use super::field::{
    DESTINATION_PORT, Expressions, FAMILY, FIRST_REGISTER, Field, MARK, OIFNAME, PROTOCOL, load_key,
};
use super::set;
use crate::link_name::LinkName;

/// Matches that must all hold, and the verdict then. `Display` shows nft's syntax.
#[derive(Debug)]
pub(in crate::net) struct Rule {
    pub matches: Vec<Match>,
    pub verdict: Verdict,
}

/// A condition on a packet. A field beyond the packet's end does not match.
#[derive(Debug)]
pub(in crate::net) enum Match {
    /// The source address is in this subnet.
    SourceIn(IpNetwork),
    /// The output link is not this one.
    NotOutput(LinkName),
    /// The field holds this link's name.
    Link(Field, LinkName),
    /// The field has this value.
    Eq(Field, &'static [u8]),
    /// The protocol has this number, and the destination port this one.
    DestinationPort(u8, u16),
    /// The field has another value.
    Ne(Field, &'static [u8]),
    /// The packet is long enough to have the field.
    Present(Field),
    /// The field's value is in the range from the first to the second.
    InRange(Field, &'static [u8], &'static [u8]),
    /// The field's value under the first mask equals the second.
    MaskedEq(Field, &'static [u8], &'static [u8]),
    /// The field's value under the first mask differs from the second.
    MaskedNe(Field, &'static [u8], &'static [u8]),
    /// The set contains the key of these fields.
    InSet(Vec<Field>, &'static str),
    /// The set does not contain the key of these fields.
    NotInSet(Vec<Field>, &'static str),
}

/// What happens to a packet.
#[derive(Debug, Clone)]
pub(in crate::net) enum Verdict {
    /// Rewrites the source to the output link's address; connection tracking returns the replies.
    Masquerade,
    /// Drops and counts the packet.
    Drop,
    /// Leaves this chain.
    Return,
    /// Evaluates another chain, then the rest of this one.
    Jump(&'static str),
    /// Evaluates another chain and not the rest of this one.
    Goto(&'static str),
    /// Rewrites the destination to the address and port, IPv4 or IPv6, that the map has for these
    /// fields.
    Dnat { v6: bool, key: Vec<Field>, map: &'static str },
    /// Sets these bits of the packet's mark, in the machine's byte order, and continues.
    SetMark([u8; 4]),
    /// Adds these fields to a dynamic set, and continues.
    UpdateSet { key: Vec<Field>, set: &'static str },
}

impl Rule {
    /// Encodes the rule as the list of expressions in a netlink message.
    pub(super) fn expressions(&self) -> Vec<u8> {
        let start = PushExprListAttrs::new(Vec::new());
        let matched = self.matches.iter().fold(start, |list, each| each.push(list));
        self.verdict.push(matched)
    }

    /// Returns the fingerprint of this rule in a chain with the given declarations: a comment as
    /// the `nft` program reads and writes it (one attribute of type 0, its length, its text with a
    /// NUL).
    pub(super) fn comment(&self, declared: &str) -> Vec<u8> {
        let mut hash = Sha256::new();
        hash.update(format!("{declared}\n"));
        hash.update(self.expressions());
        let hex: String = hash.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect();
        let text = format!("bosh-qemu-cpi {hex}\0");
        [&[0, u8::try_from(text.len()).expect("31 bytes")], text.as_bytes()].concat()
    }
}

impl Match {
    fn push(&self, list: Expressions) -> Expressions {
        let load = |list, field: &Field| field.load(list, FIRST_REGISTER);
        match self {
            Self::SourceIn(subnet) => source_in(list, *subnet),
            Self::NotOutput(link) => {
                compare(load(list, &OIFNAME), CmpOps::Neq, &set::link_name_bytes(link))
            }
            Self::Link(field, link) => {
                compare(load(list, field), CmpOps::Eq, &set::link_name_bytes(link))
            }
            Self::Eq(field, value) => compare(load(list, field), CmpOps::Eq, value),
            Self::DestinationPort(protocol, port) => {
                let list = compare(load(list, &PROTOCOL), CmpOps::Eq, &[*protocol]);
                compare(load(list, &DESTINATION_PORT), CmpOps::Eq, &port.to_be_bytes())
            }
            Self::Ne(field, value) => compare(load(list, field), CmpOps::Neq, value),
            Self::Present(field) => load(list, field),
            Self::InRange(field, first, last) => {
                compare(compare(load(list, field), CmpOps::Gte, first), CmpOps::Lte, last)
            }
            Self::MaskedEq(field, mask, bits) => {
                compare(masked(load(list, field), mask), CmpOps::Eq, bits)
            }
            Self::MaskedNe(field, mask, bits) => {
                compare(masked(load(list, field), mask), CmpOps::Neq, bits)
            }
            Self::InSet(key, set) => look_up(load_key(list, key), set, 0),
            Self::NotInSet(key, set) => {
                look_up(load_key(list, key), set, LookupFlags::Invert as u32)
            }
        }
    }
}

impl Verdict {
    fn push(&self, list: Expressions) -> Vec<u8> {
        let done = match self {
            Self::Masquerade => list.nested_elem().push_name(c"masq").end_nested(),
            Self::Drop => {
                let counted = list
                    .nested_elem()
                    .nested_data_counter()
                    .push_bytes(0)
                    .push_packets(0)
                    .end_nested()
                    .end_nested();
                decide(counted, VerdictCode::Drop, None)
            }
            Self::Return => decide(list, VerdictCode::Return, None),
            Self::Jump(chain) => decide(list, VerdictCode::Jump, Some(chain)),
            Self::Goto(chain) => decide(list, VerdictCode::Goto, Some(chain)),
            Self::Dnat { v6, key, map } => dnat(load_key(list, key), *v6, map),
            Self::SetMark(bits) => set_mark(MARK.load(list, FIRST_REGISTER), *bits),
            Self::UpdateSet { key, set } => update_set(load_key(list, key), set),
        };
        done.end_nested()
    }
}

/// Compares the family first: the source's offset in a packet depends on it (RFC 791 §3.1, RFC 8200
/// §3).
fn source_in(list: Expressions, subnet: IpNetwork) -> Expressions {
    let (family, offset, address, mask) = match (subnet.network(), subnet.mask()) {
        (IpAddr::V4(ip), IpAddr::V4(mask)) => {
            (libc::NFPROTO_IPV4, 12, ip.octets().to_vec(), mask.octets().to_vec())
        }
        (IpAddr::V6(ip), IpAddr::V6(mask)) => {
            (libc::NFPROTO_IPV6, 8, ip.octets().to_vec(), mask.octets().to_vec())
        }
        _ => unreachable!("a subnet and its mask are of one family"),
    };
    let list = compare(FAMILY.load(list, FIRST_REGISTER), CmpOps::Eq, &[family as u8]);
    let length = address.len() as u32;
    let source = list
        .nested_elem()
        .nested_data_payload()
        .push_dreg(FIRST_REGISTER)
        .push_base(PayloadBase::NetworkHeader as u32)
        .push_offset(offset)
        .push_len(length)
        .end_nested()
        .end_nested();
    compare(masked(source, &mask), CmpOps::Eq, &address)
}

fn masked(list: Expressions, mask: &[u8]) -> Expressions {
    bitwise(list, mask, &vec![0; mask.len()])
}

/// `(value & mask) ^ xor`.
fn bitwise(list: Expressions, mask: &[u8], xor: &[u8]) -> Expressions {
    list.nested_elem()
        .nested_data_bitwise()
        .push_sreg(FIRST_REGISTER)
        .push_dreg(FIRST_REGISTER)
        .push_len(mask.len() as u32)
        .nested_mask()
        .push_value(mask)
        .end_nested()
        .nested_xor()
        .push_value(xor)
        .end_nested()
        .end_nested()
        .end_nested()
}

fn compare(list: Expressions, how: CmpOps, value: &[u8]) -> Expressions {
    list.nested_elem()
        .nested_data_cmp()
        .push_sreg(FIRST_REGISTER)
        .push_op(how as u32)
        .nested_data()
        .push_value(value)
        .end_nested()
        .end_nested()
        .end_nested()
}

/// `NFTA_LOOKUP_SET` 1, `NFTA_LOOKUP_SREG` 2, `NFTA_LOOKUP_FLAGS` 5. The crate's builder has other
/// numbers for them.
fn look_up(list: Expressions, set: &str, flags: u32) -> Expressions {
    expression(list, c"lookup", &[(1, text(set)), (2, number(FIRST_REGISTER)), (5, number(flags))])
}

fn decide(list: Expressions, code: VerdictCode, chain: Option<&str>) -> Expressions {
    let data = list
        .nested_elem()
        .nested_data_immediate()
        .push_dreg(Registers::RegVerdict as u32)
        .nested_data();
    // The kernel's verdict codes are signed; the crate has the same bits in a wider type.
    let verdict = data.nested_verdict().push_code(code as u32);
    let verdict =
        if let Some(chain) = chain { verdict.push_chain_bytes(chain.as_bytes()) } else { verdict };
    verdict.end_nested().end_nested().end_nested().end_nested()
}

/// The map's value is an address, and a port in the word behind it.
fn dnat(list: Expressions, v6: bool, map: &str) -> Expressions {
    let (family, port) = if v6 { (libc::NFPROTO_IPV6, 4) } else { (libc::NFPROTO_IPV4, 1) };
    // `NFTA_LOOKUP_DREG` 3.
    let attributes = [(1, text(map)), (2, number(FIRST_REGISTER)), (3, number(FIRST_REGISTER))];
    expression(list, c"lookup", &attributes)
        .nested_elem()
        .nested_data_nat()
        .push_type(1) // NFT_NAT_DNAT
        .push_family(family as u32)
        .push_reg_addr_min(FIRST_REGISTER)
        .push_reg_proto_min(FIRST_REGISTER + port)
        .push_flags(2) // NF_NAT_RANGE_PROTO_SPECIFIED, the address's flag follows from its register
        .end_nested()
        .end_nested()
}

/// `NFTA_META_KEY` 2, `NFTA_META_SREG` 3.
fn set_mark(list: Expressions, bits: [u8; 4]) -> Expressions {
    let marked = bitwise(list, &bits.map(|byte| !byte), &bits);
    expression(marked, c"meta", &[(2, number(MetaKeys::Mark as u32)), (3, number(FIRST_REGISTER))])
}

/// `NFTA_DYNSET_SET_NAME` 1, `NFTA_DYNSET_OP` 3 with `NFT_DYNSET_OP_UPDATE` 1,
/// `NFTA_DYNSET_SREG_KEY` 4.
fn update_set(list: Expressions, set: &str) -> Expressions {
    expression(list, c"dynset", &[(1, text(set)), (3, number(1)), (4, number(FIRST_REGISTER))])
}

/// `NFTA_EXPR_DATA`.
const EXPRESSION_DATA: u16 = 2;

/// Encodes an expression for which the crate's builder is missing or wrong.
fn expression(list: Expressions, name: &CStr, attributes: &[(u16, Vec<u8>)]) -> Expressions {
    let mut element = list.nested_elem().push_name(name);
    let bytes = element.as_vec_mut();
    let data = push_nested_header(bytes, EXPRESSION_DATA);
    for (attribute, value) in attributes {
        push_header(bytes, *attribute, value.len() as u16);
        bytes.extend_from_slice(value);
    }
    finalize_nested_header(bytes, data);
    element.end_nested()
}

fn text(text: &str) -> Vec<u8> {
    [text.as_bytes(), b"\0"].concat()
}

fn number(number: u32) -> Vec<u8> {
    number.to_be_bytes().to_vec()
}
