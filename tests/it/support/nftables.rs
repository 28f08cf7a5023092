//! Reads and changes nftables in the network namespace of the calling thread, without `nft`.

use netlink_bindings::nftables::{Chained, ExprOps, Nfgenmsg, Request};
use netlink_socket2::NetlinkSocket;
use nix::libc;

/// Names of the tables of all families.
pub fn tables() -> Vec<String> {
    let mut socket = NetlinkSocket::new();
    let request = Request::new().op_gettable_dump(&Nfgenmsg::new());
    let mut reply = socket.request(&request).expect("list tables");
    let mut names = Vec::new();
    while let Some((_, table)) = reply.recv().transpose().expect("list tables") {
        names.push(table.get_name().expect("a name").to_str().expect("UTF-8").to_owned());
    }
    names
}

/// Generation id of the ruleset. It is unchanged if nothing was written in between.
pub fn generation() -> u32 {
    let mut socket = NetlinkSocket::new();
    let request = Request::new().op_getgen_do(&Nfgenmsg::new());
    let mut reply = socket.request(&request).expect("ask for the generation");
    let (_, generation) = reply.recv_one().expect("a generation");
    generation.get_id().expect("an id")
}

/// Adds or removes a table of family `inet`, as another program on the host may do.
pub fn write_table(name: &str, present: bool) {
    let mut socket = NetlinkSocket::new();
    let mut batch = Chained::new(socket.reserve_seq(8));
    let mut nftables = Nfgenmsg::new();
    nftables.set_res_id(libc::NFNL_SUBSYS_NFTABLES as u16);
    let inet = Nfgenmsg { nfgen_family: libc::NFPROTO_INET as u8, ..Nfgenmsg::default() };
    batch.request().op_batch_begin_do(&nftables);
    if present {
        batch
            .request()
            .set_create()
            .op_newtable_do(&inet)
            .encode()
            .push_name_bytes(name.as_bytes());
    } else {
        batch.request().op_deltable_do(&inet).encode().push_name_bytes(name.as_bytes());
    }
    batch.request().op_batch_end_do(&nftables);
    socket.request_chained(&batch.finalize()).expect("send").recv_all().expect("write table");
}

/// Packets counted by the rules of the tables `name` of the families `inet` and `bridge`.
pub fn drops(name: &str) -> u64 {
    [libc::NFPROTO_INET, libc::NFPROTO_BRIDGE]
        .map(|family| drops_of(family as u8, name))
        .iter()
        .sum()
}

fn drops_of(family: u8, table: &str) -> u64 {
    let mut socket = NetlinkSocket::new();
    let mut request =
        Request::new().op_getrule_dump(&Nfgenmsg { nfgen_family: family, ..Nfgenmsg::default() });
    request.encode().push_table_bytes(table.as_bytes());
    let mut reply = socket.request(&request).expect("list rules");
    let mut drops = 0;
    while let Some((_, rule)) = reply.recv().transpose().expect("list rules") {
        for expression in rule.get_expressions().expect("expressions").get_elem() {
            if let Ok(ExprOps::Counter(counter)) = expression.get_data() {
                drops += counter.get_packets().expect("a count");
            }
        }
    }
    drops
}

/// Number of elements in the sets of the tables `name` of the families `inet` and `bridge`.
pub fn elements(name: &str) -> usize {
    [libc::NFPROTO_INET, libc::NFPROTO_BRIDGE]
        .map(|family| elements_of(family as u8, name))
        .iter()
        .sum()
}

fn elements_of(family: u8, table: &str) -> usize {
    let header = Nfgenmsg { nfgen_family: family, ..Nfgenmsg::default() };
    let mut sets = Vec::new();
    let mut socket = NetlinkSocket::new();
    let mut request = Request::new().op_getset_dump(&header);
    request.encode().push_table_bytes(table.as_bytes());
    let mut reply = socket.request(&request).expect("list sets");
    while let Some((_, set)) = reply.recv().transpose().expect("list sets") {
        sets.push(set.get_name().expect("a name").to_owned());
    }
    let mut count = 0;
    for set in sets {
        let mut socket = NetlinkSocket::new();
        let mut request = Request::new().op_getsetelem_dump(&header);
        request.encode().push_table_bytes(table.as_bytes()).push_set(&set);
        let mut reply = socket.request(&request).expect("list elements");
        while let Some((_, list)) = reply.recv().transpose().expect("list elements") {
            count += list.get_elements().map_or(0, |elements| elements.get_elem().count());
        }
    }
    count
}

/// Removes a link's name from a set, as an operator may do.
pub fn remove_element(table: &str, set: &str, link: &str) {
    for family in [libc::NFPROTO_INET, libc::NFPROTO_BRIDGE] {
        let header = Nfgenmsg { nfgen_family: family as u8, ..Nfgenmsg::default() };
        let mut socket = NetlinkSocket::new();
        let mut batch = Chained::new(socket.reserve_seq(8));
        let mut nftables = Nfgenmsg::new();
        nftables.set_res_id(libc::NFNL_SUBSYS_NFTABLES as u16);
        let mut name = link.as_bytes().to_vec();
        name.resize(libc::IFNAMSIZ, 0);
        batch.request().op_batch_begin_do(&nftables);
        let mut request = batch.request().op_delsetelem_do(&header);
        let list =
            request.encode().push_table_bytes(table.as_bytes()).push_set_bytes(set.as_bytes());
        let element = list.nested_elements().nested_elem().nested_key().push_value(&name);
        element.end_nested().end_nested().end_nested();
        drop(request);
        batch.request().op_batch_end_do(&nftables);
        socket
            .request_chained(&batch.finalize())
            .expect("send")
            .recv_all()
            .expect("remove an element");
    }
}

/// Makes the table `ip <table>` with a chain at a hook, `NF_INET_FORWARD` or `NF_INET_LOCAL_IN`.
/// The chain has no rules and the policy `drop`, as chains of Docker and ufw have. `others` are
/// further chains.
pub fn drop_at(hook: libc::c_int, table: &str, chain: &str, others: &[&str]) {
    let mut socket = NetlinkSocket::new();
    let mut batch = Chained::new(socket.reserve_seq(16));
    let mut nftables = Nfgenmsg::new();
    nftables.set_res_id(libc::NFNL_SUBSYS_NFTABLES as u16);
    let ip = Nfgenmsg { nfgen_family: libc::NFPROTO_IPV4 as u8, ..Nfgenmsg::default() };
    batch.request().op_batch_begin_do(&nftables);
    batch.request().set_create().op_newtable_do(&ip).encode().push_name_bytes(table.as_bytes());
    for other in others {
        let mut request = batch.request().set_create().op_newchain_do(&ip);
        request.encode().push_table_bytes(table.as_bytes()).push_name_bytes(other.as_bytes());
    }
    let mut request = batch.request().set_create().op_newchain_do(&ip);
    let attributes =
        request.encode().push_table_bytes(table.as_bytes()).push_name_bytes(chain.as_bytes());
    let hook = attributes.nested_hook().push_num(hook as u32).push_priority(0).end_nested();
    hook.push_policy(libc::NF_DROP as u32).push_type_bytes(b"filter");
    drop(request);
    batch.request().op_batch_end_do(&nftables);
    socket.request_chained(&batch.finalize()).expect("send").recv_all().expect("write chain");
}

/// Removes all tables of all families, as `nft flush ruleset` does.
pub fn flush() {
    let mut socket = NetlinkSocket::new();
    let mut batch = Chained::new(socket.reserve_seq(8));
    let mut nftables = Nfgenmsg::new();
    nftables.set_res_id(libc::NFNL_SUBSYS_NFTABLES as u16);
    batch.request().op_batch_begin_do(&nftables);
    batch.request().op_deltable_do(&Nfgenmsg::new());
    batch.request().op_batch_end_do(&nftables);
    socket.request_chained(&batch.finalize()).expect("send").recv_all().expect("flush");
}
