//! XDP `uplink`: counts what each frame on the uplink is, and does with it what `gateway_common::decide` says.

use aya_ebpf::{
    bindings::xdp_action::{XDP_DROP, XDP_PASS},
    helpers::bpf_ktime_get_ns,
    macros::xdp,
    programs::XdpContext,
};
use gateway_common::{
    DropReason, FrameCount, FrameKind, Verdict,
    budget::{ANYONE, Budget, PEER},
    bytes::Bytes,
    decide,
    decide::{Look, Purse},
    frame_kind,
    maps::{ChannelKey, Endpoint, Outcome, Owner, RelayId, SessionKey, UfragKey, xsk_slot},
};

use crate::maps::{
    CHANNELS, CONFIG, COUNTERS, DROPS, HANDSHAKES, LOCAL, PEERS, RELAYS, SESSIONS, UFRAGS, VERDICTS, XSKS,
};
use crate::packet::Packet;

/// Counts the frame by its kind and by its verdict, and carries the verdict out.
#[xdp]
pub fn uplink(ctx: XdpContext) -> u32 {
    let packet = Packet::of(&ctx);
    let bytes = packet.len();
    let kind = frame_kind(&packet);
    count_kind(kind, bytes);
    #[cfg(feature = "log")]
    aya_log_ebpf::debug!(&ctx, "{}: {} bytes", kind.label(), bytes);
    match decide(&packet, &Maps) {
        Verdict::Pass => {
            count_outcome(Outcome::Passed, bytes);
            XDP_PASS
        }
        Verdict::Drop(reason) => {
            count_drop(reason, bytes);
            count_outcome(Outcome::Dropped, bytes);
            XDP_DROP
        }
        Verdict::Redirect { worker, .. } => {
            // SAFETY: the context is the kernel's, valid while the program runs.
            let queue = unsafe { (*ctx.ctx).rx_queue_index };
            // The lower bits of the flags are what becomes of the frame if the slot is empty.
            match XSKS.redirect(xsk_slot(queue, worker), u64::from(XDP_PASS)) {
                Ok(redirect) => {
                    count_outcome(Outcome::Redirected, bytes);
                    redirect
                }
                Err(_) => {
                    count_outcome(Outcome::NoSocket, bytes);
                    XDP_PASS
                }
            }
        }
    }
}

/// The kernel's maps. What a look-up returns is read at once, before the program ends and with it the kernel's grace
/// period: this is what every SAFETY below means.
struct Maps;

impl Look for Maps {
    #[inline(always)]
    fn enabled(&self) -> bool {
        // SAFETY: read volatile, because user space writes it while the program runs.
        CONFIG.get_ptr(0).is_some_and(|config| unsafe { (&raw const (*config).enabled).read_volatile() } == 1)
    }

    #[inline(always)]
    fn local(&self, to: &Endpoint) -> bool {
        // SAFETY: only whether it is there matters.
        unsafe { LOCAL.get(to) }.is_some()
    }

    #[inline(always)]
    fn relay(&self, from: &Endpoint) -> Option<RelayId> {
        // SAFETY: read at once.
        unsafe { RELAYS.get(from) }.copied()
    }

    #[inline(always)]
    fn channel(&self, key: &ChannelKey) -> bool {
        // SAFETY: only whether it is there matters.
        unsafe { CHANNELS.get(key) }.is_some()
    }

    #[inline(always)]
    fn session(&self, key: &SessionKey) -> Option<Owner> {
        // SAFETY: read at once.
        unsafe { SESSIONS.get(key) }.copied()
    }

    #[inline(always)]
    fn ufrag(&self, ufrag: [u8; 4]) -> bool {
        // SAFETY: only whether it is there matters.
        unsafe { UFRAGS.get(UfragKey { ufrag }) }.is_some()
    }

    #[inline(always)]
    fn spend(&self, purse: &Purse) -> Option<bool> {
        let (budget, rate) = match purse {
            Purse::Peer(from) => (PEERS.get_ptr_mut(from)?, PEER),
            Purse::Channel(key) => (CHANNELS.get_ptr_mut(key)?, PEER),
            Purse::Anyone => (HANDSHAKES.get_ptr_mut(0)?, ANYONE),
        };
        // SAFETY: an aligned word that lives until the program ends. Racy, harmless because two CPUs that spend at the
        // same moment let one packet too many through each time; no reference is made of it.
        unsafe {
            let full_at = (&raw mut (*budget).full_at).read_volatile();
            let mut copy = Budget { full_at };
            let within = copy.spend(rate, bpf_ktime_get_ns());
            if within {
                (&raw mut (*budget).full_at).write_volatile(copy.full_at);
            }
            Some(within)
        }
    }
}

#[inline(always)]
fn count_kind(kind: FrameKind, bytes: usize) {
    count(COUNTERS.get_ptr_mut(kind as u32), bytes);
}

#[inline(always)]
fn count_outcome(outcome: Outcome, bytes: usize) {
    count(VERDICTS.get_ptr_mut(outcome as u32), bytes);
}

#[inline(always)]
fn count_drop(reason: DropReason, bytes: usize) {
    count(DROPS.get_ptr_mut(reason as u32), bytes);
}

#[inline(always)]
fn count(slot: Option<*mut FrameCount>, bytes: usize) {
    let Some(slot) = slot else { return };
    // SAFETY: the slot belongs to this CPU, XDP programs do not interrupt each other on one CPU, and user space only
    // reads it. It reads the two fields at different moments, harmless because they are statistics.
    let slot = unsafe { &mut *slot };
    slot.packets += 1;
    slot.bytes += bytes as u64;
}
