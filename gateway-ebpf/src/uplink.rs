//! XDP `uplink`: says what each frame on the uplink is, counts it, and hands it to the kernel.

use aya_ebpf::{bindings::xdp_action::XDP_PASS, macros::xdp, programs::XdpContext};
use gateway_common::{FrameKind, bytes::Bytes, frame_kind};

use crate::maps::COUNTERS;
use crate::packet::Packet;

/// Counts the frame by its kind; the verdict is always `XDP_PASS`.
#[xdp]
pub fn uplink(ctx: XdpContext) -> u32 {
    let packet = Packet::of(&ctx);
    let kind = frame_kind(&packet);
    count(kind, packet.len());
    #[cfg(feature = "log")]
    aya_log_ebpf::debug!(&ctx, "{}: {} bytes", kind.label(), packet.len());
    XDP_PASS
}

#[inline(always)]
fn count(kind: FrameKind, bytes: usize) {
    let Some(slot) = COUNTERS.get_ptr_mut(kind as u32) else { return };
    // SAFETY: the slot belongs to this CPU, XDP programs do not interrupt each other on one CPU, and user space only
    // reads it. It reads the two fields at different moments, harmless because they are statistics.
    let slot = unsafe { &mut *slot };
    slot.packets += 1;
    slot.bytes += bytes as u64;
}
