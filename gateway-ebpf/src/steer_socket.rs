//! `steer_socket`: of the workers' sockets on one port, the one of the worker whose client a datagram comes from.
//!
//! Attached to a SO_REUSEPORT group, one for each family. A datagram that names no connection (STUN, an initiation), or
//! one that no map knows, goes where the kernel's hash of addresses and ports says, as without this program.

use aya_ebpf::{bindings::sk_action::SK_PASS, macros::sk_reuseport, programs::SkReuseportContext};
use gateway_common::{maps::socket_key, steer};

use crate::maps::{SESSIONS, SOCKETS};
use crate::skb::Skb;

const UDP_HEADER: usize = 8;
/// ETH_P_IPV6, as it lies in the context.
const IPV6: u32 = 0x86dd_u16.to_be() as u32;

/// Selects a socket or none; the verdict is always `SK_PASS`, which without a selected socket means the hash.
#[sk_reuseport]
pub fn steer_socket(ctx: SkReuseportContext) -> u32 {
    if let Some(key) = steer::session_of(&Skb::of_datagram(&ctx), UDP_HEADER)
        // SAFETY: the value is read at once, before the program ends and with it the kernel's grace period.
        && let Some(owner) = unsafe { SESSIONS.get(key) }
    {
        let socket = socket_key(owner.worker, ctx.eth_protocol() == IPV6);
        // A worker without a socket in this group: the hash decides.
        let _hash = SOCKETS.select_reuseport(&ctx, socket);
    }
    SK_PASS
}
