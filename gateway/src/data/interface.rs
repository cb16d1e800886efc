//! Addresses, routes and policy rules of the TUN device, by rtnetlink (cli-and-service.md section 13).
//!
//! Every `init` is applied as a difference: what is right already stays untouched, so that a portal that
//! reconnects does not disturb traffic, and leftovers of a crash are adopted. Addresses and routes vanish with the
//! device; the rules do not, and are removed by [`Interface::remove`].
//!
//! ```text
//! priority 100: not fwmark 0xfd002021 lookup 0x2021fd00     (IPv4 and IPv6)
//! table 0x2021fd00: 100.64.0.0/11, fd00:2021:1111::/107 dev tun-firezone
//! ```
//!
//! Upstream has two more tables with rules at 200 and 300: copies of link-scope routes and default routes. Both
//! serve the Internet resource of *clients*. A gateway routes nothing but the tunnel ranges into its device, which
//! no directly connected network may overlap, so there is nothing that those tables could decide here.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use futures_util::TryStreamExt as _;
use gateway_proto::addr::{MAX_INNER, TUNNEL_V4, TUNNEL_V6, TunnelAddrs};
use rtnetlink::{
    Handle, LinkUnspec, RouteMessageBuilder,
    packet_core::ErrorMessage,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressHeaderFlags, AddressMessage},
        link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute},
        route::{RouteMessage, RouteProtocol, RouteScope},
        rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage},
    },
};

/// The routing table of the tunnel ranges.
const TABLE: u32 = 0x2021_fd00;
/// The rules' place; the kernel's own start at 32766, `local` is at 0.
const PRIORITY: u32 = 100;

/// How long an address may be tentative.
const SETTLE: Duration = Duration::from_secs(5);
/// How often it is looked at.
const SETTLE_LOOK: Duration = Duration::from_millis(10);

/// Which families the TUN device has an address of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Families {
    /// Both.
    Dual,
    /// IPv4 only; the machine has no IPv6.
    V4Only,
    /// IPv6 only; the machine has no IPv4.
    V6Only,
}

/// The TUN device as the routing system sees it.
pub struct Interface {
    handle: Handle,
    connection: tokio::task::JoinHandle<()>,
    name: String,
}

impl Interface {
    /// Opens a netlink socket in the namespace of the calling thread. Nothing is changed yet.
    ///
    /// # Errors
    /// The kernel offers no rtnetlink here.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn new(tun_name: &str) -> Result<Self> {
        let (connection, handle, _) =
            rtnetlink::new_connection().context("Failed to open a netlink socket")?;
        Ok(Self { handle, connection: tokio::spawn(connection), name: tun_name.to_owned() })
    }

    /// Makes the device have exactly `addrs`, up, with the tunnel ranges routed to it.
    ///
    /// # Errors
    /// The device is gone, cannot be brought up, or takes an address of neither family.
    pub async fn configure(&mut self, addrs: TunnelAddrs) -> Result<Families> {
        let name = self.name.clone();
        let index = self.index().await?;
        self.quiet_link_local(index).await;
        self.set_mtu(index)
            .await
            .with_context(|| format!("Failed to set the MTU of {name} to {MAX_INNER}"))?;
        let present =
            self.addresses(index).await.with_context(|| format!("Failed to list the addresses of {name}"))?;
        for stale in present.iter().filter(|a| !is_one_of(a, addrs)) {
            if let Err(e) = self.handle.address().del(stale.clone()).execute().await {
                tracing::warn!("Failed to remove a stale address from {name}: {}", reason(&e));
            }
        }
        let v4 = self.add_address(index, addrs.v4.into(), &present).await;
        let v6 = self.add_address(index, addrs.v6.into(), &present).await;
        let up = LinkUnspec::new_with_index(index).up().build();
        self.handle
            .link()
            .change(up)
            .execute()
            .await
            .with_context(|| format!("Failed to bring {name} up"))?;
        let families = match (v4, v6) {
            (Ok(()), Ok(())) => Families::Dual,
            (Ok(()), Err(e)) => {
                tracing::info!("{name} has no IPv6 address: {}", reason(&e));
                Families::V4Only
            }
            (Err(e), Ok(())) => {
                tracing::info!("{name} has no IPv4 address: {}", reason(&e));
                Families::V6Only
            }
            (Err(v4), Err(v6)) => {
                bail!("{name} takes neither address: IPv4: {}; IPv6: {}", reason(&v4), reason(&v6))
            }
        };
        if families != Families::V4Only {
            self.settled(index).await;
        }
        if families != Families::V6Only {
            self.route_v4(index).await;
            self.add_rule(AddressFamily::Inet).await;
        }
        if families != Families::V4Only {
            self.route_v6(index).await;
            self.add_rule(AddressFamily::Inet6).await;
        }
        Ok(families)
    }

    /// Removes what would outlive the device: the two rules. Harmless when they are not there. Returns which were.
    pub async fn remove(self) -> Vec<AddressFamily> {
        let mut removed = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            match self.handle.rule().del(rule(family)).execute().await {
                Ok(()) => removed.push(family),
                Err(e) if is(&e, &[libc::ENOENT, libc::ESRCH, libc::EAFNOSUPPORT, libc::EOPNOTSUPP]) => {}
                Err(e) => tracing::warn!("Failed to remove the {family:?} routing rule: {}", reason(&e)),
            }
        }
        removed
    }

    async fn index(&self) -> Result<u32> {
        let links = self.handle.link().get().match_name(self.name.clone()).execute().try_next().await;
        let link = links.ok().flatten().with_context(|| format!("The TUN device {} is gone", self.name))?;
        Ok(link.header.index)
    }

    /// No link-local address: neighbour discovery has no business in the tunnel. Failing is harmless.
    async fn quiet_link_local(&self, index: u32) {
        let none = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
        let message = LinkUnspec::new_with_index(index)
            .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![none]))
            .build();
        if let Err(e) = self.handle.link().change(message).execute().await {
            tracing::debug!("{} keeps its link-local address: {}", self.name, reason(&e));
        }
    }

    async fn set_mtu(&self, index: u32) -> Result<(), rtnetlink::Error> {
        #[expect(clippy::cast_possible_truncation, reason = "1280")]
        let message = LinkUnspec::new_with_index(index).mtu(MAX_INNER as u32).build();
        self.handle.link().change(message).execute().await
    }

    async fn addresses(&self, index: u32) -> Result<Vec<AddressMessage>, rtnetlink::Error> {
        self.handle.address().get().set_link_index_filter(index).execute().try_collect().await
    }

    async fn add_address(
        &self,
        index: u32,
        ip: IpAddr,
        present: &[AddressMessage],
    ) -> Result<(), rtnetlink::Error> {
        if present.iter().any(|a| address_of(a) == Some((ip, host_prefix(ip)))) {
            return Ok(());
        }
        match self.handle.address().add(index, ip, host_prefix(ip)).execute().await {
            Err(e) if is(&e, &[libc::EEXIST]) => Ok(()),
            other => other,
        }
    }

    /// Waits until every address can be bound. The kernel has nothing to detect duplicates of on a TUN device, but says so in
    /// its own time, seconds on a machine where many devices come and go (RFC 4862 section 5.4 calls it tentative).
    async fn settled(&self, index: u32) {
        let tentative =
            |address: &AddressMessage| address.header.flags.contains(AddressHeaderFlags::Tentative);
        let deadline = Instant::now() + SETTLE;
        while Instant::now() < deadline {
            // Whoever binds is told what is wrong.
            let Ok(present) = self.addresses(index).await else { return };
            if !present.iter().any(tentative) {
                return;
            }
            tokio::time::sleep(SETTLE_LOOK).await;
        }
        tracing::info!("{} still checks its IPv6 address for duplicates after {SETTLE:?}", self.name);
    }

    async fn route_v4(&self, index: u32) {
        let route = RouteMessageBuilder::<std::net::Ipv4Addr>::new()
            .destination_prefix(TUNNEL_V4.addr(), TUNNEL_V4.prefix_len())
            .output_interface(index);
        self.add_route(tunnel_route(route)).await;
    }

    async fn route_v6(&self, index: u32) {
        let route = RouteMessageBuilder::<std::net::Ipv6Addr>::new()
            .destination_prefix(TUNNEL_V6.addr(), TUNNEL_V6.prefix_len())
            .output_interface(index);
        self.add_route(tunnel_route(route)).await;
    }

    /// Adds or replaces: a route of an earlier device of this name cannot survive, but an equal one may be there.
    async fn add_route(&self, route: RouteMessage) {
        if let Err(e) = self.handle.route().add(route).replace().execute().await
            && !is(&e, &[libc::EEXIST, libc::EOPNOTSUPP])
        {
            tracing::warn!("Failed to route a tunnel range to {}: {}", self.name, reason(&e));
        }
    }

    async fn add_rule(&self, family: AddressFamily) {
        let mut request = self.handle.rule().add();
        *request.message_mut() = rule(family);
        match request.execute().await {
            Ok(()) => {}
            Err(e) if is(&e, &[libc::EEXIST]) => {}
            Err(e) => tracing::warn!("Failed to add the {family:?} routing rule: {}", reason(&e)),
        }
    }
}

impl Drop for Interface {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

fn tunnel_route<T>(builder: RouteMessageBuilder<T>) -> RouteMessage {
    builder.table_id(TABLE).protocol(RouteProtocol::Static).scope(RouteScope::Universe).build()
}

/// `not fwmark 0xfd002021 lookup 0x2021fd00`: everything but our own sockets' traffic.
fn rule(family: AddressFamily) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.family = family;
    rule.header.action = RuleAction::ToTable;
    rule.header.flags = RuleFlags::Invert;
    rule.attributes = vec![
        RuleAttribute::Priority(PRIORITY),
        RuleAttribute::FwMark(super::udp::MARK),
        RuleAttribute::Table(TABLE),
        RuleAttribute::Protocol(RouteProtocol::Kernel),
    ];
    rule
}

fn host_prefix(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 32 } else { 128 }
}

fn is_one_of(message: &AddressMessage, addrs: TunnelAddrs) -> bool {
    address_of(message).is_some_and(|(ip, prefix)| addrs.contains(ip) && prefix == host_prefix(ip))
}

/// The interface's own address: IFA_LOCAL where there is one (IPv4), else IFA_ADDRESS.
fn address_of(message: &AddressMessage) -> Option<(IpAddr, u8)> {
    let local = message.attributes.iter().find_map(|a| match a {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    });
    let address = message.attributes.iter().find_map(|a| match a {
        AddressAttribute::Address(ip) => Some(*ip),
        _ => None,
    });
    local.or(address).map(|ip| (ip, message.header.prefix_len))
}

fn is(error: &rtnetlink::Error, errnos: &[i32]) -> bool {
    match error {
        rtnetlink::Error::NetlinkError(ErrorMessage { code: Some(code), .. }) => {
            errnos.contains(&-code.get())
        }
        _ => false,
    }
}

/// The error as an operator wants to read it.
fn reason(error: &rtnetlink::Error) -> String {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io().to_string(),
        other => other.to_string(),
    }
}
