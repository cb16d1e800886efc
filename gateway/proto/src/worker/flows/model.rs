//! The rules of cli-and-service.md section 14.2 once more, as plainly as they stand there: one list, looked through for
//! every packet and every second. [`Flows`] must tell the same under random traffic.

use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};

use super::{
    tests::{ATTRIBUTIONS, CLIENT, packet, resource, way},
    *,
};
use crate::{
    flow::{FlowEnd, Outer, UnixTime},
    relay::twin,
    worker::inner,
};

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;

#[derive(Default)]
struct Model {
    flows: Vec<Line>,
    said: Vec<FlowReport>,
}

/// A flow, in milliseconds since the beginning.
struct Line {
    report: FlowReport,
    resource: ResourceId,
    began: u64,
    last: u64,
    end: FlowEnd,
    way: Way,
    only_syn: bool,
    fins: [bool; 2],
    /// The tick after both FINs.
    finished: Option<u64>,
}

struct Seen {
    protocol: FlowProtocol,
    client: SocketAddr,
    remote: SocketAddr,
    flags: u8,
    payload: u64,
}

impl Model {
    fn outbound(&mut self, seen: &Seen, by: ResourceId, domain: Option<&DomainName>, way: Way, now: u64) {
        let is_tcp = seen.protocol == FlowProtocol::Tcp;
        let has = |flag| is_tcp && seen.flags & flag != 0;
        let mut found = self.find(seen);
        if let Some(at) = found {
            let line = &self.flows[at];
            let again = has(SYN) && !has(RST) && !line.only_syn;
            if line.resource != by || again {
                self.close(at, now);
                found = None;
            }
        }
        let at = match found {
            Some(at) => at,
            None => {
                let pure_ack = is_tcp && !has(SYN) && seen.payload == 0;
                let token = ATTRIBUTIONS.iter().find(|(resource, _)| *resource == by);
                let Some((_, attribution)) = token.filter(|_| !has(FIN) && !has(RST) && !pure_ack) else {
                    return;
                };
                self.open(
                    FlowReport {
                        id: FlowId(0),
                        client: CLIENT,
                        attribution: Arc::clone(attribution),
                        protocol: seen.protocol,
                        src: seen.client,
                        dst: seen.remote,
                        domain: domain.cloned(),
                        outers: Vec::new(),
                        start: unix(now),
                        end: None,
                    },
                    by,
                    way,
                    now,
                )
            }
        };
        let mut at = at;
        if self.flows[at].way != way {
            if self.flows[at].report.outers.len() < 16 {
                let line = &mut self.flows[at];
                line.way = way;
                line.report.outers.push(Outer { src: way.client, dst: way.own, since: unix(now) });
            } else if !has(RST) {
                let line = &self.flows[at];
                let (only_syn, fins, finished) = (line.only_syn, line.fins, line.finished);
                let report = FlowReport {
                    outers: Vec::new(),
                    start: unix(now),
                    domain: domain.cloned(),
                    ..line.report.clone()
                };
                self.close(at, now);
                at = self.open(report, by, way, now);
                let line = &mut self.flows[at];
                (line.only_syn, line.fins, line.finished) = (only_syn, fins, finished);
            }
        }
        let line = &mut self.flows[at];
        line.end.tx_packets += 1;
        line.end.tx_bytes += seen.payload;
        line.only_syn &= has(SYN);
        self.after(at, 0, has(FIN), has(RST), now);
    }

    fn inbound(&mut self, seen: &Seen, now: u64) {
        let Some(at) = self.find(seen) else { return };
        let line = &mut self.flows[at];
        line.end.rx_packets += 1;
        line.end.rx_bytes += seen.payload;
        let has = |flag| seen.protocol == FlowProtocol::Tcp && seen.flags & flag != 0;
        self.after(at, 1, has(FIN), has(RST), now);
    }

    fn after(&mut self, at: usize, side: usize, fin: bool, rst: bool, now: u64) {
        let line = &mut self.flows[at];
        line.last = now;
        line.fins[side] |= fin;
        if fin && line.fins == [true; 2] {
            line.finished.get_or_insert(now / 1000 + 1);
        }
        if rst {
            self.close(at, now);
        }
    }

    fn tick(&mut self, now: u64) {
        while let Some(at) = self.flows.iter().position(|line| {
            line.finished.is_some_and(|second| second <= now / 1000)
                || (line.last + 120_000).div_ceil(1000) <= now / 1000
        }) {
            self.close(at, now);
        }
    }

    fn open(&mut self, report: FlowReport, resource: ResourceId, way: Way, now: u64) -> usize {
        let outers = vec![Outer { src: way.client, dst: way.own, since: unix(now) }];
        let report = FlowReport { outers, ..report };
        self.said.push(report.clone());
        let end = FlowEnd {
            end: unix(0),
            last_packet: unix(0),
            rx_packets: 0,
            tx_packets: 0,
            rx_bytes: 0,
            tx_bytes: 0,
        };
        let only_syn = true;
        let (began, last) = (now, now);
        self.flows.push(Line {
            report,
            resource,
            began,
            last,
            end,
            way,
            only_syn,
            fins: [false; 2],
            finished: None,
        });
        self.flows.len() - 1
    }

    fn close(&mut self, at: usize, now: u64) {
        let line = self.flows.remove(at);
        let end = if line.fins == [true; 2] { line.last } else { now };
        assert!(line.began <= line.last && line.last <= end);
        let end = FlowEnd { end: unix(end), last_packet: unix(line.last), ..line.end };
        self.said.push(FlowReport { end: Some(end), ..line.report });
    }

    fn find(&self, seen: &Seen) -> Option<usize> {
        self.flows.iter().position(|line| {
            let report = &line.report;
            (report.protocol, report.src, report.dst) == (seen.protocol, seen.client, seen.remote)
        })
    }
}

fn unix(ms: u64) -> UnixTime {
    UnixTime(Duration::from_secs(1_700_000_000) + Duration::from_millis(ms))
}

/// As they are told, but in an order of their own: of flows that end at one look, either may be told first.
fn sorted(mut reports: Vec<FlowReport>) -> Vec<String> {
    reports.iter_mut().for_each(|report| report.id = FlowId(0));
    let mut all: Vec<_> = reports.iter().map(|report| format!("{report:?}")).collect();
    all.sort_unstable();
    all
}

/// `steps` random packets and pauses; how many reports there were.
fn walk(seed: u64, steps: usize) -> usize {
    let start = twin::start();
    let mut random = SmallRng::seed_from_u64(seed);
    let mut flows = Flows::new(CLIENT, seed, MAX_FLOWS, start);
    let mut model = Model::default();
    let (mut now, mut told) = (0_u64, 0);
    let domain = DomainName::parse("db.example.net");
    let mut by = 1;
    let mut number = 1;
    for step in 0..steps {
        now += [0, 0, 0, 1, 40, 700, 1000, 3000, 30_000, 119_000][random.random_range(0..10)]
            * u64::from(random.random_ratio(1, 8));
        let at = start + Duration::from_millis(now);
        let reports = std::cell::RefCell::new(Vec::new());
        let mut out = |report: Box<FlowReport>| reports.borrow_mut().push(*report);
        flows.handle_timeout(at, &mut out);
        model.tick(now);
        let v6 = random.random_ratio(1, 3);
        let (client, remote) = if v6 { ("fd00::1", "2001:db8::5") } else { ("100.64.0.1", "10.0.0.5") };
        let seen = Seen {
            protocol: if random.random_ratio(3, 4) { FlowProtocol::Tcp } else { FlowProtocol::Udp },
            client: SocketAddr::new(client.parse().unwrap(), random.random_range(1..4)),
            remote: SocketAddr::new(remote.parse().unwrap(), random.random_range(1..3)),
            flags: [0x10, 0x10, 0x18, 0x02, 0x12, 0x11, 0x01, 0x04, 0x06, 0x00, 0x1f]
                [random.random_range(0..11)],
            payload: [0, 0, 1, 500][random.random_range(0..4)],
        };
        if random.random_ratio(1, 20) {
            number = [1, 2, 99][random.random_range(0..3)];
        }
        if random.random_ratio(1, 200) {
            by = random.random_range(1..4);
        }
        let payload = usize::try_from(seen.payload).unwrap();
        let outbound = random.random_ratio(1, 2);
        let (src, dst) = if outbound { (seen.client, seen.remote) } else { (seen.remote, seen.client) };
        let packet = packet(seen.protocol, src, dst, seen.flags, payload);
        let view = inner::view(&packet).unwrap();
        let domain = domain.as_ref().filter(|_| v6);
        if outbound {
            let clock = Meeting { unix: unix(0), at: start };
            let occasion = Occasion {
                resource: resource(by),
                domain: &|| domain.cloned(),
                attributions: &ATTRIBUTIONS,
                clock,
            };
            flows.outbound(&packet, &view, way(number), &occasion, at, &mut out);
            model.outbound(&seen, resource(by), domain, way(number), now);
        } else {
            flows.inbound(&packet, &view, at, &mut out);
            model.inbound(&seen, now);
        }
        if random.random_ratio(1, 5000) {
            flows.close_all(at, &mut out);
            while !model.flows.is_empty() {
                model.close(0, now);
            }
        }
        let (got, expect) = (reports.into_inner(), std::mem::take(&mut model.said));
        told += got.len();
        assert_eq!(sorted(got), sorted(expect), "seed {seed}, step {step}");
        assert_eq!(flows.len(), model.flows.len(), "seed {seed}, step {step}");
    }
    told
}

#[test]
fn random_traffic_makes_the_records_of_the_model() {
    let steps = std::env::var("GATEWAY_REFERENCE_STEPS").ok().and_then(|s| s.parse().ok()).unwrap_or(100_000);
    for seed in 0..3 {
        let told = walk(seed, steps);
        assert!(told > steps / 20, "only {told} reports");
    }
}
