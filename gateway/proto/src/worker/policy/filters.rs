//! The filter list of one resource (packets.md section 4.2), compiled. Knows classes; no address, no other resource.

use super::Class;
use crate::portal::messages::Filter;

/// The filter engine (section 4.2).
pub struct Filters {
    everything: bool,
    icmp: bool,
    /// Sorted, disjoint.
    tcp: Box<[(u16, u16)]>,
    udp: Box<[(u16, u16)]>,
}

impl Filters {
    /// Compiles a resource's list.
    pub fn new(filters: &[Filter]) -> Self {
        let (mut tcp, mut udp, mut icmp) = (Vec::new(), Vec::new(), false);
        for filter in filters {
            match *filter {
                Filter::Tcp { first, last } => tcp.push((first, last)),
                Filter::Udp { first, last } => udp.push((first, last)),
                Filter::Icmp => icmp = true,
            }
        }
        // "Empty list = permit everything" is about the list: one whose ranges never match permits nothing.
        Self { everything: filters.is_empty(), icmp, tcp: union(tcp), udp: union(udp) }
    }

    /// Does some filter let the class pass?
    #[inline]
    pub fn permit(&self, class: Class) -> bool {
        self.everything
            || match class {
                Class::Tcp(port) => within(&self.tcp, port),
                Class::Udp(port) => within(&self.udp, port),
                Class::Icmp => self.icmp,
                Class::Other => false,
            }
    }
}

/// "Overlapping ranges simply union"; one with first > last never matches.
fn union(mut ranges: Vec<(u16, u16)>) -> Box<[(u16, u16)]> {
    ranges.retain(|(first, last)| first <= last);
    ranges.sort_unstable();
    let mut merged: Vec<(u16, u16)> = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        match merged.last_mut() {
            Some(previous) if u32::from(first) <= u32::from(previous.1) + 1 => {
                previous.1 = previous.1.max(last)
            }
            _ => merged.push((first, last)),
        }
    }
    merged.into()
}

#[inline]
fn within(ranges: &[(u16, u16)], port: u16) -> bool {
    let after = ranges.partition_point(|(first, _)| *first <= port);
    after > 0 && port <= ranges[after - 1].1
}
