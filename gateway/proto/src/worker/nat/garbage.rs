//! Damaged packets: nothing panics, nothing grows, and what is not translated is unchanged.

#![expect(clippy::disallowed_methods, reason = "a test needs some instant to count from")]

use super::{
    packets::{Packet, error},
    *,
};
use crate::worker::inner::view;

#[test]
fn damaged_packets_panic_nowhere_and_keep_their_length() {
    let mut state = 3_u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).unwrap() % below
    };
    let now = Instant::now();
    let mut nat = Nat::new(9, Limits::default(), now);
    let (mut valid, mut translated) = (0, [0; 3]);
    for _ in 0..300_000 {
        let ips = [["100.64.2.2", "100.96.0.1", "10.0.0.1"], ["fd00::2", "fd00:8000::1", "2001:db8::1"]];
        let [client, proxy, real] = ips[random(2)].map(|ip| ip.parse::<IpAddr>().unwrap());
        let kind = Kind::ALL[random(3)];
        let what = random(3);
        let mut bytes = match what {
            0 => Packet::new(kind, (client, 7), (proxy, 7)).bytes(),
            1 => Packet { outbound: false, ..Packet::new(kind, (real, 7), (client, 7)) }.bytes(),
            _ => {
                let about = Packet::new(kind, (client, 7), (real, 7)).bytes();
                let head = [[3, 4, 0, 0, 9, 0], [2, 0, 0, 0, 9, 0]][usize::from(client.is_ipv6())];
                error(real, client, 9, head, &about[..random(about.len())])
            }
        };
        for _ in 0..random(4) {
            let at = random(bytes.len());
            bytes[at] = [0, 1, 0xff, u8::try_from(random(256)).unwrap()][random(4)];
        }
        if random(4) == 0 {
            bytes.truncate(bytes.len() - random(12));
            let len = u16::try_from(bytes.len()).unwrap();
            match bytes[0] >> 4 {
                4 => bytes[2..4].copy_from_slice(&len.to_be_bytes()),
                _ => bytes[4..6].copy_from_slice(&len.saturating_sub(40).to_be_bytes()),
            }
        }
        let Ok(seen) = view(&bytes) else { continue };
        valid += 1;
        // Any of the three may be asked about anything.
        for (method, hits) in translated.iter_mut().enumerate() {
            let (mut packet, mut after) = (bytes.clone(), seen);
            let hit = match method {
                0 => nat.outbound(&mut packet, &mut after, real, now).is_ok(),
                1 => matches!(nat.inbound(&mut packet, &mut after, now), Inbound::Rewritten(_)),
                _ => matches!(nat.inbound_error(&mut packet, &mut after, now), Inbound::Rewritten(_)),
            };
            *hits += u32::from(hit);
            assert_eq!(packet.len(), bytes.len());
            assert!(hit || packet == bytes, "{}", hex::encode(&bytes));
            assert_eq!(view(&packet), Ok(after), "{}", hex::encode(&bytes));
        }
    }
    assert!(valid > 100_000 && translated.iter().all(|n| *n > 10_000), "{valid} {translated:?}");
    assert!(nat.sessions() <= Limits::default().sessions);
}
