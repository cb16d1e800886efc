//! What clients share on a relay, and how a relay that forgot us is found out.

use super::*;
use crate::relay::twin::Packet;

/// The STUN type of CHANNEL_BIND.
const BIND: u16 = 0x0009;

#[test]
fn a_channel_of_two_clients_lives_until_the_second_leaves() {
    for leave in [0_u128, 1, 2] {
        let mut world = settled();
        let began = world.now;
        // Two clients behind one router: one relayed address signalled by both.
        let line = "candidate:1 1 udp 37748479 203.0.113.9 5000 typ relay raddr 0.0.0.0 rport 0 ufrag o7vl";
        let clients: Vec<ClientId> = [51, 52].map(|n| ClientId(Uuid::from_u128(n))).into();
        for (n, client) in clients.iter().enumerate() {
            let mut authorize = world.client.authorize(1, None);
            authorize.client.id = *client;
            authorize.gateway_ice.username = format!("g{n}");
            world.ingress(Ingress::Authorize(Box::new(authorize)));
            world.ingress(Ingress::IceCandidates(*client, vec![line.to_owned()]));
        }
        assert_eq!(world.gateway.shared.held_channels(), 1);
        world.run(began + 239 * SECOND - world.now);
        for client in &clients[..usize::try_from(leave).unwrap()] {
            world.ingress(Ingress::RejectAccess(*client, ResourceId(Uuid::from_u128(1))));
        }
        assert_eq!(world.gateway.shared.held_channels(), usize::from(leave < 2));
        // The success came 10 ms after the bind, and the next check, which would ask again, is due at 240.75 s.
        let due = began + 240 * SECOND + Duration::from_millis(10);
        world.run(due - world.now);
        let refreshed = world.sent.iter().any(|(at, packet)| *at == due && kind(packet) == BIND);
        assert_eq!(refreshed, leave < 2, "{leave} of two left");
    }
}

fn kind(packet: &Packet) -> u16 {
    u16::from_be_bytes([packet.payload[0], packet.payload[1]])
}
