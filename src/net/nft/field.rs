//! Fields of a packet that rules can load.

use std::fmt;

use netlink_bindings::nftables::{
    CtDirection, CtKeys, FibFlags, MetaKeys, PayloadBase, PushExprListAttrs,
};

pub(super) type Expressions = PushExprListAttrs<Vec<u8>>;

/// A field of a packet, or of what the kernel knows about the packet.
#[derive(Debug, Clone, Copy)]
pub(in crate::net) struct Field {
    /// The field in nft's syntax.
    pub(super) text: &'static str,
    /// Size in bytes.
    size: u32,
    source: Source,
}

#[derive(Debug, Clone, Copy)]
enum Source {
    Meta(MetaKeys),
    Payload(PayloadBase, u32),
    Ct(CtKeys),
    /// From the packet that opened the connection.
    CtOriginal(CtKeys),
    /// The type of the destination address (`RTN_LOCAL` is 2).
    DestinationType,
}

/// The first data register (`NFT_REG32_00`). Registers are counted in words of four bytes.
pub(super) const FIRST_REGISTER: u32 = 8;

/// `NFT_FIB_RESULT_ADDRTYPE`; the crate's number is one less.
const ADDRESS_TYPE: u32 = 3;

macro_rules! fields {
    ($($name:ident = $text:literal, $size:literal, $source:expr;)*) => {
        $(
            pub(in crate::net) const $name: Field =
                Field { text: $text, size: $size, source: $source };
        )*
    };
}

const fn ethernet(offset: u32) -> Source {
    Source::Payload(PayloadBase::LinkLayerHeader, offset)
}

const fn network(offset: u32) -> Source {
    Source::Payload(PayloadBase::NetworkHeader, offset)
}

const fn transport(offset: u32) -> Source {
    Source::Payload(PayloadBase::TransportHeader, offset)
}

// IEEE 802.3; RFC 826; RFC 791 §3.1; RFC 8200 §3, §4.5; RFC 9293 §3.1; RFC 792; RFC 4861 §4.1,
// §4.3, §4.4, §4.6.1.
fields! {
    IIFNAME = "iifname", 16, Source::Meta(MetaKeys::Iifname);
    OIFNAME = "oifname", 16, Source::Meta(MetaKeys::Oifname);
    FAMILY = "meta nfproto", 1, Source::Meta(MetaKeys::Nfproto);
    PROTOCOL = "meta l4proto", 1, Source::Meta(MetaKeys::L4Proto);
    MARK = "meta mark", 4, Source::Meta(MetaKeys::Mark);
    CT_STATE = "ct state", 4, Source::Ct(CtKeys::State);
    CT_STATUS = "ct status", 4, Source::Ct(CtKeys::Status);
    CT_DIRECTION = "ct direction", 1, Source::Ct(CtKeys::Direction);
    CT_SADDR4 = "ct original ip saddr", 4, Source::CtOriginal(CtKeys::SrcIp);
    CT_SADDR6 = "ct original ip6 saddr", 16, Source::CtOriginal(CtKeys::SrcIp6);
    DESTINATION_TYPE = "fib daddr type", 4, Source::DestinationType;
    ETHER_DADDR = "ether daddr", 6, ethernet(0);
    ETHER_SADDR = "ether saddr", 6, ethernet(6);
    ETHER_TYPE = "ether type", 2, ethernet(12);
    ARP_KIND = "@nh,0,48", 6, network(0);
    ARP_SENDER_MAC = "arp saddr ether", 6, network(8);
    ARP_SENDER_IP = "arp saddr ip", 4, network(14);
    ARP_TARGET_IP = "arp daddr ip", 4, network(24);
    IP_FRAGMENT = "ip frag-off", 2, network(6);
    IP_SADDR = "ip saddr", 4, network(12);
    IP_DADDR = "ip daddr", 4, network(16);
    IP6_NEXT = "ip6 nexthdr", 1, network(6);
    IP6_SADDR = "ip6 saddr", 16, network(8);
    IP6_DADDR = "ip6 daddr", 16, network(24);
    IP6_FRAGMENT = "@nh,336,16", 2, network(42);
    SOURCE_PORT = "th sport", 2, transport(0);
    DESTINATION_PORT = "th dport", 2, transport(2);
    TCP_FLAGS = "tcp flags", 1, transport(13);
    IGMP_TYPE = "igmp type", 1, transport(0);
    ICMP_TYPE = "icmp type", 1, transport(0);
    ICMP6_TYPE = "icmpv6 type", 1, transport(0);
    ND_TARGET = "@th,64,128", 16, transport(8);
    ND_OPTION = "@th,192,16", 2, transport(24);
    ND_OPTION_MAC = "@th,208,48", 6, transport(26);
    ND_SECOND_OPTION = "@th,256,8", 1, transport(32);
    RS_OPTION = "@th,64,16", 2, transport(8);
    RS_OPTION_MAC = "@th,80,48", 6, transport(10);
    RS_SECOND_OPTION = "@th,128,8", 1, transport(16);
}

impl Field {
    /// Words that the field fills in registers and keys.
    pub(super) fn words(self) -> u32 {
        self.size.div_ceil(4)
    }

    /// Whether the value is in the machine's byte order, and not the network's.
    pub(super) fn is_host_order(self) -> bool {
        matches!(
            self.source,
            Source::Ct(_) | Source::DestinationType | Source::Meta(MetaKeys::Mark)
        )
    }

    /// Loads the field into the registers from `register` on.
    pub(super) fn load(self, list: Expressions, register: u32) -> Expressions {
        let element = list.nested_elem();
        let loaded = match self.source {
            Source::Meta(key) => {
                element.nested_data_meta().push_key(key as u32).push_dreg(register).end_nested()
            }
            Source::Ct(key) => {
                element.nested_data_ct().push_key(key as u32).push_dreg(register).end_nested()
            }
            Source::CtOriginal(key) => {
                let loaded = element.nested_data_ct().push_key(key as u32).push_dreg(register);
                loaded.push_direction(CtDirection::Original as u8).end_nested()
            }
            Source::Payload(base, offset) => element
                .nested_data_payload()
                .push_dreg(register)
                .push_base(base as u32)
                .push_offset(offset)
                .push_len(self.size)
                .end_nested(),
            Source::DestinationType => element
                .nested_data_fib()
                .push_dreg(register)
                .push_result(ADDRESS_TYPE)
                .push_flags(FibFlags::Daddr as u32)
                .end_nested(),
        };
        loaded.end_nested()
    }
}

/// Loads the fields into consecutive registers, as the key of a set.
pub(super) fn load_key(list: Expressions, fields: &[Field]) -> Expressions {
    let mut register = FIRST_REGISTER;
    fields.iter().fold(list, |list, field| {
        let at = register;
        register += field.words();
        field.load(list, at)
    })
}

/// Fields of a key, in nft's syntax.
pub(super) struct Key<'a>(pub &'a [Field]);

impl fmt::Display for Key<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, field) in self.0.iter().enumerate() {
            write!(f, "{}{field}", if index == 0 { "" } else { " . " })?;
        }
        Ok(())
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text)
    }
}
