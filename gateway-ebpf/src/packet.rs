//! The frame between `data` and `data_end` as [`Bytes`], so that the shared parsers read it.

use aya_ebpf::programs::XdpContext;
use gateway_common::bytes::Bytes;

/// A frame that XDP is looking at. Only its linear part: what lies in further buffers is not seen.
pub struct Packet {
    start: usize,
    end: usize,
}

impl Packet {
    #[inline(always)]
    pub fn of(ctx: &XdpContext) -> Self {
        Self { start: ctx.data(), end: ctx.data_end() }
    }
}

impl Bytes for Packet {
    #[inline(always)]
    fn len(&self) -> usize {
        self.end - self.start
    }

    #[inline(always)]
    fn read<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        let from = self.start + at;
        if from + N > self.end {
            return None;
        }
        // SAFETY: the N bytes from `from` on are within the frame, which the line above shows to the verifier too.
        // The kernel keeps the frame in place while the program runs and nothing here writes to it.
        Some(unsafe { (from as *const [u8; N]).read_unaligned() })
    }
}
