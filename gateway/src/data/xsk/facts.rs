//! What an interface is like, from rtnetlink and ethtool.

use std::{io, os::fd::AsRawFd as _};

use anyhow::{Context as _, Result};
use futures_util::TryStreamExt as _;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use rtnetlink::{
    Handle,
    packet_route::link::{LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage, LinkXdp},
};

use super::probe::Facts;

/// The facts about the interface `index`, in the namespace of `handle` and of the calling thread.
///
/// # Errors
/// There is no such interface.
pub async fn facts(handle: &Handle, index: u32) -> Result<Facts> {
    let links: Vec<_> = handle.link().get().execute().try_collect().await.context("Failed to list links")?;
    let link = links.iter().find(|link| link.header.index == index).context("The interface is gone")?;
    let mut facts = of(link);
    facts.has_vlans = links.iter().any(|other| is_vlan_on(other, index));
    // Drivers that know neither are asked in vain.
    if let Ok(Some(queues)) = channels(&facts.name) {
        facts.queues = queues;
    }
    facts.strips_vlan = strips_vlan(&facts.name).ok();
    facts.merges = merges(&facts.name).unwrap_or(true);
    Ok(facts)
}

/// What the link itself says.
fn of(link: &LinkMessage) -> Facts {
    let mut facts = Facts {
        name: String::new(),
        index: link.header.index,
        ethernet: link.header.link_layer_type == LinkLayerType::Ether,
        up: link.header.flags.contains(LinkFlags::Up | LinkFlags::LowerUp),
        kind: kind_of(link),
        enslaved: false,
        mtu: 0,
        queues: 0,
        program: None,
        has_vlans: false,
        strips_vlan: None,
        merges: true,
    };
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => facts.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => facts.mtu = usize::try_from(*mtu).unwrap_or(usize::MAX),
            LinkAttribute::NumRxQueues(queues) => facts.queues = *queues,
            LinkAttribute::Controller(_) => facts.enslaved = true,
            LinkAttribute::Xdp(attributes) => {
                facts.program = attributes.iter().find_map(|attribute| match attribute {
                    LinkXdp::ProgId(id)
                    | LinkXdp::DrvProgId(id)
                    | LinkXdp::SkbProgId(id)
                    | LinkXdp::HwProgId(id) => Some(*id),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    facts
}

fn is_vlan_on(link: &LinkMessage, lower: u32) -> bool {
    let is_on =
        |attribute: &LinkAttribute| matches!(attribute, LinkAttribute::Link(index) if *index == lower);
    kind_of(link).as_deref() == Some("vlan") && link.attributes.iter().any(is_on)
}

fn kind_of(link: &LinkMessage) -> Option<String> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.iter().find_map(|info| match info {
            LinkInfo::Kind(kind) => Some(kind.to_string()),
            _ => None,
        }),
        _ => None,
    })
}

/// ETHTOOL_GCHANNELS: receive queues in use, combined ones among them; `None` if there are none of a kind.
fn channels(name: &str) -> io::Result<Option<u32>> {
    const GET_CHANNELS: u32 = 0x3c;
    // cmd, max_rx, max_tx, max_other, max_combined, rx, tx, other, combined (linux/ethtool.h)
    let mut words = [GET_CHANNELS, 0, 0, 0, 0, 0, 0, 0, 0];
    ethtool(name, &mut words)?;
    let [.., rx, _, _, combined] = words;
    Ok(rx.checked_add(combined).filter(|queues| *queues > 0))
}

/// ETHTOOL_GFLAGS: whether the device takes VLAN tags off.
fn strips_vlan(name: &str) -> io::Result<bool> {
    const GET_FLAGS: u32 = 0x25;
    const RX_VLAN: u32 = 1 << 8;
    let mut words = [GET_FLAGS, 0];
    ethtool(name, &mut words)?;
    Ok(words[1] & RX_VLAN != 0)
}

/// ETHTOOL_GGRO: whether the stack merges.
fn merges(name: &str) -> io::Result<bool> {
    const GET_GRO: u32 = 0x2b;
    let mut words = [GET_GRO, 0];
    ethtool(name, &mut words)?;
    Ok(words[1] != 0)
}

/// SIOCETHTOOL with a structure of 32-bit words, of which the first is the command.
fn ethtool<const N: usize>(name: &str, words: &mut [u32; N]) -> io::Result<()> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
        .or_else(|_| socket(AddressFamily::Inet6, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None))?;
    // The name and its terminating zero must fit.
    let mut ifr_name = [0; libc::IFNAMSIZ];
    if name.len() >= ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in ifr_name.iter_mut().zip(name.bytes()) {
        // i8 or u8, by the processor.
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let ifr_ifru = libc::__c_anonymous_ifr_ifru { ifru_data: words.as_mut_ptr().cast() };
    let mut request = libc::ifreq { ifr_name, ifr_ifru };
    // SAFETY: the descriptor is open and the request lives for the call. For the commands above the kernel reads
    // and writes N words at the address in it, which are lent to us for writing.
    #[expect(unsafe_code, reason = "an ioctl that takes an address")]
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL as _, &raw mut request) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_route::link::InfoKind;

    use super::*;

    fn link(index: u32, attributes: Vec<LinkAttribute>) -> LinkMessage {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.header.link_layer_type = LinkLayerType::Ether;
        link.attributes = attributes;
        link
    }

    fn kind(kind: InfoKind) -> LinkAttribute {
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)])
    }

    #[test]
    fn a_link_says_what_it_is() {
        let attributes = vec![
            LinkAttribute::IfName("eth0".to_owned()),
            LinkAttribute::Mtu(1500),
            LinkAttribute::NumRxQueues(8),
            LinkAttribute::Xdp(vec![LinkXdp::Flags(0), LinkXdp::ProgId(12)]),
        ];
        let mut link = link(2, attributes);
        link.header.flags = LinkFlags::Up | LinkFlags::LowerUp | LinkFlags::Multicast;
        let nic = of(&link);
        assert_eq!(
            (nic.name.as_str(), nic.index, nic.mtu, nic.queues, nic.program),
            ("eth0", 2, 1500, 8, Some(12))
        );
        assert!(nic.ethernet && nic.up && nic.kind.is_none() && !nic.enslaved);
        link.header.flags = LinkFlags::Up;
        link.attributes.extend([LinkAttribute::Controller(7), kind(InfoKind::Bond)]);
        let bond = of(&link);
        assert!(!bond.up && bond.enslaved);
        assert_eq!(bond.kind.as_deref(), Some("bond"));
    }

    #[test]
    fn only_a_vlan_on_the_device_itself_counts() {
        let table = [
            (vec![kind(InfoKind::Vlan), LinkAttribute::Link(2)], true),
            (vec![kind(InfoKind::Vlan), LinkAttribute::Link(3)], false),
            (vec![kind(InfoKind::MacVlan), LinkAttribute::Link(2)], false),
            (vec![LinkAttribute::Link(2)], false),
            (vec![], false),
        ];
        for (attributes, expect) in table {
            assert_eq!(is_vlan_on(&link(9, attributes.clone()), 2), expect, "{attributes:?}");
        }
    }

    #[test]
    fn a_name_that_no_interface_can_have_is_refused() {
        assert!(channels("a-name-of-16-byt").is_err() && channels("").is_err());
    }
}
