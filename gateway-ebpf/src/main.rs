//! The object that the daemon embeds: the programs of the kernel plane, one file each.
//!
//! It never decrypts and knows nothing that is not in `gateway-common`: the parsers, the maps and what is counted are
//! described there, and the same parsers run in user space.
#![no_std]
#![no_main]

mod maps;
#[cfg(feature = "uplink")]
mod packet;
mod skb;
mod steer_socket;
mod steer_tun;
#[cfg(feature = "uplink")]
mod uplink;

/// Which contract this object was built for; the loader compares it with its own. A map of its own, because that is
/// how a loader can read it.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".rodata.abi")]
static ABI_VERSION: u32 = gateway_common::ABI_VERSION;

/// The kernel lets no GPL-only helper be called under this licence; none is.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 11] = *b"Apache-2.0\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier refuses a program in which this can be reached.
    loop {}
}
