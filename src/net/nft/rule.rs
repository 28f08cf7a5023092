//! Rules: what they match and decide, said in the kernel's expressions.
//!
//! The kernel runs a rule as a tiny program over registers (`linux/netfilter/nf_tables.h`): load something into
//! register 1, compare it, and leave the rule if it differs. Each [`Match`] is a few such steps.

use std::fmt;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netlink_bindings::nftables::{CmpOps, MetaKeys, PayloadBase, PushExprListAttrs, Registers};
use nix::libc;
use sha2::{Digest, Sha256};

use crate::link_name::LinkName;

/// Matches that must all hold, and what happens then. Its `Display` is nftables' language.
#[derive(Debug)]
pub(in crate::net) struct Rule {
    pub matches: Vec<Match>,
    pub verdict: Verdict,
}

/// A property of a packet.
#[derive(Debug)]
pub(in crate::net) enum Match {
    /// It comes from an address of this subnet.
    SourceIn(IpNetwork),
    /// It leaves by another link.
    NotLeavingBy(LinkName),
}

/// What happens to a packet.
#[derive(Debug, Clone, Copy)]
pub(in crate::net) enum Verdict {
    /// It gets the address of the link it leaves by; answers find their way back.
    Masquerade,
}

type Expressions = PushExprListAttrs<Vec<u8>>;

impl Rule {
    /// The rule as the list of expressions in a netlink message.
    pub(super) fn expressions(&self) -> Vec<u8> {
        let start = PushExprListAttrs::new(Vec::new());
        let matched = self.matches.iter().fold(start, |list, each| each.push(list));
        match self.verdict {
            Verdict::Masquerade => matched.nested_elem().push_name(c"masq").end_nested().end_nested(),
        }
    }

    /// What marks this rule, in a chain that is hooked so: a comment as the `nft` program reads and writes it (one
    /// attribute of type 0, its length, its text with a NUL).
    pub(super) fn comment(&self, (kind, hook, priority): (&str, u32, i32)) -> Vec<u8> {
        let mut hash = Sha256::new();
        hash.update(format!("{kind} {hook} {priority}\n"));
        hash.update(self.expressions());
        let hex: String = hash.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect();
        let text = format!("bosh-qemu-cpi {hex}\0");
        [&[0, u8::try_from(text.len()).expect("31 bytes")], text.as_bytes()].concat()
    }
}

impl Match {
    fn push(&self, list: Expressions) -> Expressions {
        match self {
            Self::SourceIn(subnet) => source_in(list, *subnet),
            Self::NotLeavingBy(link) => {
                // A name is compared with all its 16 bytes, or it would be a prefix.
                let mut name = [0; libc::IFNAMSIZ];
                name[..link.as_str().len()].copy_from_slice(link.as_str().as_bytes());
                compare(load(list, MetaKeys::Oifname), CmpOps::Neq, &name)
            }
        }
    }
}

/// The family first: where the source stands in a packet depends on it. RFC 791 §3.1, RFC 8200 §3.
fn source_in(list: Expressions, subnet: IpNetwork) -> Expressions {
    let (family, offset, address, mask) = match (subnet.network(), subnet.mask()) {
        (IpAddr::V4(ip), IpAddr::V4(mask)) => (libc::NFPROTO_IPV4, 12, ip.octets().to_vec(), mask.octets().to_vec()),
        (IpAddr::V6(ip), IpAddr::V6(mask)) => (libc::NFPROTO_IPV6, 8, ip.octets().to_vec(), mask.octets().to_vec()),
        _ => unreachable!("a subnet and its mask are of one family"),
    };
    let list = compare(load(list, MetaKeys::Nfproto), CmpOps::Eq, &[family as u8]);
    let length = address.len() as u32;
    let source = list
        .nested_elem()
        .nested_data_payload()
        .push_dreg(Registers::Reg1 as u32)
        .push_base(PayloadBase::NetworkHeader as u32)
        .push_offset(offset)
        .push_len(length)
        .end_nested()
        .end_nested();
    let masked = source
        .nested_elem()
        .nested_data_bitwise()
        .push_sreg(Registers::Reg1 as u32)
        .push_dreg(Registers::Reg1 as u32)
        .push_len(length)
        .nested_mask()
        .push_value(&mask)
        .end_nested()
        .nested_xor()
        .push_value(&vec![0; mask.len()])
        .end_nested()
        .end_nested()
        .end_nested();
    compare(masked, CmpOps::Eq, &address)
}

/// Loads what the kernel knows of the packet besides its bytes.
fn load(list: Expressions, key: MetaKeys) -> Expressions {
    list.nested_elem()
        .nested_data_meta()
        .push_key(key as u32)
        .push_dreg(Registers::Reg1 as u32)
        .end_nested()
        .end_nested()
}

fn compare(list: Expressions, how: CmpOps, value: &[u8]) -> Expressions {
    list.nested_elem()
        .nested_data_cmp()
        .push_sreg(Registers::Reg1 as u32)
        .push_op(how as u32)
        .nested_data()
        .push_value(value)
        .end_nested()
        .end_nested()
        .end_nested()
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for each in &self.matches {
            write!(f, "{each} ")?;
        }
        match self.verdict {
            Verdict::Masquerade => f.write_str("masquerade"),
        }
    }
}

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SourceIn(subnet @ IpNetwork::V4(_)) => write!(f, "ip saddr {subnet}"),
            Self::SourceIn(subnet @ IpNetwork::V6(_)) => write!(f, "ip6 saddr {subnet}"),
            Self::NotLeavingBy(link) => write!(f, "oifname != \"{link}\""),
        }
    }
}
