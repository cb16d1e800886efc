//! The TUN device, its addresses, routes and rules.

use std::{
    net::UdpSocket,
    time::{Duration, Instant},
};

use futures_util::TryStreamExt as _;
use gateway_proto::addr::TunnelAddrs;
use rtnetlink::packet_route::address::AddressAttribute;

use super::{ALL, addrs, in_netns, ip};
use crate::data::{
    TUN_NAME,
    interface::{Families, Interface},
    tun::Tun,
};

#[test]
fn interface_is_changed_by_difference_adopted_after_a_crash_and_cleaned_up() {
    in_netns(async {
        let tun = Tun::create(TUN_NAME, 1, ALL).unwrap();
        let mut interface = Interface::new(TUN_NAME).unwrap();
        assert_eq!(interface.configure(addrs(1)).await.unwrap(), Families::Dual);
        let link = ip("link show dev tun-firezone");
        assert!(link.contains("mtu 1280") && link.contains("qlen 10000") && link.contains(",UP"), "{link}");
        assert_eq!(addresses(), ["100.64.0.1/32", "fd00:2021:1111::1/128"]);
        let rule = "100:\tnot from all fwmark 0xfd002021 lookup 539098368";
        let rules = || (ip("-4 rule show priority 100"), ip("-6 rule show priority 100"));
        assert_eq!(rules(), (rule.into(), rule.into()));
        let routes = || (ip("-4 route show table 539098368"), ip("-6 route show table 539098368"));
        let routed = routes();
        assert!(routed.0.starts_with("100.64.0.0/11 dev tun-firezone proto static"), "{routed:?}");
        assert!(routed.1.starts_with("fd00:2021:1111::/107 dev tun-firezone proto static"), "{routed:?}");

        let since = created(interface_index().await).await;
        ip("addr add 192.0.2.9/24 dev tun-firezone");
        tokio::time::sleep(Duration::from_millis(50)).await;
        let changed = TunnelAddrs { v4: addrs(3).v4, ..addrs(1) };
        assert_eq!(interface.configure(changed).await.unwrap(), Families::Dual);
        assert_eq!(addresses(), ["100.64.0.3/32", "fd00:2021:1111::1/128"]);
        assert_eq!(
            created(interface_index().await).await[1],
            since[1],
            "the unchanged address was not touched"
        );
        assert_eq!(routes(), routed);

        drop((interface, tun));
        assert_eq!(rules(), (rule.into(), rule.into()), "a crash leaves the rules");
        let _tun = Tun::create(TUN_NAME, 1, ALL).unwrap();
        let mut interface = Interface::new(TUN_NAME).unwrap();
        assert_eq!(interface.configure(addrs(1)).await.unwrap(), Families::Dual);
        assert_eq!((rules(), routes()), ((rule.into(), rule.into()), routed));
        interface.remove().await;
        assert_eq!(rules(), (String::new(), String::new()));
        Interface::new(TUN_NAME).unwrap().remove().await;
    });
}

#[test]
fn machine_without_ipv6_is_v4_only() {
    in_netns(async {
        let _tun = Tun::create(TUN_NAME, 1, ALL).unwrap();
        std::fs::write(format!("/proc/sys/net/ipv6/conf/{TUN_NAME}/disable_ipv6"), "1").unwrap();
        let mut interface = Interface::new(TUN_NAME).unwrap();
        assert_eq!(interface.configure(addrs(1)).await.unwrap(), Families::V4Only);
        assert_eq!(ip("-6 rule show priority 100"), "");
        let gone = Interface::new("no-such-tun").unwrap().configure(addrs(1)).await.unwrap_err();
        assert_eq!(gone.to_string(), "The TUN device no-such-tun is gone");
    });
}

#[test]
fn addresses_can_be_bound_once_they_are_configured() {
    in_netns(async {
        // A device that detects duplicates, for a second or so: the kernel's work for a TUN device can take as long.
        ip(&format!("link add {TUN_NAME} type veth peer name other"));
        ip("link set dev other up");
        let setting = |name: &str| format!("/proc/sys/net/ipv6/conf/{TUN_NAME}/{name}");
        std::fs::write(setting("accept_dad"), "1").unwrap();
        std::fs::write(setting("dad_transmits"), "1").unwrap();
        let mut interface = Interface::new(TUN_NAME).unwrap();
        let began = Instant::now();
        assert_eq!(interface.configure(addrs(1)).await.unwrap(), Families::Dual);
        assert!(began.elapsed() > Duration::from_millis(300), "it was not tentative: this shows nothing");
        UdpSocket::bind((addrs(1).v6, 0)).unwrap();
        UdpSocket::bind((addrs(1).v4, 0)).unwrap();
        interface.remove().await;
    });
}

#[test]
fn second_owner_of_the_tun_device_fails_in_one_sentence() {
    in_netns(async {
        for (first, second) in [(1, 1), (1, 2), (2, 1), (2, 2)] {
            let queues = Tun::create(TUN_NAME, first, ALL).unwrap();
            assert_eq!(queues.len(), first);
            let error = Tun::create(TUN_NAME, second, ALL).err().expect("the device is exclusive");
            assert_eq!(
                error.to_string(),
                "The TUN device tun-firezone is in use by another process; stop that first",
                "{first} and {second} workers"
            );
        }
    });
}

/// Addresses of the TUN device with their prefix lengths.
fn addresses() -> Vec<String> {
    ip("-o addr show dev tun-firezone")
        .lines()
        .map(|l| l.split_whitespace().nth(3).unwrap().to_owned())
        .collect()
}

/// When each address was created, in the kernel's ticks.
async fn created(index: u32) -> Vec<u32> {
    let (connection, handle, _) = rtnetlink::new_connection().unwrap();
    let task = tokio::spawn(connection);
    let all: Vec<_> =
        handle.address().get().set_link_index_filter(index).execute().try_collect().await.unwrap();
    task.abort();
    let stamp = |a: &AddressAttribute| match a {
        AddressAttribute::CacheInfo(info) => Some(info.cstamp),
        _ => None,
    };
    all.iter().map(|message| message.attributes.iter().find_map(stamp).unwrap()).collect()
}

async fn interface_index() -> u32 {
    let (connection, handle, _) = rtnetlink::new_connection().unwrap();
    let task = tokio::spawn(connection);
    let link =
        handle.link().get().match_name(TUN_NAME.to_owned()).execute().try_next().await.unwrap().unwrap();
    task.abort();
    link.header.index
}
