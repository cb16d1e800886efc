//! Rules of one client against tables of addresses and classes.

use std::net::Ipv4Addr;

use super::*;
use crate::{
    portal::messages::Filter,
    worker::testkit::{cidr, resource_id},
};

fn tcp(first: u16, last: u16) -> Filter {
    Filter::Tcp { first, last }
}

fn permitted(n: u128) -> Decision {
    Decision::Permitted(resource_id(n))
}

#[track_caller]
fn check(resources: &[Resource], table: &[(&str, Class, Decision)]) {
    let mut policy = Policy::new(resources);
    for (ip, class, expect) in table {
        for round in ["first", "memorised"] {
            assert_eq!(policy.decide(ip.parse().unwrap(), *class), *expect, "{ip} {class:?} {round}");
        }
    }
}

#[test]
fn filters_are_inclusive_unions_and_an_empty_list_permits_everything() {
    let resources = [
        cidr(1, "10.0.0.1/32", &[]),
        cidr(2, "10.0.0.2/32", &[tcp(80, 80), tcp(443, 500), tcp(450, 600), tcp(9, 3)]),
        cidr(3, "10.0.0.3/32", &[Filter::Icmp, Filter::Udp { first: 53, last: 53 }]),
        cidr(4, "10.0.0.4/32", &[tcp(9, 3)]),
    ];
    check(
        &resources,
        &[
            ("10.0.0.1", Class::Tcp(1), permitted(1)),
            ("10.0.0.1", Class::Icmp, permitted(1)),
            ("10.0.0.1", Class::Other, permitted(1)),
            ("10.0.0.2", Class::Tcp(79), Decision::Denied),
            ("10.0.0.2", Class::Tcp(80), permitted(2)),
            ("10.0.0.2", Class::Tcp(81), Decision::Denied),
            ("10.0.0.2", Class::Tcp(443), permitted(2)),
            ("10.0.0.2", Class::Tcp(600), permitted(2)),
            ("10.0.0.2", Class::Tcp(601), Decision::Denied),
            ("10.0.0.2", Class::Tcp(5), Decision::Denied),
            ("10.0.0.2", Class::Udp(80), Decision::Denied),
            ("10.0.0.2", Class::Icmp, Decision::Denied),
            ("10.0.0.2", Class::Other, Decision::Denied),
            ("10.0.0.3", Class::Icmp, permitted(3)),
            ("10.0.0.3", Class::Udp(53), permitted(3)),
            ("10.0.0.3", Class::Tcp(53), Decision::Denied),
            ("10.0.0.3", Class::Other, Decision::Denied),
            ("10.0.0.4", Class::Tcp(5), Decision::Denied),
            ("10.0.0.5", Class::Tcp(80), Decision::Denied),
        ],
    );
}

#[test]
fn any_covering_resource_may_permit_and_the_most_specific_one_wins() {
    let resources = [
        cidr(1, "10.0.0.0/8", &[tcp(80, 80), tcp(22, 22)]),
        cidr(2, "10.1.0.0/16", &[tcp(443, 443), tcp(22, 22)]),
        cidr(3, "10.1.0.0/16", &[tcp(22, 22)]),
        cidr(4, "0.0.0.0/0", &[Filter::Icmp]),
        cidr(5, "fd00:db8::/32", &[]),
    ];
    check(
        &resources,
        &[
            ("10.1.2.3", Class::Tcp(80), permitted(1)),
            ("10.1.2.3", Class::Tcp(443), permitted(2)),
            ("10.1.2.3", Class::Tcp(22), permitted(3)),
            ("10.2.2.3", Class::Tcp(22), permitted(1)),
            ("10.2.2.3", Class::Tcp(443), Decision::Denied),
            ("10.1.2.3", Class::Icmp, permitted(4)),
            ("8.8.8.8", Class::Icmp, permitted(4)),
            ("8.8.8.8", Class::Udp(53), Decision::Denied),
            ("fd00:db8::1", Class::Other, permitted(5)),
            ("fd00:db9::1", Class::Other, Decision::Denied),
        ],
    );
}

#[test]
fn many_resources_decide_like_few() {
    // The hashed table against the plain definition of section 4.3.
    let mut state = 1_u64;
    let mut random = |below: u32| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        u32::try_from(state >> 33).unwrap() % below
    };
    let resources: Vec<Resource> = (1..=400)
        .map(|n| {
            let prefix = 18 + random(15);
            let ip = Ipv4Addr::from_bits(0x0a00_0000 | random(1 << 12) << 4);
            let filters = match random(3) {
                0 => vec![],
                1 => vec![tcp(80, 80)],
                _ => vec![Filter::Icmp],
            };
            let net = ipnet::Ipv4Net::new(ip, u8::try_from(prefix).unwrap()).unwrap().trunc();
            cidr(n, &net.to_string(), &filters)
        })
        .collect();
    let mut policy = Policy::new(&resources);
    let mut seen = [0; 2];
    for _ in 0..5000 {
        let ip = IpAddr::from(Ipv4Addr::from_bits(0x0a00_0000 | random(1 << 17)));
        let class = [Class::Tcp(80), Class::Icmp, Class::Other][random(3) as usize];
        let expect = resources
            .iter()
            .filter_map(|r| match &r.kind {
                ResourceKind::Cidr { network, filters, .. } if network.contains(&ip) => {
                    let permits = filters.is_empty()
                        || (class == Class::Icmp && filters.contains(&Filter::Icmp))
                        || (class == Class::Tcp(80) && filters.contains(&tcp(80, 80)));
                    Some((permits, network.prefix_len(), r.id))
                }
                _ => None,
            })
            .max()
            .filter(|(permits, ..)| *permits)
            .map_or(Decision::Denied, |(_, _, id)| Decision::Permitted(id));
        seen[usize::from(expect == Decision::Denied)] += 1;
        assert_eq!(policy.decide(ip, class), expect, "{ip} {class:?}");
    }
    assert!(seen[0] > 500 && seen[1] > 100, "the sample covers both outcomes: {seen:?}");
}

#[test]
fn the_internet_resource_takes_what_no_network_permits_and_refuses_private_addresses() {
    let internet = Resource { id: resource_id(9), kind: ResourceKind::Internet };
    let resources = [cidr(1, "10.1.0.0/16", &[tcp(80, 80)]), cidr(2, "8.8.8.0/24", &[tcp(80, 80)]), internet];
    let private = [
        "10.0.0.1",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.1.1",
        "127.0.0.1",
        "169.254.1.1",
        "100.64.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::1",
        "::ffff:1.2.3.4",
        "fc00::1",
        "fe80::1",
        "ff02::1",
    ];
    let private = private.map(|ip| (ip, Class::Tcp(80), Decision::Private));
    check(&resources, &private);
    let public = ["8.8.9.1", "172.32.0.1", "100.128.0.1", "2001:db8::1", "0.0.0.1"];
    check(&resources, &public.map(|ip| (ip, Class::Other, permitted(9))));
    let networks = [
        ("10.1.0.1", Class::Tcp(80), permitted(1)),
        ("10.1.0.1", Class::Tcp(81), Decision::Denied),
        ("8.8.8.8", Class::Tcp(80), permitted(2)),
        ("8.8.8.8", Class::Tcp(81), permitted(9)),
    ];
    check(&resources, &networks);
}

#[test]
fn a_proxy_address_is_an_entry_of_every_authorised_resource_of_its_name() {
    let filtered = |n, filters: &[Filter]| {
        let (name, pattern) = (String::new(), "*.example.net".to_owned());
        Resource { id: resource_id(n), kind: ResourceKind::Dns { name, pattern, filters: filters.to_vec() } }
    };
    let resources = [
        filtered(7, &[Filter::Icmp, tcp(22, 22)]),
        filtered(3, &[tcp(80, 80), tcp(22, 22)]),
        cidr(5, "100.96.0.1/32", &[tcp(22, 22), tcp(443, 443)]),
        cidr(8, "100.96.0.2/32", &[tcp(22, 22)]),
        cidr(9, "100.96.0.0/16", &[tcp(22, 22), tcp(53, 53)]),
        Resource { id: resource_id(99), kind: ResourceKind::Internet },
    ];
    let table: [(&str, &[u128], Class, Decision); 13] = [
        ("100.96.0.1", &[3], Class::Tcp(80), permitted(3)),
        ("100.96.0.1", &[3], Class::Icmp, Decision::Denied),
        ("100.96.0.1", &[3, 7], Class::Icmp, permitted(7)),
        ("100.96.0.1", &[3, 7], Class::Tcp(80), permitted(3)),
        // The larger id; a network of one address counts as much, a wider one less.
        ("100.96.0.1", &[3, 7], Class::Tcp(22), permitted(7)),
        ("100.96.0.1", &[3], Class::Tcp(22), permitted(5)),
        ("100.96.0.2", &[3, 7], Class::Tcp(22), permitted(8)),
        ("100.96.0.3", &[3, 7], Class::Tcp(22), permitted(7)),
        ("100.96.0.1", &[3, 7], Class::Tcp(443), permitted(5)),
        ("100.96.0.1", &[3, 7], Class::Tcp(53), permitted(9)),
        ("100.96.0.1", &[4, 5, 8], Class::Tcp(80), Decision::Denied),
        ("100.96.0.1", &[], Class::Tcp(80), Decision::Denied),
        ("fd00:2021:1111:8000::1", &[3], Class::Tcp(80), permitted(3)),
    ];
    for (ip, belongs_to, class, expect) in table {
        let mut policy = Policy::new(&resources);
        let ids: Vec<_> = belongs_to.iter().map(|n| resource_id(*n)).collect();
        for round in ["first", "memorised"] {
            let decision = policy.decide_proxy(ip.parse().unwrap(), &ids, class);
            assert_eq!(decision, expect, "{ip} {belongs_to:?} {class:?} {round}");
        }
    }
}

#[test]
fn a_change_of_names_acts_on_what_was_memorised() {
    let ip = "100.96.0.1".parse().unwrap();
    let resources = [crate::worker::testkit::dns(3, "*")];
    let mut policy = Policy::new(&resources);
    assert_eq!(policy.decide_proxy(ip, &[resource_id(3)], Class::Icmp), permitted(3));
    policy.on_names_changed();
    assert_eq!(policy.decide_proxy(ip, &[resource_id(4)], Class::Icmp), Decision::Denied);
    policy.on_names_changed();
    assert_eq!(policy.decide_proxy(ip, &[resource_id(3)], Class::Icmp), permitted(3));
    policy.replace(&[]);
    assert_eq!(policy.decide_proxy(ip, &[resource_id(3)], Class::Icmp), Decision::Denied);
}

#[test]
fn a_change_acts_on_what_was_memorised() {
    let ip = "10.0.0.1".parse().unwrap();
    let mut policy = Policy::new(&[cidr(1, "10.0.0.0/8", &[])]);
    assert_eq!(policy.decide(ip, Class::Icmp), permitted(1));
    policy.replace(&[cidr(1, "10.0.0.0/8", &[tcp(80, 80)])]);
    assert_eq!(policy.decide(ip, Class::Icmp), Decision::Denied);
    policy.replace(&[]);
    assert_eq!(policy.decide(ip, Class::Tcp(80)), Decision::Denied);
}
