//! What netlink says about links, neighbours and routes, put together: by which link, from which address and to which
//! hardware address does the kernel send? Knows no socket.

use std::net::IpAddr;

use rtnetlink::packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkFlags, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteType, RouteVia},
};
use rustc_hash::{FxHashMap, FxHashSet};

use super::{
    headers::{Hop, Mac},
    ways::{Answer, Pair},
};

/// What a message means for the answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    Nothing,
    /// Some are different now.
    Answers,
    /// Some may be different: the kernel must be asked for routes again.
    Routes,
    /// [`Table::take_stale`] may have something.
    Stale,
}

/// All that is known.
#[derive(Default)]
pub struct Table {
    /// Interfaces that we can send on.
    uplinks: FxHashSet<u32>,
    links: FxHashMap<u32, Link>,
    neighbours: FxHashMap<(u32, IpAddr), Neighbour>,
    routes: FxHashMap<Pair, Option<Resolved>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Link {
    mac: Mac,
    mtu: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Neighbour {
    mac: Mac,
    /// The kernel has not heard of it for a while, and asks it only if it is used.
    stale: bool,
}

/// A route, as far as it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Resolved {
    interface: u32,
    next: IpAddr,
    source: IpAddr,
    mtu: Option<usize>,
}

impl Table {
    /// Only these interfaces can be sent on.
    pub fn new(uplinks: impl IntoIterator<Item = u32>) -> Self {
        Self { uplinks: uplinks.into_iter().collect(), ..Self::default() }
    }

    /// The kernel says something by itself, or in answer to a dump.
    pub fn on_message(&mut self, message: &RouteNetlinkMessage) -> Change {
        match message {
            RouteNetlinkMessage::NewLink(link) => self.on_link(link),
            RouteNetlinkMessage::DelLink(link) => changed(self.links.remove(&link.header.index).is_some()),
            RouteNetlinkMessage::NewNeighbour(neighbour) => self.on_neighbour(neighbour),
            RouteNetlinkMessage::DelNeighbour(neighbour) => match place_of(neighbour) {
                Some(place) => changed(self.neighbours.remove(&place).is_some()),
                None => Change::Nothing,
            },
            RouteNetlinkMessage::NewRoute(_)
            | RouteNetlinkMessage::DelRoute(_)
            | RouteNetlinkMessage::NewRule(_)
            | RouteNetlinkMessage::DelRule(_)
            | RouteNetlinkMessage::NewAddress(_)
            | RouteNetlinkMessage::DelAddress(_) => Change::Routes,
            _ => Change::Nothing,
        }
    }

    /// The kernel was asked for the route of `pair`; `None` if there is none.
    pub fn on_route(&mut self, pair: Pair, route: Option<&RouteMessage>) {
        self.routes.insert(pair, route.and_then(|route| resolve(pair, route)));
    }

    /// Pairs whose route was asked for.
    pub fn pairs(&self) -> impl Iterator<Item = Pair> {
        self.routes.keys().copied()
    }

    /// Keeps only those pairs.
    pub fn retain(&mut self, keep: impl Fn(&Pair) -> bool) {
        self.routes.retain(|pair, _| keep(pair));
    }

    /// The neighbours that something is sent to and that the kernel would only ask whether they are still there if it
    /// were told so; each once, until the kernel says it again.
    pub fn take_stale(&mut self) -> Vec<(u32, IpAddr)> {
        let Self { neighbours, routes, .. } = self;
        let next = routes.values().flatten().map(|route| (route.interface, route.next));
        next.filter(|next| neighbours.get_mut(next).is_some_and(|n| std::mem::take(&mut n.stale))).collect()
    }

    /// All neighbours are about to be listed anew.
    pub fn forget_neighbours(&mut self) {
        self.neighbours.clear();
    }

    /// What is known about each pair.
    pub fn answers(&self) -> impl Iterator<Item = (Pair, Answer)> {
        self.routes.iter().map(|(pair, route)| {
            (*pair, route.as_ref().and_then(|route| self.answer(route)).unwrap_or(Answer::Slow))
        })
    }

    fn answer(&self, route: &Resolved) -> Option<Answer> {
        let Resolved { interface, next, source, mtu } = *route;
        let link = self.links.get(&interface).filter(|_| self.uplinks.contains(&interface))?;
        let destination = self.neighbours.get(&(interface, next))?.mac;
        let mtu = mtu.map_or(link.mtu, |mtu| mtu.min(link.mtu));
        Some(Answer::Fast(Hop { interface, source: link.mac, destination, mtu }, source))
    }

    fn on_link(&mut self, message: &LinkMessage) -> Change {
        let index = message.header.index;
        if !self.uplinks.contains(&index) {
            return Change::Nothing;
        }
        let mut mac = None;
        let mut mtu = None;
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::Address(bytes) => mac = Mac::try_from(&bytes[..]).ok(),
                LinkAttribute::Mtu(bytes) => mtu = usize::try_from(*bytes).ok(),
                _ => {}
            }
        }
        let up = message.header.flags.contains(LinkFlags::Up | LinkFlags::LowerUp);
        match (mac, mtu) {
            (Some(mac), Some(mtu)) if up => {
                let link = Link { mac, mtu };
                changed(self.links.insert(index, link) != Some(link))
            }
            _ => changed(self.links.remove(&index).is_some()),
        }
    }

    fn on_neighbour(&mut self, message: &NeighbourMessage) -> Change {
        let Some(place) = place_of(message).filter(|(interface, _)| self.uplinks.contains(interface)) else {
            return Change::Nothing;
        };
        let mac = message.attributes.iter().find_map(|attribute| match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => Mac::try_from(&bytes[..]).ok(),
            _ => None,
        });
        let state = message.header.state;
        let usable = matches!(
            state,
            NeighbourState::Reachable
                | NeighbourState::Stale
                | NeighbourState::Delay
                | NeighbourState::Probe
                | NeighbourState::Permanent
                | NeighbourState::Noarp
        );
        match mac.filter(|_| usable) {
            Some(mac) => {
                let neighbour = Neighbour { mac, stale: state == NeighbourState::Stale };
                match self.neighbours.insert(place, neighbour) {
                    Some(old) if old.mac == mac && neighbour.stale => Change::Stale,
                    Some(old) if old.mac == mac => Change::Nothing,
                    _ => Change::Answers,
                }
            }
            None => changed(self.neighbours.remove(&place).is_some()),
        }
    }
}

fn changed(changed: bool) -> Change {
    if changed { Change::Answers } else { Change::Nothing }
}

fn place_of(message: &NeighbourMessage) -> Option<(u32, IpAddr)> {
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
        _ => None,
    });
    Some((message.header.ifindex, address?))
}

/// `None` for a route on which only the kernel can send.
fn resolve(pair: Pair, route: &RouteMessage) -> Option<Resolved> {
    if route.header.kind != RouteType::Unicast {
        return None;
    }
    let (mut interface, mut next, mut source, mut mtu) = (None, pair.dst, pair.src, None);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => interface = Some(*index),
            RouteAttribute::Gateway(address) => next = ip(address)?,
            RouteAttribute::Via(RouteVia::Inet(address)) => next = (*address).into(),
            RouteAttribute::Via(RouteVia::Inet6(address)) => next = (*address).into(),
            RouteAttribute::Via(_) => return None,
            RouteAttribute::PrefSource(address) => source = source.or(ip(address)),
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(bytes) => usize::try_from(*bytes).ok(),
                    _ => None,
                });
            }
            // Tunnels of the route's own.
            RouteAttribute::Encap(_) | RouteAttribute::EncapType(_) => return None,
            _ => {}
        }
    }
    Some(Resolved { interface: interface?, next, source: source?, mtu })
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
