//! Tables of other programs that drop VM packets, and the commands that make each of them let the
//! packets pass.

use ipnetwork::IpNetwork;

use super::{Facts, Finding, addresses};
use crate::net::nft::foreign::ForeignTable;
use crate::net::plan::{Keeper, Segment};

/// Adds findings about tables that drop packets of a segment's VMs: packets that the host forwards,
/// or else frames that br_netfilter passes to iptables.
pub(super) fn findings(
    segment: &Segment,
    forwards: bool,
    facts: &Facts,
    findings: &mut Vec<Finding>,
) {
    let bridge = &segment.bridge;
    let action = if forwards {
        "drops forwarded packets, also those of VMs on"
    } else {
        "drops frames between VMs, because bridge-nf-call-iptables is 1, on"
    };
    let before = findings.len();
    let unopened = facts
        .foreign
        .iter()
        .filter(|table| sees_packets_of(table, segment, forwards) && !table.has_rule_for(bridge));
    for (program, cure) in unopened.filter_map(|table| dropping_program(table, segment)) {
        let finding = Finding { cause: format!("{program} {action} bridge '{bridge}'"), cure };
        // ufw has a table for each IP version, and one command for both.
        if !findings.contains(&finding) {
            findings.push(finding);
        }
    }
    if facts.has_legacy_filter && facts.has_docker {
        let cause = format!(
            "Docker uses iptables-legacy, which may drop packets of VMs on bridge '{bridge}'"
        );
        findings.push(Finding { cause, cure: docker("iptables-legacy", segment) });
    }
    if facts.bridges_call_iptables && findings.len() > before {
        let cause = format!(
            "br_netfilter passes frames between VMs on bridge '{bridge}' to these rules, too"
        );
        findings.push(Finding {
            cause,
            cure: "sysctl -w net.bridge.bridge-nf-call-iptables=0".to_owned(),
        });
    }
}

/// Adds findings about tables that drop packets to `host_services` of a segment's VMs.
pub(super) fn host_services(segment: &Segment, facts: &Facts, findings: &mut Vec<Finding>) {
    let bridge = &segment.bridge;
    for table in facts
        .foreign
        .iter()
        .filter(|table| sees_packets_of(table, segment, true) && !table.has_rule_for(bridge))
    {
        let ForeignTable { family, table: name, input_drop_chain: Some(chain), .. } = table else {
            continue;
        };
        let (program, cure) = if table.chains.iter().any(|chain| chain.starts_with("ufw")) {
            ("ufw".to_owned(), format!("ufw allow in on {bridge}"))
        } else {
            let cure = format!("nft insert rule {family} {name} {chain} iifname {bridge} accept");
            (format!("chain '{chain}' of table '{family} {name}'"), cure)
        };
        let cause = format!(
            "{program} drops packets to this host, also to host_services, from VMs on bridge \
             '{bridge}'"
        );
        let finding = Finding { cause, cure };
        if !findings.contains(&finding) {
            findings.push(finding);
        }
    }
}

/// Whether the table sees packets of the segment's IP versions. Those of an operator's bridge are
/// unknown. What br_netfilter shows of IPv6 has a setting of its own.
fn sees_packets_of(table: &ForeignTable, segment: &Segment, forwards: bool) -> bool {
    let any = |version: fn(&IpNetwork) -> bool| !forwards || addresses(segment).iter().any(version);
    match table.family {
        "ip" => any(IpNetwork::is_ipv4),
        "ip6" => forwards && any(IpNetwork::is_ipv6),
        _ => true,
    }
}

/// Returns the program that drops packets with this table, and the command that opens it for the
/// bridge.
fn dropping_program(table: &ForeignTable, segment: &Segment) -> Option<(String, String)> {
    let bridge = &segment.bridge;
    let has = |chain: fn(&str) -> bool| table.chains.iter().any(|name| chain(name));
    if table.table == "firewalld" {
        return Some(("firewalld".to_owned(), firewalld(segment)));
    }
    let chain = table.forward_drop_chain.as_ref()?;
    if has(|chain| chain == "DOCKER-USER") {
        let (program, iptables) = if table.family == "ip6" {
            ("Docker (IPv6)", "ip6tables")
        } else {
            ("Docker", "iptables")
        };
        return Some((program.to_owned(), docker(iptables, segment)));
    }
    if has(|chain| chain.starts_with("ufw")) {
        let cure = format!("ufw route allow in on {bridge} && ufw route allow out on {bridge}");
        return Some(("ufw".to_owned(), cure));
    }
    let ForeignTable { family, table, .. } = table;
    let insert =
        |direction| format!("nft insert rule {family} {table} {chain} {direction} {bridge} accept");
    Some((
        format!("chain '{chain}' of table '{family} {table}'"),
        format!("{} && {}", insert("iifname"), insert("oifname")),
    ))
}

/// Returns the commands for firewalld. A zone decides for packets that come in by its links. So the
/// bridge's zone lets VMs out, and firewalld itself lets forwarded ports in (`ct status dnat
/// accept`). VMs that keep their addresses need a policy for incoming packets.
fn firewalld(segment: &Segment) -> String {
    let bridge = &segment.bridge;
    let command = |words: String| format!("firewall-cmd --permanent {words}");
    let mut commands = vec![command(format!("--zone=trusted --add-interface={bridge}"))];
    if matches!(segment.keeper, Keeper::Cpi { masquerade: false, closed: false, .. }) {
        commands.push(command(format!("--new-policy={bridge}")));
        let settings =
            ["--add-ingress-zone=ANY", "--add-egress-zone=trusted", "--set-target=ACCEPT"];
        commands.extend(settings.map(|setting| command(format!("--policy={bridge} {setting}"))));
    }
    commands.push("firewall-cmd --reload".to_owned());
    commands.join(" && ")
}

fn docker(iptables: &str, segment: &Segment) -> String {
    let accept = |direction: &str| {
        format!("{iptables} -I DOCKER-USER {direction} {} -j ACCEPT", segment.bridge)
    };
    format!("{} && {}", accept("-i"), accept("-o"))
}
