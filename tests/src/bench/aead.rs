//! A floor: what encrypting and decrypting a packet costs when nothing else is done.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use rustix::time::{ClockId, clock_gettime};

use super::{
    accounting::{self, GATEWAY_CORE},
    report::{Aead, Spread},
};

/// Bytes of the inner packet: the least that a flow sends, and a full one on Ethernet.
const SIZES: [usize; 2] = [64, 1420];
/// Packets in one sample; all of them fit into the cache that a batch has in the gateway.
const BATCH: usize = 64;
const SAMPLES: usize = 15;
/// Of one sample of one direction.
const SAMPLE_TIME: Duration = Duration::from_millis(20);

/// Measures on the gateway's core.
///
/// # Errors
/// If boringtun does not do what it does elsewhere.
pub(super) fn measure() -> Result<Vec<Aead>> {
    let work = || {
        accounting::pin(0, GATEWAY_CORE)?;
        SIZES.into_iter().map(of_size).collect()
    };
    std::thread::scope(|scope| scope.spawn(work).join().unwrap_or_else(|p| std::panic::resume_unwind(p)))
}

fn of_size(bytes: usize) -> Result<Aead> {
    let (mut sender, mut receiver) = session()?;
    let mut packet = vec![0; bytes];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&u16::try_from(bytes)?.to_be_bytes());
    let mut sealed = vec![vec![0; bytes + 148]; BATCH];
    let mut opened = vec![0; bytes + 148];
    let (mut seals, mut opens) = (Vec::new(), Vec::new());
    for _ in 0..SAMPLES {
        let (mut seal, mut open, mut count) = (Duration::ZERO, Duration::ZERO, 0_u32);
        while seal + open < 2 * SAMPLE_TIME {
            let started = cpu_time();
            for buffer in &mut sealed {
                let TunnResult::WriteToNetwork(_) = sender.encapsulate(&packet, buffer) else {
                    bail!("boringtun did not encrypt");
                };
            }
            let between = cpu_time();
            for buffer in &sealed {
                let datagram = &buffer[..bytes + 32];
                let TunnResult::WriteToTunnelV4(..) = receiver.decapsulate(None, datagram, &mut opened)
                else {
                    bail!("boringtun did not decrypt");
                };
            }
            seal += between.saturating_sub(started);
            open += cpu_time().saturating_sub(between);
            count += u32::try_from(BATCH)?;
        }
        seals.push(seal.as_nanos() as f64 / f64::from(count));
        opens.push(open.as_nanos() as f64 / f64::from(count));
    }
    Ok(Aead { bytes, seal_ns: Spread::of(seals), open_ns: Spread::of(opens) })
}

/// Of this thread: what others do on its core meanwhile does not count.
fn cpu_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

/// Two ends after their handshake.
fn session() -> Result<(Tunn, Tunn)> {
    let keys = [(); 2].map(|()| StaticSecret::from(rand::random::<[u8; 32]>()));
    let public = [0, 1].map(|end| PublicKey::from(&keys[end]));
    let [first, second] = keys;
    let mut sender = Tunn::new(first, public[1], None, None, 1, None);
    let mut receiver = Tunn::new(second, public[0], None, None, 2, None);
    let (mut a, mut b) = ([0; 256], [0; 256]);
    let datagram = |result: TunnResult<'_>| match result {
        TunnResult::WriteToNetwork(datagram) => Some(datagram.to_vec()),
        _ => None,
    };
    let initiation = datagram(sender.format_handshake_initiation(&mut a, false)).context("an initiation")?;
    let response = datagram(receiver.decapsulate(None, &initiation, &mut b)).context("a response")?;
    let confirmation = datagram(sender.decapsulate(None, &response, &mut a)).context("a confirmation")?;
    receiver.decapsulate(None, &confirmation, &mut b);
    Ok((sender, receiver))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_moves_packets() {
        let (mut sender, mut receiver) = session().unwrap();
        let mut packet = [0; 64];
        packet[0] = 0x45;
        packet[3] = 64;
        let (mut sealed, mut opened) = ([0; 256], [0; 256]);
        let TunnResult::WriteToNetwork(datagram) = sender.encapsulate(&packet, &mut sealed) else { panic!() };
        let TunnResult::WriteToTunnelV4(came, _) = receiver.decapsulate(None, datagram, &mut opened) else {
            panic!()
        };
        assert_eq!(came, packet);
    }
}
