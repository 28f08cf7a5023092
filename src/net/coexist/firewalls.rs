//! Other programs that drop what is forwarded, and the words each of them understands.

use ipnetwork::IpNetwork;

use super::{Facts, Finding, addresses};
use crate::net::nft::foreign::Foreign;
use crate::net::plan::{Keeper, Segment};

/// What drops the packets of a segment's VMs: those that the host passes on, or else those that br_netfilter shows it.
pub(super) fn findings(
    segment: &Segment,
    passes: bool,
    facts: &Facts,
    findings: &mut Vec<Finding>,
) {
    let bridge = &segment.bridge;
    let what = if passes {
        "drops what is forwarded, and so the packets of VMs on"
    } else {
        "drops, as bridge-nf-call-iptables is 1, what VMs send each other on"
    };
    let before = findings.len();
    let unaware = facts
        .foreign
        .iter()
        .filter(|table| concerns(table, segment, passes) && !table.names(bridge));
    for (who, cure) in unaware.filter_map(|table| culprit(table, segment)) {
        let finding = Finding { cause: format!("{who} {what} bridge '{bridge}'"), cure };
        // ufw has a table for each IP version, and one command for both.
        if !findings.contains(&finding) {
            findings.push(finding);
        }
    }
    if facts.legacy_filter && facts.has_docker {
        let cause = format!(
            "Docker uses iptables-legacy here, which may drop the packets of VMs on bridge '{bridge}'"
        );
        findings.push(Finding { cause, cure: docker("iptables-legacy", segment) });
    }
    if facts.bridges_call_iptables && findings.len() > before {
        let cause = format!(
            "frames between VMs on bridge '{bridge}' go through these rules, too (br_netfilter)"
        );
        findings.push(Finding {
            cause,
            cure: "sysctl -w net.bridge.bridge-nf-call-iptables=0".to_owned(),
        });
    }
}

/// What drops packets to the services of the host that a segment's VMs may use.
pub(super) fn services(segment: &Segment, facts: &Facts, findings: &mut Vec<Finding>) {
    let bridge = &segment.bridge;
    for table in
        facts.foreign.iter().filter(|table| concerns(table, segment, true) && !table.names(bridge))
    {
        let Foreign { family, table: name, closing: Some(chain), .. } = table else { continue };
        let (who, cure) = if table.chains.iter().any(|chain| chain.starts_with("ufw")) {
            ("ufw".to_owned(), format!("ufw allow in on {bridge}"))
        } else {
            let cure = format!("nft insert rule {family} {name} {chain} iifname {bridge} accept");
            (format!("chain '{chain}' of table '{family} {name}'"), cure)
        };
        let cause = format!(
            "{who} drops what is sent to this host, and so host_services for VMs on bridge '{bridge}'"
        );
        let finding = Finding { cause, cure };
        if !findings.contains(&finding) {
            findings.push(finding);
        }
    }
}

/// Whether the table sees packets of the segment's IP versions. Of an operator's bridge nobody knows those; what
/// br_netfilter shows of IPv6 has a switch of its own.
fn concerns(table: &Foreign, segment: &Segment, passes: bool) -> bool {
    let any = |version: fn(&IpNetwork) -> bool| !passes || addresses(segment).iter().any(version);
    match table.family {
        "ip" => any(IpNetwork::is_ipv4),
        "ip6" => passes && any(IpNetwork::is_ipv6),
        _ => true,
    }
}

/// Who drops by this table, if it does, and the command that opens it for the bridge.
fn culprit(table: &Foreign, segment: &Segment) -> Option<(String, String)> {
    let bridge = &segment.bridge;
    let has = |chain: fn(&str) -> bool| table.chains.iter().any(|name| chain(name));
    if table.table == "firewalld" {
        return Some(("firewalld".to_owned(), firewalld(segment)));
    }
    let chain = table.dropping.as_ref()?;
    if has(|chain| chain == "DOCKER-USER") {
        let (who, iptables) = if table.family == "ip6" {
            ("Docker (IPv6)", "ip6tables")
        } else {
            ("Docker", "iptables")
        };
        return Some((who.to_owned(), docker(iptables, segment)));
    }
    if has(|chain| chain.starts_with("ufw")) {
        let cure = format!("ufw route allow in on {bridge} && ufw route allow out on {bridge}");
        return Some(("ufw".to_owned(), cure));
    }
    let Foreign { family, table, .. } = table;
    let insert = |way| format!("nft insert rule {family} {table} {chain} {way} {bridge} accept");
    Some((
        format!("chain '{chain}' of table '{family} {table}'"),
        format!("{} && {}", insert("iifname"), insert("oifname")),
    ))
}

/// A zone decides for what comes in by its links. So the bridge's lets VMs out, and what was forwarded to them is let in by
/// firewalld itself (`ct status dnat accept`), but VMs that keep their addresses need a policy for the way in.
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
    let accept =
        |way: &str| format!("{iptables} -I DOCKER-USER {way} {} -j ACCEPT", segment.bridge);
    format!("{} && {}", accept("-i"), accept("-o"))
}
