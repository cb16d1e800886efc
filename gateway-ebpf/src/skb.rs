//! A packet that the stack already holds as [`Bytes`], so that the shared parsers read it.
//!
//! It may lie in pieces (GRO leaves most of it in pages), so it is read by a helper, which costs a call and finds it
//! wherever it lies. The parsers need one or two reads.

use core::{ffi::c_void, mem::MaybeUninit};

use aya_ebpf::{
    EbpfContext,
    helpers::bpf_skb_load_bytes,
    programs::{SkBuffContext, SkReuseportContext},
};
use gateway_common::bytes::Bytes;

/// What a program of this kind was given: `len` bytes, of which the helper reads any piece.
pub struct Skb {
    context: *mut c_void,
    len: usize,
}

impl Skb {
    /// From the UDP header on.
    #[inline(always)]
    pub fn of_datagram(ctx: &SkReuseportContext) -> Self {
        Self { context: ctx.as_ptr(), len: ctx.len() }
    }

    /// From the IP header on, if the device has no other in front of it.
    #[inline(always)]
    pub fn of_packet(ctx: &SkBuffContext) -> Self {
        Self { context: ctx.as_ptr(), len: ctx.len() as usize }
    }
}

impl Bytes for Skb {
    #[inline(always)]
    fn len(&self) -> usize {
        self.len
    }

    #[inline(always)]
    fn read<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        let mut bytes = MaybeUninit::<[u8; N]>::uninit();
        // SAFETY: the context is what the kernel called the program with, whose kind both constructors know to have this
        // helper, and the N bytes are ours to write. It fails if the packet is shorter, and says so.
        let result = unsafe {
            bpf_skb_load_bytes(self.context.cast_const(), at as u32, bytes.as_mut_ptr().cast(), N as u32)
        };
        if result != 0 {
            return None;
        }
        // SAFETY: on success the helper has written all N bytes.
        Some(unsafe { bytes.assume_init() })
    }
}
