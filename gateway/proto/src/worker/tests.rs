//! The worker as a whole: every verdict of packets.md section 12 that exists, sessions, budgets, bad input.

mod answers;
mod changes;
mod fleet;
mod floods;
mod flows;
mod garbage;
mod handovers;
mod inquiries;
mod model;
mod moves;
mod names;
mod network;
mod reference;
mod sessions;
#[cfg(feature = "mock-instant")]
mod timers;
mod verdicts;

use std::{net::SocketAddr, sync::Arc};

use gateway_common::DropReason;

use super::{control_packet::GOODBYE, testkit::*};
use crate::{
    Command, Ecn, WorkerEvent,
    command::{ChannelUse, ClientState, Connection, Path},
    portal::messages::{Filter, Resource, ResourceKind},
};

const C4: &str = "100.64.2.1";
const C6: &str = "fd00:2021:1111::2:1";
const LAN4: &str = "10.44.0.9";
const LAN6: &str = "fd00:db8:20::9";

fn lan() -> Vec<Resource> {
    vec![cidr(1, "10.44.0.0/24", &[]), cidr(2, "fd00:db8:20::/64", &[])]
}
