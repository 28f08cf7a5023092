//! Encodes transactions: tables and elements as a batch of the kernel's messages.

use netlink_bindings::nftables::{Chained, ChainedFinal, Nfgenmsg, PushSetelemListAttrs};
use netlink_bindings::traits::Pusher;
use netlink_bindings::utils::{finalize_nested_header, push_header, push_nested_header};
use nix::libc;

use super::set::{self, RawElement, Set, SetKind};
use super::{Chain, DATA, Family, Hook, KEY, KEY_END, Rule, Table, VALUE};

/// One step of a transaction.
#[derive(Debug)]
pub(in crate::net) enum Step<'a> {
    /// Replaces any table of that name by this one, whose sets are empty.
    ReplaceTable(&'a Table),
    /// Removes the table, which must exist.
    DropTable(Family, &'a str),
    /// Adds these elements to the set.
    AddElements(&'a Table, &'a Set, &'a [RawElement]),
    /// Removes these elements from the set. The kernel removes an element of a map only if its data
    /// matches, too.
    RemoveElements(&'a Table, &'a Set, &'a [RawElement]),
}

/// Encodes the steps as one batch.
pub(super) fn batch(steps: &[Step<'_>], generation: Option<u32>) -> ChainedFinal<'static> {
    let mut batch = Chained::new(1);
    let mut nftables = Nfgenmsg::new();
    nftables.set_res_id(libc::NFNL_SUBSYS_NFTABLES as u16);
    let mut begin = batch.request().op_batch_begin_do(&nftables);
    if let Some(generation) = generation {
        begin.encode().push_genid(generation);
    }
    drop(begin);
    steps.iter().for_each(|step| step.push(&mut batch));
    batch.request().op_batch_end_do(&nftables);
    batch.finalize()
}

/// Elements in one message: an attribute has at most 64 KiB.
const ELEMENTS_PER_MESSAGE: usize = 256;

impl Step<'_> {
    pub(super) fn table(&self) -> (Family, &str) {
        match self {
            Self::ReplaceTable(table)
            | Self::AddElements(table, ..)
            | Self::RemoveElements(table, ..) => (table.family, &table.name),
            Self::DropTable(family, name) => (*family, name),
        }
    }

    fn push(&self, batch: &mut Chained<'_>) {
        match self {
            Self::ReplaceTable(table) => {
                // Deleting fails if the table does not exist, so create it first.
                new_table(batch, table.family, &table.name);
                delete_table(batch, table.family, &table.name);
                new_table(batch, table.family, &table.name);
                table.sets.iter().for_each(|set| new_set(batch, table, set));
                // A rule names chains and sets, which must exist before it.
                table.chains.iter().for_each(|chain| new_chain(batch, table, chain));
                for chain in &table.chains {
                    chain.rules.iter().for_each(|rule| new_rule(batch, table, chain, rule));
                }
            }
            Self::DropTable(family, name) => delete_table(batch, *family, name),
            Self::AddElements(table, set, elements) => {
                elements.chunks(ELEMENTS_PER_MESSAGE).for_each(|elements| {
                    let mut request =
                        batch.request().set_create().op_newsetelem_do(&table.family.header());
                    push_elements(request.encode(), table, set, elements);
                });
            }
            Self::RemoveElements(table, set, elements) => {
                // Removing fails if an element does not exist, so add them first.
                Self::AddElements(table, set, elements).push(batch);
                elements.chunks(ELEMENTS_PER_MESSAGE).for_each(|elements| {
                    let mut request = batch.request().op_delsetelem_do(&table.family.header());
                    push_elements(request.encode(), table, set, elements);
                });
            }
        }
    }
}

fn delete_table(batch: &mut Chained<'_>, family: Family, name: &str) {
    batch.request().op_deltable_do(&family.header()).encode().push_name_bytes(name.as_bytes());
}

fn new_table(batch: &mut Chained<'_>, family: Family, name: &str) {
    batch
        .request()
        .set_create()
        .op_newtable_do(&family.header())
        .encode()
        .push_name_bytes(name.as_bytes());
}

fn new_set(batch: &mut Chained<'_>, table: &Table, set: &Set) {
    let mut request = batch.request().set_create().op_newset_do(&table.family.header());
    let position =
        table.sets.iter().position(|each| each.name == set.name).expect("a set of this table");
    let mut attributes = request
        .encode()
        .push_table_bytes(table.name.as_bytes())
        .push_name_bytes(set.name.as_bytes())
        .push_flags(set.flags())
        .push_key_type(set::type_number(set.key))
        .push_key_len(set::length(set.key))
        // Unique in its transaction.
        .push_id(position as u32 + 1);
    if !set.data.is_empty() {
        attributes = attributes
            .push_data_type(set::type_number(set.data))
            .push_data_len(set::length(set.data));
    }
    if let SetKind::Dynamic { timeout_seconds, .. } = set.kind {
        // The kernel reads it in network order; the crate writes the host's order.
        attributes = attributes.push_timeout((u64::from(timeout_seconds) * 1000).to_be());
    }
    let mut description = attributes.nested_desc();
    if let SetKind::Dynamic { size, .. } = set.kind {
        description = description.push_size(size);
    }
    if set.key.len() > 1 {
        let mut parts = description.nested_concat();
        for size in set::sizes(set.key) {
            parts = parts.nested_elem().push_len(size).end_nested();
        }
        description = parts.end_nested();
    }
    description.end_nested();
}

/// Encodes the attributes of elements itself: the crate's builder has another number for the end of
/// a range.
fn push_elements<P: Pusher>(
    request: PushSetelemListAttrs<P>,
    table: &Table,
    set: &Set,
    elements: &[RawElement],
) {
    let request =
        request.push_table_bytes(table.name.as_bytes()).push_set_bytes(set.name.as_bytes());
    let mut list = request.nested_elements();
    let bytes = list.as_vec_mut();
    for element in elements {
        let one = push_nested_header(bytes, LIST_ELEMENT);
        push_value(bytes, KEY, &element.first);
        if set.kind == SetKind::Interval {
            push_value(bytes, KEY_END, &element.last);
        }
        if !element.data.is_empty() {
            push_value(bytes, DATA, &element.data);
        }
        finalize_nested_header(bytes, one);
    }
    list.end_nested();
}

/// `NFTA_LIST_ELEM`.
const LIST_ELEMENT: u16 = 1;

fn push_value(bytes: &mut Vec<u8>, attribute: u16, value: &[u8]) {
    let data = push_nested_header(bytes, attribute);
    push_header(bytes, VALUE, value.len() as u16);
    bytes.extend_from_slice(value);
    finalize_nested_header(bytes, data);
}

fn new_chain(batch: &mut Chained<'_>, table: &Table, chain: &Chain) {
    let mut request = batch.request().set_create().op_newchain_do(&table.family.header());
    let attributes = request
        .encode()
        .push_table_bytes(table.name.as_bytes())
        .push_name_bytes(chain.name.as_bytes());
    if let Some(Hook { chain_type, point, priority }) = chain.hook {
        let attributes =
            attributes.nested_hook().push_num(point as u32).push_priority(priority).end_nested();
        attributes.push_policy(libc::NF_ACCEPT as u32).push_type_bytes(chain_type.as_bytes());
    }
}

fn new_rule(batch: &mut Chained<'_>, table: &Table, chain: &Chain, rule: &Rule) {
    let mut request =
        batch.request().set_create().set_append().op_newrule_do(&table.family.header());
    let attributes = request
        .encode()
        .push_table_bytes(table.name.as_bytes())
        .push_chain_bytes(chain.name.as_bytes());
    let mut expressions = attributes.nested_expressions();
    expressions.as_vec_mut().extend(rule.expressions());
    expressions.end_nested().push_userdata(&rule.comment(&table.declaration(chain)));
}
