//! One table of frames, and random ones, through `decide` in user space and through the compiled program.
//!
//! Frames under 14 bytes are decided in user space only: the kernel's test run does not take them.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    os::fd::AsFd as _,
};

use aya::programs::{TestRun as _, TestRunOptions};
use gateway_common::{
    Counters, DropReason, Verdict,
    budget::Budget,
    decide,
    decide::Purse,
    decide_table::{self, At, World},
    maps::{self, ChannelKey, Endpoint, Outcome},
};
use gateway_proto::{ConnectionIndex, WorkerId};

use super::{uplink as tables, whole};
use crate::bpf::{Kernel, uplink};

const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;
const XDP_REDIRECT: u32 = 4;
/// The shortest frame that a test run takes.
const ETHERNET: usize = 14;

/// What the verifier may look at before CI complains. It looks at every path, so this grows faster than the program; the
/// kernel's own limit is a million.
const INSTRUCTION_BUDGET: u32 = 15_000;

#[test]
#[ignore = "needs root and the BPF object; `cargo xtask test` runs it"]
fn bpf_uplink_costs_the_verifier_no_more_than_its_budget() {
    let uplink = &mut whole();
    let info = uplink::program(&mut uplink.plane.ebpf).unwrap().info().unwrap();
    let verified = info.verified_instruction_count().expect("a kernel since 5.16 says it");
    println!(
        "uplink: {verified} instructions verified, {} bytes translated",
        info.size_translated().unwrap()
    );
    assert!(verified <= INSTRUCTION_BUDGET, "{verified} instructions are more than {INSTRUCTION_BUDGET}");
}

#[test]
#[ignore = "needs root and the BPF object; `cargo xtask test` runs it"]
fn bpf_decides_about_every_row_as_user_space_does() {
    for bound in [false, true] {
        let uplink = &mut whole();
        fill(uplink, &World::example());
        let _sockets = bound.then(|| bind(uplink));
        let mut expect: BTreeMap<Outcome, u64> = BTreeMap::new();
        let mut reasons = Counters::default();
        for row in decide_table::all().into_iter().filter(|row| row.bytes.len() >= ETHERNET) {
            assert_eq!(run(uplink, &row.bytes), action(row.verdict, bound), "{}, {bound}", row.name);
            *expect.entry(outcome(row.verdict, bound)).or_default() += 1;
            if let Verdict::Drop(reason) = row.verdict {
                reasons.count(reason);
            }
        }
        let outcomes: BTreeMap<_, _> = uplink.plane.outcomes().unwrap().into_iter().collect();
        for outcome in Outcome::ALL {
            let counted = expect.get(outcome).copied().unwrap_or_default();
            assert_eq!(outcomes[outcome].packets, counted, "{}", outcome.label());
        }
        assert_eq!(dropped(uplink), reasons);
    }
}

#[test]
#[ignore = "needs root and the BPF object; `cargo xtask test` runs it"]
fn bpf_uplink_passes_everything_while_it_is_switched_off() {
    let uplink = &mut whole();
    fill(uplink, &World::example());
    let _sockets = bind(uplink);
    let rows: Vec<_> = decide_table::all().into_iter().filter(|row| row.bytes.len() >= ETHERNET).collect();
    uplink.enable(false).unwrap();
    for row in &rows {
        assert_eq!(run(uplink, &row.bytes), XDP_PASS, "{}", row.name);
    }
    uplink.enable(true).unwrap();
    for row in &rows {
        assert_eq!(run(uplink, &row.bytes), action(row.verdict, true), "{}", row.name);
    }
}

#[test]
#[ignore = "needs root and the BPF object; `cargo xtask test` runs it"]
fn bpf_strangers_share_one_budget_and_a_peer_keeps_its_own() {
    let uplink = &mut whole();
    fill(uplink, &World::example());
    let row = |name: &str| decide_table::all().into_iter().find(|row| row.name == name).expect(name).bytes;
    let (stranger, peer) = (row("an initiation of a stranger, IPv4"), row("an initiation of a peer, IPv4"));
    let mut passed = |frame: &[u8], sent| (0..sent).filter(|_| run(uplink, frame) == XDP_PASS).count();
    // The clock runs on: more pass than the burst, and a slow machine lets more pass than a fast one.
    let strangers = passed(&stranger, 2000);
    assert!((100..1500).contains(&strangers), "{strangers} of 2000 strangers passed");
    let own = passed(&peer, 200);
    assert!((10..150).contains(&own), "{own} of 200 of one peer passed");
}

#[test]
#[ignore = "needs root and the BPF object; `cargo xtask test` runs it"]
fn bpf_decides_about_random_frames_as_user_space_does() {
    let frames = std::env::var("GATEWAY_FRAMES").ok().map_or(100_000, |n| n.parse().expect("GATEWAY_FRAMES"));
    // What is cut short is made below.
    let samples: Vec<_> = decide_table::all()
        .into_iter()
        .filter(|row| !row.name.contains(" cut to ") && row.bytes.len() >= ETHERNET)
        .map(|row| row.bytes)
        .collect();
    let fresh = World::example();
    let uplink = &mut whole();
    fill(uplink, &fresh);
    let _sockets = bind(uplink);
    let mut random = Random(0x6a09_e667_f3bc_c908);
    let mut seen: BTreeMap<u32, u64> = BTreeMap::new();
    let mut reasons = Counters::default();
    for number in 0..frames {
        let mut frame = samples[random.below(samples.len())].clone();
        for _ in 0..random.below(4) {
            mutate(&mut frame, &mut random);
        }
        let world = World::example();
        let verdict = decide(&*frame, &world);
        let found = run(uplink, &frame);
        assert_eq!(found, action(verdict, true), "frame {number}, {verdict:?}: {frame:02x?}");
        *seen.entry(found).or_default() += 1;
        if let Verdict::Drop(reason) = verdict {
            reasons.count(reason);
        }
        // What this frame has taken out of a budget is put back, or the clock would decide about the next one.
        let spent =
            world.peers != fresh.peers || world.channels != fresh.channels || world.anyone != fresh.anyone;
        if spent {
            set_budgets(uplink, &fresh);
        }
    }
    assert_eq!(dropped(uplink), reasons);
    assert_eq!(seen.len(), 3, "drop, pass and redirect must all be among them: {seen:?}");
    println!("{frames} random frames: {seen:?}, {reasons:?}");
}

#[test]
#[ignore = "needs root and the BPF object; `cargo xtask test` runs it"]
fn bpf_a_relay_takes_its_channels_along_and_a_repeated_entry_keeps_its_budget() {
    let uplink = &mut whole();
    let world = World::example();
    fill(uplink, &world);
    let row = |name: &str| decide_table::all().into_iter().find(|row| row.name == name).expect(name).bytes;
    let (relayed, busy) = (row("relayed data, IPv4"), row("an initiation too many of a peer"));
    let relay = world.relays.keys().map(address).find(SocketAddr::is_ipv4).unwrap();

    // Told again, as after every change of anything: what is spent stays spent.
    world.peers.borrow().keys().for_each(|at| tables(uplink).set_peer(address(at), true));
    assert_eq!(run(uplink, &busy), XDP_DROP);
    world.peers.borrow().keys().for_each(|at| tables(uplink).set_peer(address(at), false));
    assert_eq!(run(uplink, &busy), XDP_PASS, "now within the strangers' budget");

    assert_eq!(run(uplink, &relayed), XDP_PASS, "an empty slot");
    tables(uplink).set_relay(relay, false);
    assert_eq!(run(uplink, &relayed), XDP_DROP, "no relay");
    tables(uplink).set_relay(relay, true);
    assert_eq!(run(uplink, &relayed), XDP_DROP, "no channel");
    tables(uplink).set_channel(relay, 0x4001, true);
    assert_eq!(run(uplink, &relayed), XDP_PASS, "an empty slot");
    tables(uplink).set_channel(relay, 0x4001, false);
    assert_eq!(run(uplink, &relayed), XDP_DROP, "unbound");
    let reasons: Vec<_> = dropped(uplink).iter().collect();
    let expect =
        [(DropReason::UnknownRelay, 1), (DropReason::UnboundChannel, 2), (DropReason::HandshakeBudget, 1)];
    assert_eq!(reasons, expect);
}

#[test]
#[ignore = "needs root and the BPF object; `cargo xtask test` runs it"]
fn bpf_a_full_map_is_counted_and_says_when_nothing_may_be_dropped_any_more() {
    let uplink = &mut whole();
    let at = |n: usize| SocketAddr::from(([10, 0, 0, 1], u16::try_from(n).unwrap()));
    (1..=maps::MAX_LOCAL + 2).for_each(|n| tables(uplink).set_local(at(n), true));
    assert_eq!(tables(uplink).left_out()[0], ("LOCAL", 2));
    assert!(!uplink.must_pass(), "frames to an address that is not entered pass");
    assert!(uplink.enable(true).unwrap());
    (1..=maps::MAX_RELAYS + 1).for_each(|n| tables(uplink).set_relay(at(n), true));
    assert_eq!(tables(uplink).left_out()[1], ("RELAYS", 1));
    assert!(uplink.must_pass());
    assert!(!uplink.enable(true).unwrap(), "it cannot be switched on any more");
}

#[test]
#[ignore = "needs root and the BPF object; `cargo xtask test` runs it"]
fn bpf_steering_and_uplink_ask_the_same_maps() {
    let kernel = &mut whole();
    let ids = kernel.owners.map_ids().unwrap();
    let programs = [("uplink", &ids[..1]), ("steer_socket", &ids[..1]), ("steer_tun", &ids[1..])];
    for (name, expect) in programs {
        let program = kernel.plane.ebpf.program(name).unwrap();
        let used = program.info().unwrap().map_ids().unwrap().expect("a kernel since 4.15 says it");
        assert!(expect.iter().all(|id| used.contains(id)), "{name} asks {used:?}, not {expect:?}");
    }
    // A client too many for the map of sessions: nothing may be dropped any more.
    kernel.enable(true).unwrap();
    for connection in 0..=maps::SESSIONS.capacity {
        assert!(!kernel.must_pass());
        kernel.owners.set_session(ConnectionIndex::new(connection).unwrap(), Some(WorkerId::FIRST));
    }
    assert!(kernel.must_pass() && !kernel.enable(true).unwrap());
}

/// Enters what `world` holds, through the writers of the daemon where they can say it.
fn fill(uplink: &mut Kernel, world: &World) {
    let mut relays = BTreeMap::new();
    for (at, id) in &world.relays {
        relays.insert(*id, address(at));
        tables(uplink).set_relay(address(at), true);
    }
    for (relay, number) in world.channels.borrow().keys() {
        tables(uplink).set_channel(relays[relay], u16::try_from(*number).unwrap(), true);
    }
    world.local.iter().for_each(|at| tables(uplink).set_local(address(at), true));
    world.peers.borrow().keys().for_each(|at| tables(uplink).set_peer(address(at), true));
    world.ufrags.iter().for_each(|ufrag| tables(uplink).set_ufrag(*ufrag, true));
    for (connection, worker) in &world.sessions {
        let worker = WorkerId::new(usize::try_from(*worker).unwrap()).unwrap();
        uplink.owners.set_session(ConnectionIndex::new(*connection).unwrap(), Some(worker));
    }
    set_budgets(uplink, world);
    uplink.enable(world.enabled).unwrap();
    assert!(uplink.left_out().all(|(_, left_out)| left_out == 0));
    assert!(!uplink.must_pass());
}

/// Budgets as they are in `world`: used up or full.
fn set_budgets(uplink: &mut Kernel, world: &World) {
    for ((address, port), budget) in world.peers.borrow().iter() {
        set_budget(uplink, &Purse::Peer(Endpoint::v6(*address, *port)), *budget);
    }
    for ((relay, number), budget) in world.channels.borrow().iter() {
        let at = world.relays.iter().find(|(_, id)| *id == relay).expect("a channel of a relay").0;
        let relay = tables(uplink).relay_id(address(at)).expect("it is entered");
        set_budget(uplink, &Purse::Channel(ChannelKey { relay, number: *number }), *budget);
    }
    set_budget(uplink, &Purse::Anyone, *world.anyone.borrow());
}

fn set_budget(kernel: &mut Kernel, purse: &Purse, budget: Budget) {
    let Kernel { plane, uplink, .. } = kernel;
    uplink.as_mut().expect("the whole object has it").set_budget(plane, purse, budget);
}

/// An AF_XDP socket in the slot of every worker, on the queue that a test run claims to be. They are bound to nothing:
/// a test run stops at the verdict.
fn bind(uplink: &mut Kernel) -> socket2::Socket {
    let socket = socket2::Socket::new(libc::AF_XDP.into(), socket2::Type::RAW, None).unwrap();
    for worker in 0..maps::MAX_WORKERS {
        tables(uplink).set_socket(0, WorkerId::new(worker).unwrap(), Some(socket.as_fd())).unwrap();
    }
    socket
}

/// What the program returns; that it has left the frame as it is, too.
fn run(uplink: &mut Kernel, frame: &[u8]) -> u32 {
    let mut out = vec![0; frame.len()];
    let options = TestRunOptions { data_in: Some(frame), data_out: Some(&mut out), ..TestRunOptions::new() };
    let result = uplink::program(&mut uplink.plane.ebpf).unwrap().test_run(options).unwrap();
    assert_eq!(out, frame, "the frame was changed");
    result.return_value
}

fn action(verdict: Verdict, bound: bool) -> u32 {
    match verdict {
        Verdict::Pass => XDP_PASS,
        Verdict::Drop(_) => XDP_DROP,
        Verdict::Redirect { .. } if bound => XDP_REDIRECT,
        Verdict::Redirect { .. } => XDP_PASS,
    }
}

fn outcome(verdict: Verdict, bound: bool) -> Outcome {
    match verdict {
        Verdict::Pass => Outcome::Passed,
        Verdict::Drop(_) => Outcome::Dropped,
        Verdict::Redirect { .. } if bound => Outcome::Redirected,
        Verdict::Redirect { .. } => Outcome::NoSocket,
    }
}

fn dropped(uplink: &Kernel) -> Counters {
    let mut counters = Counters::default();
    for (reason, count) in uplink.plane.drops().unwrap() {
        counters.add(reason, count.packets);
    }
    counters
}

fn address((address, port): &At) -> SocketAddr {
    SocketAddr::new(IpAddr::V6(Ipv6Addr::from(*address)).to_canonical(), u16::from_be_bytes(*port))
}

/// Changes, cuts or lengthens a frame; mostly where it matters.
fn mutate(frame: &mut Vec<u8>, random: &mut Random) {
    const INTERESTING: [u8; 10] = [0, 1, 2, 3, 4, 6, 0x40, 0x45, 0x60, 0xff];
    match random.below(8) {
        0 => frame.truncate(ETHERNET + random.below(frame.len() - ETHERNET + 1)),
        1 => frame.extend(vec![4; random.below(40)]),
        2 => {
            let at = random.below(frame.len());
            frame[at] ^= 1 << random.below(8);
        }
        kind => {
            let reach = if kind < 6 { frame.len().min(90) } else { frame.len() };
            let at = random.below(reach);
            frame[at] = match random.below(2) {
                0 => INTERESTING[random.below(INTERESTING.len())],
                _ => random.byte(),
            };
        }
    }
}

/// Marsaglia's xorshift64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from((self.next() >> 11) % end as u64).expect("smaller than `end`")
    }

    fn byte(&mut self) -> u8 {
        self.next().to_be_bytes()[2]
    }
}
