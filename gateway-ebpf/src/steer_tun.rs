//! `steer_tun`: of the TUN's queues, the one of the worker whose client a packet goes to.
//!
//! A socket filter that is given to the device by TUNSETSTEERINGEBPF; what it returns is the number of a queue. Without
//! it the kernel learns queues from the flows it has seen, which is right for active ones and wrong after a few
//! seconds of silence.

use aya_ebpf::{macros::socket_filter, programs::SkBuffContext};
use gateway_common::steer;

use crate::maps::TUNNELS;
use crate::skb::Skb;

/// Where packets go that are nobody's; that worker counts them.
const NOBODYS: i64 = 0;

/// The number of a queue, which is that of its worker. The kernel takes it modulo the number of queues.
#[socket_filter]
pub fn steer_tun(ctx: SkBuffContext) -> i64 {
    let Some(key) = steer::tunnel_of(&Skb::of_packet(&ctx)) else { return NOBODYS };
    // SAFETY: the value is read at once, before the program ends and with it the kernel's grace period.
    match unsafe { TUNNELS.get(key) } {
        Some(owner) => i64::from(owner.worker),
        None => NOBODYS,
    }
}
