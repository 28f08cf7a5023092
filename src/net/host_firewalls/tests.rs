//! Findings of hosts with and without other programs' firewalls.

use super::*;

fn segment(keeper: Keeper) -> Segment {
    let bridge = LinkName::parse("bosh-nat0").unwrap();
    Segment { network: "lab".into(), bridge, mtu: None, vlan: None, isolated: false, keeper }
}

fn nat(address: &str) -> Segment {
    let addresses = vec![address.parse().unwrap()];
    segment(Keeper::Cpi {
        addresses,
        masquerade: true,
        services: None,
        closed: false,
        uplink: None,
    })
}

/// A host with a default route and no other program.
fn facts() -> Facts {
    let default_route = DefaultRoute { link: "eth0".into(), mtu: 1500, forwards_v4: true };
    let routes = vec![("eth0".into(), "192.0.2.0/24".parse().unwrap())];
    Facts { default_route: Some(default_route), routes, ..Facts::default() }
}

fn table(table: &str, forward_drop_chain: Option<&str>, chains: &[&str]) -> ForeignTable {
    let chains = chains.iter().map(ToString::to_string).collect();
    let forward_drop_chain = forward_drop_chain.map(str::to_owned);
    ForeignTable {
        family: "ip",
        table: table.into(),
        forward_drop_chain,
        input_drop_chain: None,
        chains,
        rules: Vec::new(),
    }
}

fn report(segment: &Segment, facts: &Facts) -> String {
    let lines = findings(segment, &[], facts)
        .into_iter()
        .map(|found| format!("{}\n    {}", found.cause, found.cure));
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn a_host_without_obstacles_has_no_findings() {
    assert_eq!(report(&nat("10.0.0.1/24"), &facts()), "");
    assert_eq!(report(&segment(Keeper::Operator), &facts()), "");
}

#[test]
fn firewalls_that_drop() {
    let docker = table("filter", Some("FORWARD"), &["FORWARD", "DOCKER-USER"]);
    let on = |foreign: ForeignTable| {
        report(&nat("10.0.0.1/24"), &Facts { foreign: vec![foreign], ..facts() })
    };
    let found = [
        on(docker.clone()),
        on(table("filter", Some("FORWARD"), &["FORWARD", "ufw-before-forward"])),
        on(ForeignTable { family: "inet", ..table("firewalld", None, &["filter_FORWARD"]) }),
        on(ForeignTable { family: "inet", ..table("mine", Some("fwd"), &["fwd"]) }),
    ];
    insta::assert_snapshot!(found.join("\n"), @r"
    Docker drops forwarded packets, also those of VMs on bridge 'bosh-nat0'
        iptables -I DOCKER-USER -i bosh-nat0 -j ACCEPT && iptables -I DOCKER-USER -o bosh-nat0 -j ACCEPT
    ufw drops forwarded packets, also those of VMs on bridge 'bosh-nat0'
        ufw route allow in on bosh-nat0 && ufw route allow out on bosh-nat0
    firewalld drops forwarded packets, also those of VMs on bridge 'bosh-nat0'
        firewall-cmd --permanent --zone=trusted --add-interface=bosh-nat0 && firewall-cmd --reload
    chain 'fwd' of table 'inet mine' drops forwarded packets, also those of VMs on bridge 'bosh-nat0'
        nft insert rule inet mine fwd iifname bosh-nat0 accept && nft insert rule inet mine fwd oifname bosh-nat0 accept
    ");
    assert_eq!(
        on(table("filter", None, &["FORWARD", "DOCKER-USER"])),
        "",
        "a policy of accept drops nothing"
    );
    let opened = ForeignTable { rules: b"..bosh-nat0\0..".to_vec(), ..docker.clone() };
    assert_eq!(on(opened), "", "the bridge is in its rules");
    let for_another = ForeignTable { rules: b"..bosh-nat01\0..".to_vec(), ..docker };
    assert_ne!(on(for_another), "");
}

#[test]
fn a_table_matters_to_segments_of_its_ip_version() {
    let v6 = |foreign: ForeignTable| ForeignTable { family: "ip6", ..foreign };
    let docker = table("filter", Some("FORWARD"), &["FORWARD", "DOCKER-USER"]);
    let ufw = table("filter", Some("FORWARD"), &["FORWARD", "ufw-before-forward"]);
    let host = |foreign: Vec<ForeignTable>| Facts { forwards_v6: true, foreign, ..facts() };
    let both = host(vec![docker.clone(), v6(docker.clone())]);
    insta::assert_snapshot!(report(&nat("fd00::1/64"), &both), @r"
    Docker (IPv6) drops forwarded packets, also those of VMs on bridge 'bosh-nat0'
        ip6tables -I DOCKER-USER -i bosh-nat0 -j ACCEPT && ip6tables -I DOCKER-USER -o bosh-nat0 -j ACCEPT
    ");
    assert_eq!(report(&nat("10.0.0.1/24"), &both).lines().count(), 2);
    assert_eq!(report(&nat("10.0.0.1/24"), &host(vec![v6(docker.clone())])), "");
    let two = segment(Keeper::Cpi {
        addresses: vec!["10.0.0.1/24".parse().unwrap(), "fd00::1/64".parse().unwrap()],
        masquerade: true,
        services: None,
        closed: false,
        uplink: None,
    });
    assert_eq!(report(&two, &both).lines().count(), 4, "both of Docker's");
    assert_eq!(
        report(&two, &host(vec![ufw.clone(), v6(ufw)])).lines().count(),
        2,
        "ufw's command is for both"
    );
    let bridged = Facts { bridges_call_iptables: true, ..host(vec![v6(docker)]) };
    assert_eq!(
        report(&segment(Keeper::Operator), &bridged),
        "",
        "bridge-nf-call-ip6tables is another switch"
    );
}

#[test]
fn firewalls_that_drop_packets_to_the_host() {
    let Keeper::Cpi { addresses, masquerade, closed, uplink, .. } = nat("10.0.0.1/24").keeper
    else {
        panic!()
    };
    let serving = |services| {
        let (addresses, uplink) = (addresses.clone(), uplink.clone());
        segment(Keeper::Cpi { addresses, masquerade, services: Some(services), closed, uplink })
    };
    let closed =
        |foreign: ForeignTable| ForeignTable { input_drop_chain: Some("INPUT".into()), ..foreign };
    let ufw = closed(table("filter", None, &["INPUT", "ufw-before-input"]));
    let own = closed(ForeignTable { family: "inet", ..table("mine", None, &["INPUT"]) });
    let other = closed(ForeignTable { family: "ip6", ..table("filter", None, &["INPUT"]) });
    let facts = Facts { foreign: vec![ufw, own, other], ..facts() };
    assert_eq!(report(&serving(Vec::new()), &facts), "", "nothing is served");
    insta::assert_snapshot!(report(&serving(vec![(6, 22)]), &facts), @r"
    ufw drops packets to this host, also to host_services, from VMs on bridge 'bosh-nat0'
        ufw allow in on bosh-nat0
    chain 'INPUT' of table 'inet mine' drops packets to this host, also to host_services, from VMs on bridge 'bosh-nat0'
        nft insert rule inet mine INPUT iifname bosh-nat0 accept
    ");
}

#[test]
fn firewalld_needs_a_policy_for_vms_without_masquerading() {
    let Keeper::Cpi { addresses, services, closed, uplink, .. } = nat("10.0.0.1/24").keeper else {
        panic!()
    };
    let routed = segment(Keeper::Cpi { addresses, masquerade: false, services, closed, uplink });
    let firewalld =
        ForeignTable { family: "inet", ..table("firewalld", None, &["filter_FORWARD"]) };
    insta::assert_snapshot!(report(&routed, &Facts { foreign: vec![firewalld], ..facts() }), @r"
    firewalld drops forwarded packets, also those of VMs on bridge 'bosh-nat0'
        firewall-cmd --permanent --zone=trusted --add-interface=bosh-nat0 && firewall-cmd --permanent --new-policy=bosh-nat0 && firewall-cmd --permanent --policy=bosh-nat0 --add-ingress-zone=ANY && firewall-cmd --permanent --policy=bosh-nat0 --add-egress-zone=trusted && firewall-cmd --permanent --policy=bosh-nat0 --set-target=ACCEPT && firewall-cmd --reload
    ");
}

#[test]
fn only_br_netfilter_affects_an_operators_bridge() {
    let docker = table("filter", Some("FORWARD"), &["FORWARD", "DOCKER-USER"]);
    let facts = Facts { foreign: vec![docker], ..facts() };
    assert_eq!(report(&segment(Keeper::Operator), &facts), "");
    let facts = Facts { bridges_call_iptables: true, ..facts };
    insta::assert_snapshot!(report(&segment(Keeper::Operator), &facts), @r"
    Docker drops frames between VMs, because bridge-nf-call-iptables is 1, on bridge 'bosh-nat0'
        iptables -I DOCKER-USER -i bosh-nat0 -j ACCEPT && iptables -I DOCKER-USER -o bosh-nat0 -j ACCEPT
    br_netfilter passes frames between VMs on bridge 'bosh-nat0' to these rules, too
        sysctl -w net.bridge.bridge-nf-call-iptables=0
    ");
    let legacy = Facts { foreign: Vec::new(), has_legacy_filter: true, ..facts };
    assert_eq!(report(&segment(Keeper::Operator), &legacy), "");
    let legacy_docker = Facts { has_docker: true, ..legacy };
    insta::assert_snapshot!(report(&segment(Keeper::Operator), &legacy_docker), @r"
    Docker uses iptables-legacy, which may drop packets of VMs on bridge 'bosh-nat0'
        iptables-legacy -I DOCKER-USER -i bosh-nat0 -j ACCEPT && iptables-legacy -I DOCKER-USER -o bosh-nat0 -j ACCEPT
    br_netfilter passes frames between VMs on bridge 'bosh-nat0' to these rules, too
        sysctl -w net.bridge.bridge-nf-call-iptables=0
    ");
}

#[test]
fn overlapping_routes_and_kernel_settings() {
    let routed = |link: &str, to: &str| Facts {
        routes: vec![(link.into(), to.parse().unwrap())],
        ..facts()
    };
    let not_forwarding = DefaultRoute { link: "eth0.5".into(), mtu: 1450, forwards_v4: false };
    let small = Facts {
        default_route: Some(not_forwarding),
        bridges: vec![("bosh-nat0".into(), 1500)],
        ..facts()
    };
    let found = [
        report(&nat("10.0.0.1/24"), &routed("tun0", "10.0.0.0/8")),
        report(&nat("192.168.122.1/24"), &routed("virbr0", "192.168.122.0/24")),
        report(&nat("172.17.0.1/16"), &routed("docker0", "172.17.0.0/16")),
        report(&nat("fd00::1/64"), &facts()),
        report(&nat("10.0.0.1/24"), &small),
    ];
    insta::assert_snapshot!(found.join("\n"), @r"
    subnet 10.0.0.0/24 of bridge 'bosh-nat0' overlaps with the route of 10.0.0.0/8 to 'tun0'
        give network 'lab' a subnet that 'ip route' does not list
    subnet 192.168.122.0/24 of bridge 'bosh-nat0' overlaps with the route of 192.168.122.0/24 to 'virbr0' of libvirt
        virsh net-destroy default && virsh net-autostart --disable default; or give network 'lab' a subnet that 'ip route' does not list
    subnet 172.17.0.0/16 of bridge 'bosh-nat0' overlaps with the route of 172.17.0.0/16 to 'docker0' of Docker
        give network 'lab' a subnet that 'ip route' does not list
    this host does not forward IPv6, but VMs on bridge 'bosh-nat0' use it
        sysctl -w net.ipv6.conf.all.forwarding=1
    this host does not forward packets from 'eth0.5', so no reply reaches a VM
        sysctl -w net.ipv4.conf.eth0/5.forwarding=1
    bridge 'bosh-nat0' has an MTU of 1500 bytes, but the default route's link 'eth0.5' only 1450: large packets may get lost
        ip link set bosh-nat0 mtu 1450, then reboot its VMs: they read the MTU when they start
    ");
    assert_eq!(
        report(&nat("10.0.0.1/24"), &routed("bosh-nat0", "10.0.0.0/24")),
        "",
        "its own route"
    );
}

#[test]
fn forwards_from_addresses_that_no_link_has() {
    let forward = |address: &str, count| Forward {
        address: address.parse().ok(),
        protocol: 6,
        host: 8080,
        to: "10.0.0.5".parse().unwrap(),
        guest: 80,
        count,
    };
    let forwards = vec![
        forward("192.0.2.9", 1),
        forward("2001:db8::9", 3),
        forward("192.0.2.1", 1),
        forward("", 1),
    ];
    let rules = Some(crate::store::nic_rules::NicRules { forwards, ..Default::default() });
    let wire = crate::store::record::Wire::Tap {
        tap: LinkName::parse("bqn0").unwrap(),
        segment: nat("10.0.0.1/24"),
    };
    let nic = Nic { network: "lab".into(), mac: [2, 0, 0, 0, 0, 1].into(), wire, rules };
    let unassigned = ["192.0.2.9", "2001:db8::9"].map(|ip| ip.parse().unwrap()).to_vec();
    let found = findings(&nat("10.0.0.1/24"), &[nic], &Facts { unassigned, ..facts() });
    let lines: Vec<_> =
        found.into_iter().map(|found| format!("{}\n    {}", found.cause, found.cure)).collect();
    insta::assert_snapshot!(lines.join("\n"), @r"
    port tcp/8080 of 192.0.2.9 leads to 10.0.0.5, but no link of this host has 192.0.2.9
        ip address add 192.0.2.9 dev LINK; do nothing if VRRP assigns the address
    ports tcp/8080-8082 of 2001:db8::9 lead to 10.0.0.5, but no link of this host has 2001:db8::9
        ip address add 2001:db8::9 dev LINK nodad; do nothing if VRRP assigns the address
    ");
}
