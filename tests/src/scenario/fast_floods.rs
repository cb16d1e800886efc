//! Floods that the kernel's program ends, before they cost the daemon anything: the assertions are those of [`floods`],
//! and that 19 of 20 datagrams died in XDP.
//!
//! [`floods`]: super::floods

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context as _, Result};
use rand::{RngCore as _, SeedableRng as _, rngs::SmallRng};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::{
    Context,
    fast_path::{self, Proof},
    floods::{Shoot, flood, from_sockets, gateway_key, initiation, sockets, stranger},
    script::Head,
    trouble::{PORT, raw_udp, send_raw_udp},
};

/// Of each kind.
const DATAGRAMS: usize = 128;

/// A stranger with addresses of its own: what is no protocol of ours, receivers that nobody has, initiations with a wrong and
/// with a right MAC1.
pub(super) fn from_a_stranger(cx: &mut Context) -> Result<()> {
    fast_path::native(cx)?;
    flood(cx, &|cx, lab| {
        let gateway = gateway_key(lab)?;
        let mut random = SmallRng::seed_from_u64(0xf100d);
        let mut datagrams = Vec::new();
        for nth in 0..DATAGRAMS {
            let mut junk = vec![0; 1 + nth * 10];
            random.fill_bytes(&mut junk);
            // Neither STUN (0 to 3), ChannelData (64 to 79) nor WireGuard (1 to 4).
            junk[0] |= 0x80;
            let mut data = vec![0; 48 + nth * 10 / 16 * 16];
            random.fill_bytes(&mut data);
            data[..4].copy_from_slice(&[4, 0, 0, 0]);
            // Far from the indices that a gateway gives out in this little time.
            data[7] |= 0x80;
            let right = initiation(&mut stranger(gateway))?;
            let mut wrong = initiation(&mut stranger(gateway))?;
            // MAC1 is in bytes 116 to 132.
            wrong[120] ^= 1;
            datagrams.extend([junk, data, right, wrong]);
        }
        let sources = sockets(cx)?;
        let all = vec![datagrams; sources.len()];
        from_sockets(sources, all)
    })
}

/// Initiations with a right MAC1: each from another address that does not exist, and every other one in the name of the relay,
/// on the very channel that a client is served on.
pub(super) fn from_everywhere_and_through_the_relay(cx: &mut Context) -> Result<()> {
    fast_path::native(cx)?;
    flood(cx, &|cx, lab| {
        let gateway = gateway_key(lab)?;
        let initiations =
            (0..DATAGRAMS).map(|_| initiation(&mut stranger(gateway))).collect::<Result<Vec<_>>>()?;
        let channels = Proof::of(&cx.topology).channels()?;
        let channel = *channels.first().context("the gateway's program knows no channel")?;
        let to = SocketAddr::new(cx.topology.gateway.v4.into(), PORT);
        let relay = raw_udp(&cx.topology.relays[0].namespace)?;
        let anywhere = cx.topology.portal.namespace.run(|| {
            // The header comes with each packet.
            Ok(Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?)
        })?;
        Ok(spoofed(initiations, channel, to, relay, anywhere))
    })
}

fn spoofed(
    initiations: Vec<Vec<u8>>,
    channel: u16,
    to: SocketAddr,
    relay: Socket,
    anywhere: Socket,
) -> Shoot {
    Box::new(move |number| {
        let initiation = &initiations[number / 2 % initiations.len()];
        if number % 2 == 0 {
            let length = u16::try_from(initiation.len()).unwrap_or(0);
            let framed = [&channel.to_be_bytes()[..], &length.to_be_bytes(), initiation].concat();
            let _lost = send_raw_udp(&relay, 3478, to, &framed);
        } else {
            // 64 Ki addresses of a network that is nobody's here.
            let [.., high, low] = u32::try_from(number / 2 % 0x1_0000).unwrap_or(0).to_be_bytes();
            let from = IpAddr::V4(Ipv4Addr::new(198, 19, high, low));
            let packet = Head::new(from, to.ip(), 0).udp(40_000, to.port(), initiation);
            let _lost = anywhere.send_to(&packet, &SockAddr::from(to));
        }
    })
}
