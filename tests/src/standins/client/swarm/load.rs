//! Many packets a second through the members' tunnels, for little of a core.
//!
//! ```text
//! outbound   seal ahead of time --> Sealed --> bursts by UDP_SEGMENT, one member after the other
//! inbound    GRO batches, counted in the kernel's buffer; one in a thousand goes to `core` and is decrypted
//! ```
//!
//! What is sealed can be sent once: the gateway refuses a replay. So there is memory for all that will be sent.

use std::net::SocketAddrV4;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::Member;
use crate::standins::client::inner::udp_datagram;
use crate::standins::client::net::WIREGUARD_OVERHEAD;

/// Headers of IPv4 and UDP.
const INNER_HEADERS: usize = 28;
/// Packets that are sealed before others have their turn.
const SEAL_SHARE: usize = 64;
/// Between bursts the process sleeps at least this long: to wake for each one would cost more than the burst.
const PAUSE: Duration = Duration::from_micros(500);
/// Bursts behind schedule that are sent in one turn: a veth holds 256.
const CATCH_UP: u64 = 64;
/// Of so many GRO batches one is decrypted.
const SAMPLE: u64 = 1000;

/// Datagrams of one member, ready to be sent.
#[derive(Default)]
pub(super) struct Sealed {
    bytes: Vec<u8>,
    /// Of one datagram.
    segment: usize,
    /// Bytes that have been sent.
    used: usize,
}

/// See the file's head.
#[derive(Default)]
pub(super) struct Load {
    sealing: Option<Sealing>,
    sending: Option<Sending>,
    sent: u64,
    /// Length of a WireGuard message that is counted.
    counted: Option<usize>,
    skimmed: u64,
    batches: u64,
    sampled: u64,
}

struct Sealing {
    to: SocketAddrV4,
    payload: Vec<u8>,
    each: usize,
}

struct Sending {
    per_second: u64,
    burst: usize,
    started: Instant,
    until: Instant,
    bursts: u64,
    next_at: Instant,
}

impl Sealed {
    /// Datagrams that have not been sent.
    pub(super) fn left(&self) -> u64 {
        (self.bytes.len() - self.used).checked_div(self.segment).unwrap_or(0) as u64
    }
}

impl Load {
    // ---- orders -------------------------------------------------------------------------------

    /// See [`super::SwarmCommand::Seal`]; what is left of before is thrown away.
    pub(super) fn seal(&mut self, to: SocketAddrV4, bytes: usize, each: usize) {
        self.sending = None;
        self.sealing = Some(Sealing { to, payload: vec![0x5a; bytes], each });
    }

    /// See [`super::SwarmCommand::Send`].
    pub(super) fn send(&mut self, per_second: u64, burst: usize, time: Duration, now: Instant) {
        let until = now + time;
        self.sending =
            Some(Sending { per_second, burst: burst.max(1), started: now, until, bursts: 0, next_at: now });
    }

    /// See [`super::SwarmCommand::Count`].
    ///
    /// # Errors
    /// If a socket's buffer cannot be made large enough.
    pub(super) fn count(&mut self, members: &[Member], bytes: usize) -> Result<()> {
        self.counted = Some(bytes + INNER_HEADERS + WIREGUARD_OVERHEAD);
        members.iter().try_for_each(|member| member.client.widen())
    }

    // ---- getters ------------------------------------------------------------------------------

    pub(super) fn sent(&self) -> u64 {
        self.sent
    }

    pub(super) fn skimmed(&self) -> u64 {
        self.skimmed
    }

    pub(super) fn is_working(&self) -> bool {
        self.sealing.is_some() || self.sending.is_some()
    }

    /// When [`Self::advance`] has something to do.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        match (&self.sealing, &self.sending) {
            // At once.
            (Some(_), _) => Some(Instant::now()),
            (None, sending) => sending.as_ref().map(|sending| sending.next_at),
        }
    }

    // ---- work ---------------------------------------------------------------------------------

    /// Counts what came for a member. True if something else waits on its sockets, or for a sample.
    ///
    /// # Errors
    /// If a socket fails.
    pub(super) fn skim(&mut self, member: &Member) -> Result<bool> {
        let Some(length) = self.counted else { return Ok(true) };
        if self.batches >= (self.sampled + 1) * SAMPLE {
            self.sampled += 1;
            return Ok(true);
        }
        let skimmed = member.client.skim(length)?;
        self.skimmed += skimmed.datagrams;
        self.batches += skimmed.batches as u64;
        Ok(skimmed.batches == 0)
    }

    /// Seals, or sends what is due.
    ///
    /// # Errors
    /// If a member has no session, nothing sealed is left, or a socket refuses; then the order is over.
    pub(super) fn advance(&mut self, members: &mut [Member], now: Instant) -> Result<()> {
        if let Some(sealing) = &mut self.sealing {
            match sealing.advance(members) {
                Ok(true) => self.sealing = None,
                Ok(false) => {}
                Err(error) => {
                    self.sealing = None;
                    return Err(error);
                }
            }
        }
        let Some(sending) = &mut self.sending else { return Ok(()) };
        let done = sending.advance(members, now, &mut self.sent);
        if !matches!(done, Ok(false)) {
            self.sending = None;
        }
        done.map(drop)
    }
}

impl Sealing {
    /// True when all is sealed.
    fn advance(&self, members: &mut [Member]) -> Result<bool> {
        let segment = self.payload.len() + INNER_HEADERS + WIREGUARD_OVERHEAD;
        let mut done = true;
        for member in members {
            let from = SocketAddrV4::new(member.address.context("a member has no address")?, self.to.port());
            let packet = udp_datagram(from, self.to, &self.payload);
            let sealed = &mut member.sealed;
            if sealed.used > 0 || sealed.segment != segment {
                // The memory is kept: its pages are there already.
                sealed.bytes.clear();
                (sealed.used, sealed.segment) = (0, segment);
            }
            let left = self.each.saturating_sub(sealed.bytes.len() / segment);
            for _ in 0..left.min(SEAL_SHARE) {
                member.client.seal(&packet, &mut sealed.bytes)?;
            }
            done &= left <= SEAL_SHARE;
        }
        Ok(done)
    }
}

impl Sending {
    /// True when the time is over.
    fn advance(&mut self, members: &mut [Member], now: Instant, sent: &mut u64) -> Result<bool> {
        if now >= self.until {
            return Ok(true);
        }
        if now < self.next_at {
            return Ok(false);
        }
        let packets = (now - self.started).as_micros() * u128::from(self.per_second) / 1_000_000;
        let due = u64::try_from(packets / self.burst as u128)?;
        for _ in 0..due.saturating_sub(self.bursts).min(CATCH_UP) {
            let nth = usize::try_from(self.bursts)? % members.len();
            let member = members.get_mut(nth).context("there is no member")?;
            let Sealed { bytes, segment, used } = &mut member.sealed;
            let end = *used + self.burst * *segment;
            ensure!(*segment > 0 && end <= bytes.len(), "a member has nothing sealed to send any more");
            member.client.send_sealed(*segment, &bytes[*used..end])?;
            *used = end;
            self.bursts += 1;
            *sent += self.burst as u64;
        }
        self.next_at = now + PAUSE;
        Ok(false)
    }
}
