//! Topologies as code: a [`Plan`] is plain fields, one file per topology says which and draws it, [`Topology::build`]
//! makes it.
//!
//! Every plan is cut from this one small internet; addresses are those of the recorded samples:
//!
//! ```text
//!                                  relay 0             relay 1
//!                                  203.0.113.2         203.0.113.130
//!   client 0  192.0.2.2   --.          |                   |
//!   client 1  192.0.2.66  ---\---[ router: .1/.65/.129 everywhere ]--- gateway 198.51.100.2
//!   (or behind its NAT        \        |                               (or behind its NAT
//!    10.10.i.2 -> 192.0.2.x)           |                                10.20.0.2 -> 198.51.100.2)
//!                                   portal                                 |  eth1 172.20.0.1, fd00:db8:20::1
//!                                   203.0.113.66                           |
//!                                                                       LAN host eth0
//!                                                                       172.20.0.100, fd00:db8:20::100
//!                                                                       172.20.0.101, fd00:db8:20::101
//! ```
//!
//! Clients beyond the third are at 198.18.i.2 (RFC 2544's range).
//!
//! The gateway's namespace forwards nothing by itself: the daemon sets that up, or [`Topology::prepare_gateway`] by the very
//! lines that README.md gives an operator who does it without the daemon.

pub mod direct;
pub mod dual_stack;
pub mod nat;
pub mod relay_only;
pub mod symmetric_nat;
pub mod two_relays;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;

use super::{
    netns::NetNs,
    readme,
    wire::{self, Link, Wire},
};

/// The LAN host that most scenarios talk to.
pub const LAN_HOST: (Ipv4Addr, Ipv6Addr) =
    (Ipv4Addr::new(172, 20, 0, 100), Ipv6Addr::new(0xfd00, 0xdb8, 0x20, 0, 0, 0, 0, 0x100));

/// A second address of the LAN host, for a second resource.
pub const LAN_HOST_2: (Ipv4Addr, Ipv6Addr) =
    (Ipv4Addr::new(172, 20, 0, 101), Ipv6Addr::new(0xfd00, 0xdb8, 0x20, 0, 0, 0, 0, 0x101));

/// Where the portal listens.
pub const PORTAL: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 66);

/// A NAT router in front of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nat {
    /// None: the node has a public address.
    None,
    /// Keeps source ports, so the mapping is the same towards everybody: hole punching works.
    PortPreserving,
    /// A fresh random port per destination: nothing but a relay works.
    Symmetric,
}

/// What to build.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Name in the scenario table.
    pub name: &'static str,
    /// How many clients.
    pub clients: u8,
    /// How many relays.
    pub relays: u8,
    /// IPv6 on the internet too (the LAN always has both).
    pub internet_v6: bool,
    /// The router drops UDP between clients and gateway.
    pub relay_only: bool,
    /// In front of each client.
    pub client_nat: Nat,
    /// In front of the gateway.
    pub gateway_nat: Nat,
    /// The links of clients and gateway to the router.
    pub link: Link,
}

impl Plan {
    /// One client, one relay, IPv4, no NAT, plain links.
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            clients: 1,
            relays: 1,
            internet_v6: false,
            relay_only: false,
            client_nat: Nat::None,
            gateway_nat: Nat::None,
            link: Link::default(),
        }
    }
}

/// A namespace with its addresses on the internet.
#[derive(Debug)]
pub struct Node {
    /// The namespace.
    pub namespace: NetNs,
    /// As others see it (the NAT's address if there is one).
    pub v4: Ipv4Addr,
    /// Only with [`Plan::internet_v6`].
    pub v6: Option<Ipv6Addr>,
}

/// A small internet that exists as long as this value.
#[derive(Debug)]
pub struct Topology {
    /// What it was made from.
    pub plan: Plan,
    /// Clients.
    pub clients: Vec<Node>,
    /// The gateway: `eth0` is the uplink, `eth1` the LAN.
    pub gateway: Node,
    /// Relays.
    pub relays: Vec<Node>,
    /// The portal.
    pub portal: Node,
    /// The LAN host.
    pub lan: NetNs,
    /// The router in the middle.
    pub router: NetNs,
    nats: Vec<NetNs>,
    _wires: Vec<Wire>,
}

impl Topology {
    /// Makes namespaces, links, addresses, routes and NAT.
    ///
    /// # Errors
    /// Without root, or with what `ip` or `nft` said.
    pub fn build(plan: Plan) -> Result<Self> {
        let router = NetNs::new("router")?;
        router.sysctl(&["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"])?;
        let mut maker = Maker { plan: &plan, router: &router, nats: Vec::new(), wires: Vec::new() };

        let mut clients = Vec::new();
        for i in 0..plan.clients {
            let site = Site {
                v4: match i {
                    0..4 => Ipv4Addr::new(192, 0, 2, 64 * i + 2),
                    _ => Ipv4Addr::new(198, 18, i, 2),
                },
                v4_prefix: 26,
                v6: Ipv6Addr::new(0x2001, 0xdb8, 0xc, i.into(), 0, 0, 0, 2),
                inside: Ipv4Addr::new(10, 10, i, 2),
            };
            clients.push(maker.attach(
                &format!("client{i}"),
                &format!("cl{i}"),
                site,
                plan.client_nat,
                plan.link,
            )?);
        }
        let site = Site {
            v4: Ipv4Addr::new(198, 51, 100, 2),
            v4_prefix: 24,
            v6: Ipv6Addr::new(0x2001, 0xdb8, 0x9, 0, 0, 0, 0, 2),
            inside: Ipv4Addr::new(10, 20, 0, 2),
        };
        let gateway = maker.attach("gateway", "gw", site, plan.gateway_nat, plan.link)?;
        let mut relays = Vec::new();
        for i in 0..plan.relays {
            let site = Site {
                v4: Ipv4Addr::new(203, 0, 113, 128 * i + 2),
                v4_prefix: 26,
                v6: Ipv6Addr::new(0x2001, 0xdb8, 0x4, i.into(), 0, 0, 0, 2),
                inside: Ipv4Addr::UNSPECIFIED,
            };
            relays.push(maker.attach(
                &format!("relay{i}"),
                &format!("rl{i}"),
                site,
                Nat::None,
                Link::default(),
            )?);
        }
        let site = Site {
            v4: PORTAL,
            v4_prefix: 26,
            v6: Ipv6Addr::new(0x2001, 0xdb8, 0xb, 0, 0, 0, 0, 2),
            inside: Ipv4Addr::UNSPECIFIED,
        };
        let portal = maker.attach("portal", "portal", site, Nat::None, Link::default())?;
        let Maker { nats, wires, .. } = maker;

        let lan = lan(&gateway.namespace)?;
        // A namespace may inherit what the machine has.
        gateway.namespace.sysctl(&["net.ipv4.ip_forward=0", "net.ipv6.conf.all.forwarding=0"])?;
        let topology = Self { clients, gateway, relays, portal, lan, nats, _wires: wires, router, plan };
        if topology.plan.relay_only {
            topology.block_direct()?;
        }
        Ok(topology)
    }

    /// Prepares the gateway's namespace as README.md says for `--no-network-setup`: for a daemon with that flag, or for others
    /// in its place.
    ///
    /// # Errors
    /// With what `nft` said.
    pub fn prepare_gateway(&self) -> Result<()> {
        let (settings, script) = readme::preparation()?;
        self.gateway.namespace.sysctl(&settings)?;
        self.gateway.namespace.nft(script)
    }

    /// From now on the router drops UDP between clients and gateway: only a relay connects them.
    ///
    /// # Errors
    /// With what `nft` said.
    pub fn block_direct(&self) -> Result<()> {
        self.router.nft(
            r#"table inet relay_only {
              chain forward {
                type filter hook forward priority filter; policy accept;
                iifname "cl*" oifname "gw" meta l4proto udp counter drop
                iifname "gw" oifname "cl*" meta l4proto udp counter drop
              }
            }"#,
        )
    }

    /// The same for one client only; there is no way back.
    ///
    /// # Errors
    /// With what `nft` said.
    pub fn block_direct_of(&self, client: usize) -> Result<()> {
        self.router.nft(&format!(
            r#"table inet relay_only_{client} {{
              chain forward {{
                type filter hook forward priority filter; policy accept;
                iifname "cl{client}" oifname "gw" meta l4proto udp counter drop
                iifname "gw" oifname "cl{client}" meta l4proto udp counter drop
              }}
            }}"#
        ))
    }

    /// Undoes [`Topology::block_direct`].
    ///
    /// # Errors
    /// With what `nft` said.
    pub fn allow_direct(&self) -> Result<()> {
        self.router.nft("delete table inet relay_only\n")
    }

    /// All namespaces with what they are for, for a person who wants to enter them.
    pub fn namespaces(&self) -> Vec<&NetNs> {
        let nodes = self.clients.iter().chain([&self.gateway, &self.portal]).chain(&self.relays);
        nodes.map(|node| &node.namespace).chain([&self.lan, &self.router]).chain(&self.nats).collect()
    }

    /// The addresses of relay `index` in the order a portal lists them: v4, then v6.
    pub fn relay_addresses(&self, index: usize) -> Vec<IpAddr> {
        let relay = &self.relays[index];
        [Some(IpAddr::V4(relay.v4)), relay.v6.map(IpAddr::V6)].into_iter().flatten().collect()
    }
}

/// Addresses of one node; the router's end is always the address before.
struct Site {
    v4: Ipv4Addr,
    v4_prefix: u8,
    v6: Ipv6Addr,
    /// Behind a NAT.
    inside: Ipv4Addr,
}

struct Maker<'a> {
    plan: &'a Plan,
    router: &'a NetNs,
    nats: Vec<NetNs>,
    wires: Vec<Wire>,
}

impl Maker<'_> {
    /// `port` is the router's interface name.
    fn attach(&mut self, name: &str, port: &str, site: Site, nat: Nat, link: Link) -> Result<Node> {
        let namespace = NetNs::new(name)?;
        let outer = self.plan.internet_v6 && nat == Nat::None;
        let router_v4 = Ipv4Addr::from_bits(site.v4.to_bits() - 1);
        let router_v6 = Ipv6Addr::from_bits(site.v6.to_bits() - 1);
        let (public, public_port) = if nat == Nat::None {
            (&namespace, "eth0")
        } else {
            self.nats.push(self.make_nat(name, &namespace, site.inside, nat)?);
            (&self.nats[self.nats.len() - 1], "out")
        };
        let wire = wire::connect((public, public_port), (self.router, port), link)?;
        let mut here = vec![
            format!("addr add {}/{} dev {public_port}", site.v4, site.v4_prefix),
            format!("route add default via {router_v4}"),
        ];
        let mut there = vec![format!("addr add {router_v4}/{} dev {port}", site.v4_prefix)];
        if outer {
            here.push(format!("addr add {}/64 dev {public_port} nodad", site.v6));
            there.push(format!("addr add {router_v6}/64 dev {port} nodad"));
            here.push(format!("route add ::/0 via {router_v6}"));
        }
        self.router.ip_batch(&there)?;
        public.ip_batch(&here)?;
        self.wires.extend(wire);
        Ok(Node { namespace, v4: site.v4, v6: outer.then_some(site.v6) })
    }

    fn make_nat(&self, name: &str, node: &NetNs, inside: Ipv4Addr, nat: Nat) -> Result<NetNs> {
        let router = NetNs::new(&format!("{name}-nat"))?;
        router.sysctl(&["net.ipv4.ip_forward=1"])?;
        wire::connect((node, "eth0"), (&router, "in"), Link::default())?;
        let router_inside = Ipv4Addr::from_bits(inside.to_bits() - 1);
        node.ip_batch(&[
            format!("addr add {inside}/24 dev eth0"),
            format!("route add default via {router_inside}"),
        ])?;
        router.ip_batch(&[format!("addr add {router_inside}/24 dev in")])?;
        let random = if nat == Nat::Symmetric { "fully-random" } else { "" };
        // What comes from outside unasked is dropped before conntrack remembers it: an entry for it would take the port
        // that the inside's own packet wants to keep.
        router.nft(&format!(
            r#"table ip nat {{
              chain postrouting {{ type nat hook postrouting priority srcnat; oifname "out" masquerade {random}; }}
            }}
            table ip filter {{
              chain input {{ type filter hook input priority filter; iifname "out" meta l4proto udp drop; }}
            }}
            "#
        ))?;
        Ok(router)
    }
}

fn lan(gateway: &NetNs) -> Result<NetNs> {
    let host = NetNs::new("lan")?;
    wire::connect((gateway, "eth1"), (&host, "eth0"), Link::default())?;
    gateway.ip_batch(&["addr add 172.20.0.1/24 dev eth1", "addr add fd00:db8:20::1/64 dev eth1 nodad"])?;
    // The second IPv6 address is deprecated from the start: servers that answer from an unbound UDP socket then take the
    // first, as they do for IPv4.
    let addresses = [
        format!("addr add {}/24 dev eth0", LAN_HOST.0),
        format!("addr add {}/24 dev eth0", LAN_HOST_2.0),
        format!("addr add {}/64 dev eth0 nodad", LAN_HOST.1),
        format!("addr add {}/64 dev eth0 nodad preferred_lft 0", LAN_HOST_2.1),
    ];
    host.ip_batch(&addresses)?;
    Ok(host)
}
