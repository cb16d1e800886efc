//! The recorded sessions again, with [`Control`] in the place of upstream's gateway: what it tells the portal and
//! what it sends before the client's first datagram must be what was recorded (spec/samples).
//!
//! The portal's events and their times are the recorded ones. The relay is the twin with the recorded credentials
//! and port; the client says nothing by itself, its candidates come from the recording.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::{Config, Control, tests::epoch};
use crate::{
    command::{StunDatagram, WorkerEvent},
    portal::{
        Generation, Parsed, egress,
        messages::{Egress, Ingress, Init},
        parse_ingress,
    },
    relay::twin::{Flavor, Packet, Twin},
};

const HOST: &str = "198.51.100.2:52625";
const SERVER: &str = "203.0.113.2:3478";

struct Sample {
    name: &'static str,
    generation: Generation,
    lines: &'static str,
    relayed_port: u16,
    /// Our datagrams up to the client's first: destination and length of the UDP payload, as tcpdump saw them.
    /// Of those of one instant the order may differ.
    sent: &'static [&'static [(&'static str, usize)]],
}

const SAMPLES: [Sample; 3] = [
    Sample {
        name: "head-direct",
        generation: Generation::V2,
        lines: include_str!("../../tests/samples/head-direct.gateway.jsonl"),
        relayed_port: 64_276,
        sent: &[
            &[(SERVER, 32)],
            &[(SERVER, 144)],
            &[(SERVER, 184)],
            // Two binds, three checks without a channel, one with. The fourth pair's check only started its bind.
            &[(SERVER, 188), ("192.0.2.2:52625", 88), (SERVER, 188), ("203.0.113.2:58035", 88), (SERVER, 92)],
        ],
    },
    Sample {
        name: "head-relayed",
        generation: Generation::V2,
        lines: include_str!("../../tests/samples/head-relayed.gateway.jsonl"),
        relayed_port: 63_944,
        sent: &[
            &[(SERVER, 32)],
            &[(SERVER, 144)],
            &[(SERVER, 184)],
            &[(SERVER, 188), ("192.0.2.2:52625", 88), (SERVER, 188), ("203.0.113.2:52459", 88), (SERVER, 92)],
        ],
    },
    Sample {
        name: "nov25-relayed",
        generation: Generation::V1,
        lines: include_str!("../../tests/samples/nov25-relayed.gateway.jsonl"),
        relayed_port: 60_443,
        sent: &[
            // SOFTWARE is 76 bytes shorter than in Nov-2025.
            &[(SERVER, 108 - 76)],
            &[(SERVER, 220 - 76)],
            &[(SERVER, 260 - 76)],
            &[
                (SERVER, 264 - 76),
                (SERVER, 264 - 76),
                (SERVER, 92),
                ("192.0.2.2:52625", 88),
                ("203.0.113.2:53692", 88),
                (SERVER, 92),
            ],
        ],
    },
];

#[test]
fn the_portal_hears_what_it_heard_from_upstream() {
    for sample in &SAMPLES {
        let recorded: Vec<_> = messages(sample, "to-portal")
            .into_iter()
            .filter_map(|(_, message)| comparable(&message))
            .collect();
        let mut replay = Replay::new(sample);
        replay.run(sample);
        let said: Vec<_> = replay
            .said
            .iter()
            .map(|message| {
                let (event, payload) = egress::encode(message, sample.generation);
                comparable(&serde_json::json!({ "event": event, "payload": payload })).unwrap()
            })
            .collect();
        assert_eq!(said, expected(sample, recorded), "{}", sample.name);
        assert!(replay.twin.sins.is_empty(), "{}: {:?}", sample.name, replay.twin.sins);
    }
}

#[test]
fn datagrams_leave_in_the_recorded_sizes_and_order() {
    for sample in &SAMPLES {
        let mut replay = Replay::new(sample);
        replay.run(sample);
        let mut sent = replay.sent.into_iter();
        for instant in sample.sent {
            let mut expect: Vec<_> =
                instant.iter().map(|(dst, len)| (dst.parse::<SocketAddr>().unwrap(), *len)).collect();
            let mut ours: Vec<_> = sent.by_ref().take(expect.len()).collect();
            assert!(ours.windows(2).all(|w| w[0].0 == w[1].0), "{}: at one instant: {ours:?}", sample.name);
            // A channel is bound before it is used.
            let first_data = ours.iter().position(|(_, p)| p.payload[0] == 0x40).unwrap_or(ours.len());
            let last_bind = ours.iter().rposition(|(_, p)| p.payload.starts_with(&[0, 9])).unwrap_or(0);
            assert!(last_bind <= first_data, "{}: {ours:?}", sample.name);
            ours.sort_by_key(|(_, p)| (p.dst, p.payload.len()));
            expect.sort_unstable();
            let ours: Vec<_> = ours.iter().map(|(_, p)| (p.dst, p.payload.len())).collect();
            assert_eq!(ours, expect, "{}", sample.name);
        }
    }
}

/// Upstream of Nov-2025 signalled a reflexive candidate that equals the host one, and with a reused connection that
/// one only; we do as HEAD does (connections.md section 1.2): all others, every time.
fn expected(sample: &Sample, recorded: Vec<Value>) -> Vec<Value> {
    if sample.generation == Generation::V2 {
        return recorded;
    }
    let is_candidates = |m: &Value| m["event"] == "broadcast_ice_candidates";
    let mut candidates = recorded.iter().find(|m| is_candidates(m)).unwrap().clone();
    let lines = candidates["payload"]["candidates"].as_array_mut().unwrap();
    lines.retain(|line| !line.as_str().unwrap().contains("srflx"));
    assert_eq!(lines.len(), 2);
    recorded.into_iter().map(|m| if is_candidates(&m) { candidates.clone() } else { m }).collect()
}

/// Event and payload without the foundations, which are arbitrary. `None` for what the session says by itself, and
/// for the announcement of connections without ICE.
fn comparable(message: &Value) -> Option<Value> {
    let event = message["event"].as_str().unwrap();
    if matches!(event, "phx_join" | "heartbeat" | "set_snownet_capabilities") {
        return None;
    }
    let mut payload = message["payload"].clone();
    for line in payload.get_mut("candidates").and_then(Value::as_array_mut).into_iter().flatten() {
        let (foundation, rest) = line.as_str().unwrap().split_once(' ').unwrap();
        assert!(foundation.starts_with("candidate:"));
        *line = rest.into();
    }
    Some(serde_json::json!({ "event": event, "payload": payload }))
}

/// When, and what.
fn messages(sample: &Sample, direction: &str) -> Vec<(Duration, Value)> {
    let lines = sample.lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines
        .filter(|line| line["dir"] == direction)
        .map(|line| (Duration::from_secs_f64(line["t"].as_f64().unwrap()), line["msg"].clone()))
        .collect()
}

struct Replay {
    gateway: Control,
    twin: Twin,
    now: Instant,
    sent: Vec<(Instant, Packet)>,
    said: Vec<Egress>,
}

impl Replay {
    fn new(sample: &Sample) -> Self {
        let now = epoch();
        let unix_now = Duration::from_secs(1_795_000_000);
        let mut twin = Twin::new(Flavor::Firezone, &[SERVER.parse().unwrap()], 1);
        twin.grant_port(sample.relayed_port);
        let gateway = Control::new(Config {
            seed: 1,
            unix_now,
            now,
            workers: crate::control::Workers::ONE,
            flow_logs: false,
        });
        Self { gateway, twin, now, sent: Vec::new(), said: Vec::new() }
    }

    fn run(&mut self, sample: &Sample) {
        self.gateway.handle_portal_connected(self.now);
        let start = self.now;
        for (at, message) in messages(sample, "from-portal") {
            let event = message["event"].as_str().unwrap();
            if event == "phx_reply" {
                continue;
            }
            let Parsed::Message { ingress, .. } = parse_ingress(event, &message["payload"]) else {
                panic!("{event}")
            };
            if let Ingress::Init(init) = &ingress {
                let Init { relays, .. } = &**init;
                self.twin.set_credentials(&relays[0].username, &relays[0].password.0);
            }
            self.pass(start + at);
            self.gateway.handle_ingress(ingress, self.now);
            self.settle();
        }
    }

    /// Time passes; the relay answers at once.
    fn pass(&mut self, until: Instant) {
        while let Some(due) = self.gateway.poll_timeout().filter(|due| *due <= until) {
            self.now = self.now.max(due);
            self.gateway.handle_timeout(self.now);
            self.settle();
        }
        self.now = until;
    }

    fn settle(&mut self) {
        let host: SocketAddr = HOST.parse().unwrap();
        loop {
            while self.gateway.poll_command().is_some() {}
            while let Some(egress) = self.gateway.poll_egress() {
                self.said.push(egress);
            }
            while self.gateway.poll_event().is_some() {}
            let Some(transmit) = self.gateway.poll_transmit() else { return };
            assert!(transmit.src.is_none_or(|src| src == host));
            let packet = Packet { src: host, dst: transmit.dst, payload: transmit.payload };
            self.sent.push((self.now, packet.clone()));
            if !self.twin.owns(packet.dst) {
                continue;
            }
            for answer in self.twin.handle(&packet, self.now).into_iter().filter(|answer| answer.dst == host)
            {
                let payload = answer.payload;
                let stun = StunDatagram {
                    heard_by: crate::WorkerId::FIRST,
                    local: host,
                    from: answer.src,
                    via: None,
                    payload,
                };
                self.gateway.handle_worker_event(WorkerEvent::Stun(stun), self.now);
            }
        }
    }
}
