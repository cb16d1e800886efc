//! Every metric: its name, unit and help, in the order in which an operator reads them.

use super::{
    Snapshot,
    family::{Family, Kind, Sample, Unit, Value},
};
use crate::{data::fast::Mode, dns::Count, portal::COMPAT_VERSION};
use gateway_common::{DropReason, decide};
use gateway_proto::worker::Traffic;

impl Snapshot {
    /// All of them.
    pub fn families(&self) -> Vec<Family> {
        let mut page = Page(Vec::with_capacity(57));
        self.process(&mut page);
        self.portal(&mut page);
        self.clients(&mut page);
        self.relays(&mut page);
        self.traffic(&mut page);
        self.drops(&mut page);
        self.workers(&mut page);
        self.queues(&mut page);
        self.flow_logs(&mut page);
        self.dns(&mut page);
        self.kernel(&mut page);
        self.fast_path(&mut page);
        page.0
    }

    fn process(&self, page: &mut Page) {
        let labels = [
            ("version", env!("CARGO_PKG_VERSION")),
            ("compat_version", COMPAT_VERSION),
            ("arch", std::env::consts::ARCH),
        ];
        let help = "What is running: its version, the version it reports to the portal, its architecture.";
        page.family("build", help, Unit::None, Kind::Info, [(labels, 1u64)]);
        let started = self.started.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        page.gauge(
            "start_time",
            "When the daemon was started, since 1970-01-01 UTC.",
            Unit::Seconds,
            [([], started.as_secs_f64())],
        );
        let ready = u64::from(self.readiness.is_ready());
        page.gauge("ready", "Whether /readyz says yes.", Unit::None, [([], ready)]);
        let conditions = self.readiness.conditions();
        let conditions =
            conditions.iter().map(|(name, state)| ([("condition", *name)], u64::from(state.holds)));
        page.gauge("condition", "Whether each condition of /readyz holds.", Unit::None, conditions);
    }

    fn portal(&self, page: &mut Page) {
        let (joins, failures) = self.readiness.portal_counts();
        page.counter(
            "portal_joins",
            "Times that the portal's channel was joined.",
            Unit::None,
            [([], joins)],
        );
        let help = "Connections to the portal that were not made or ended.";
        page.counter("portal_failures", help, Unit::None, [([], failures)]);
        let partition = self.readiness.partition().unwrap_or_default();
        let help = "How long the portal has been away; 0 while it is there. The daemon gives up at \
                    FIREZONE_MAX_PARTITION_TIME.";
        page.gauge("portal_partition", help, Unit::Seconds, [([], partition.as_secs_f64())]);
    }

    fn clients(&self, page: &mut Page) {
        let status = &self.status;
        let help = "Clients with at least one authorization.";
        page.gauge("clients", help, Unit::None, [([], status.clients as u64)]);
        let kinds = [
            ("none", status.connecting),
            ("peer_to_peer", status.peer_to_peer),
            ("peer_to_relay", status.peer_to_relay),
            ("relay_to_peer", status.relay_to_peer),
            ("relay_to_relay", status.relay_to_relay),
        ];
        let help =
            "Connections by the kind of their path, seen from the gateway: relay_to_ uses a relay of ours.";
        page.gauge(
            "connections",
            help,
            Unit::None,
            kinds.map(|(path, count)| ([("path", path)], count as u64)),
        );
    }

    fn relays(&self, page: &mut Page) {
        page.gauge("relays", "Relays that have answered.", Unit::None, [([], self.status.relays as u64)]);
        let rtts: Vec<_> =
            self.relay_rtts.iter().map(|(id, rtt)| (id.to_string(), rtt.as_secs_f64())).collect();
        let rtts = rtts.iter().map(|(id, rtt)| ([("relay", id.as_str())], *rtt));
        page.gauge("relay_rtt", "Smoothed round-trip time to each relay.", Unit::Seconds, rtts);
    }

    fn traffic(&self, page: &mut Page) {
        let names = self.worker_names();
        let each = |of: fn(&Traffic) -> [u64; 4]| {
            let rows = self.workers.iter().zip(&names).flat_map(move |(worker, name)| {
                let ways = [
                    ("outbound", "direct"),
                    ("outbound", "relayed"),
                    ("inbound", "direct"),
                    ("inbound", "relayed"),
                ];
                let labels = ways.map(|(direction, path)| {
                    [("worker", name.as_str()), ("direction", direction), ("path", path)]
                });
                labels.into_iter().zip(of(&worker.traffic))
            });
            rows.collect::<Vec<_>>()
        };
        let packets = each(|t| {
            [t.outbound_direct, t.outbound_relayed, t.inbound_direct, t.inbound_relayed].map(|v| v.packets)
        });
        let help =
            "Packets carried; outbound is from a client to a resource, relayed is through a relay of ours.";
        page.counter("tunnel_packets", help, Unit::None, packets);
        let bytes = each(|t| {
            [t.outbound_direct, t.outbound_relayed, t.inbound_direct, t.inbound_relayed].map(|v| v.bytes)
        });
        let help = "Bytes of these packets, IP headers included, without WireGuard's and outer headers.";
        page.counter("tunnel", help, Unit::Bytes, bytes);
        let sum =
            |of: fn(&Traffic) -> u64| self.workers.iter().map(|worker| of(&worker.traffic)).sum::<u64>();
        let kinds = [
            ("handshake", sum(|t| t.handshakes)),
            ("keepalive", sum(|t| t.keepalives)),
            ("control", sum(|t| t.control)),
            ("stun", sum(|t| t.stun)),
        ];
        let help = "Messages accepted that carry no packet: WireGuard's handshakes and keep-alives, control packets of \
                    clients, STUN.";
        page.counter("messages", help, Unit::None, kinds.map(|(kind, count)| ([("kind", kind)], count)));
        let kinds = [("icmp_denial", sum(|t| t.denials)), ("name", sum(|t| t.answers))];
        let help = "What the gateway itself said to clients inside tunnels: ICMP errors for what is not allowed, answers \
                    about names.";
        page.counter("answers", help, Unit::None, kinds.map(|(kind, count)| ([("kind", kind)], count)));
    }

    /// With zeros, so that a rate can be taken of the first.
    fn drops(&self, page: &mut Page) {
        let workers =
            DropReason::ALL.iter().map(|reason| (*reason, place(*reason), self.worker_drops.get(*reason)));
        let control = self.control_drops.iter().map(|(reason, packets)| (reason, "control", packets));
        let kernel = DropReason::ALL.iter().map(|reason| (*reason, "xdp", self.kernel_drops.get(*reason)));
        let kernel = kernel.filter(|(reason, ..)| decide::REASONS.contains(reason) && self.frames.is_some());
        let rows = workers.chain(control).chain(kernel);
        let rows = rows.map(|(reason, place, n)| ([("place", place), ("reason", reason.label())], n));
        let help =
            "Packets dropped, by who dropped them (udp, tun, xdp: the devices and what serves them) and why.";
        page.counter("dropped_packets", help, Unit::None, rows);
    }

    fn workers(&self, page: &mut Page) {
        let names = self.worker_names();
        let workers =
            || self.workers.iter().zip(&names).map(|(worker, name)| ([("worker", name.as_str())], worker));
        let shares = workers().map(|(labels, worker)| (labels, worker.busy_share));
        let help = "Share of the last 10 s in which the worker did not sleep. Near 1 it is saturated; near 1 on all \
                    workers, the site needs another gateway, or this one more cores.";
        page.gauge("worker_busy", help, Unit::Ratio, shares);
        let busy = workers().map(|(labels, worker)| (labels, worker.work.busy.as_secs_f64()));
        page.counter("worker_busy", "Time in which the worker did not sleep.", Unit::Seconds, busy);
        let turns = workers().map(|(labels, worker)| (labels, worker.turns));
        let help = "Turns of the worker: the fewer for the same packets, the larger its batches.";
        page.counter("worker_turns", help, Unit::None, turns);
        let handed_over = workers().map(|(labels, worker)| (labels, worker.work.handed_over));
        let help = "Packets that the worker passed to the worker that holds their client.";
        page.counter("worker_handed_over_packets", help, Unit::None, handed_over);
        let given = workers().map(|(labels, worker)| (labels, worker.work.given));
        page.counter("worker_moved_clients", "Clients that the worker gave to another.", Unit::None, given);
        let clients = names.iter().zip(&self.clients_by_worker);
        let clients = clients.map(|(name, count)| ([("worker", name.as_str())], *count as u64));
        page.gauge("worker_clients", "Clients of the worker.", Unit::None, clients);
        let bytes = workers().map(|(labels, worker)| (labels, worker.handover_bytes_waiting as u64));
        let help = "Bytes passed to the worker by others that it has not read.";
        page.gauge("worker_handover_waiting", help, Unit::Bytes, bytes);
        let commands = workers().map(|(labels, worker)| (labels, worker.commands_waiting as u64));
        page.gauge("worker_commands_waiting", "Commands that the worker has not seen.", Unit::None, commands);
    }

    fn queues(&self, page: &mut Page) {
        let depths = &self.depths;
        let queues = [
            ("from_workers", self.worker_events_waiting),
            ("from_portal", self.portal_events_waiting),
            ("from_relays", depths.from_relays),
            ("to_workers", depths.to_workers),
            ("to_network", depths.to_network),
            ("to_portal", depths.to_portal),
            ("to_shell", depths.to_shell),
            ("authorizations_without_relay", depths.parked),
            ("early_candidates", depths.early),
            ("names_looked_up", depths.resolving),
            ("flow_logs", self.flow_logs.waiting),
        ];
        let rows = queues.map(|(queue, length)| ([("queue", queue)], length as u64));
        page.gauge("queue_length", "What waits in the control plane, by queue.", Unit::None, rows);
    }

    fn flow_logs(&self, page: &mut Page) {
        let logs = &self.flow_logs;
        let before = self.workers.iter().map(|worker| worker.traffic.flow_reports_lost).sum();
        let rows =
            [("workers", before), ("writer", logs.lost), ("spool", logs.no_room), ("disk", logs.failed)];
        let help = "Reports of flows that were lost: on the way from the workers, because writing them was too slow, because \
                    the spool was full, because the disk refused.";
        page.counter(
            "flow_logs_lost",
            help,
            Unit::None,
            rows.map(|(stage, count)| ([("stage", stage)], count)),
        );
        // Nothing, until somebody has counted.
        let (files, bytes) = logs.spool.unzip();
        let help = "Records of flows that wait on disk to be uploaded: a start and an end for each flow.";
        page.gauge("flow_logs_spool_files", help, Unit::None, files.map(|files| ([], files)));
        page.gauge("flow_logs_spool", "Bytes of these.", Unit::Bytes, bytes.map(|bytes| ([], bytes)));
        let help = "Records of flows that the portal's endpoint has taken, or refused for good.";
        page.counter("flow_logs_uploaded", help, Unit::None, [([], logs.uploaded)]);
        let help = "Whether the last upload of flow logs failed; they are kept and sent again.";
        page.gauge("flow_logs_upload_failing", help, Unit::None, [([], u64::from(logs.upload_fails))]);
    }

    fn dns(&self, page: &mut Page) {
        let rows = |label: &'static str, counts: &[(&'static str, Count)]| {
            let rows = counts.iter().map(|(value, count)| ([(label, *value)], self.dns.get(*count)));
            rows.collect::<Vec<_>>()
        };
        let transports = rows("transport", &[("udp", Count::UdpQueries), ("tcp", Count::TcpQueries)]);
        page.counter("dns_queries", "Messages that reached the DNS servers.", Unit::None, transports);
        let outcomes = rows(
            "outcome",
            &[
                ("answered", Count::Answered),
                ("failed", Count::Failed),
                ("rejected", Count::Rejected),
                ("over_client_limit", Count::OverClientLimit),
                ("over_limit", Count::OverLimit),
                ("ignored", Count::Ignored),
            ],
        );
        page.counter("dns_outcomes", "What came of these messages.", Unit::None, outcomes);
        let events = rows(
            "event",
            &[
                ("truncated", Count::Truncated),
                ("unsent", Count::Unsent),
                ("tcp_connection", Count::Connections),
                ("tcp_connection_dropped", Count::ConnectionsDropped),
                ("asked_again", Count::AskedAgain),
                ("stray_datagram", Count::Strays),
                ("truncated_by_nameserver", Count::UpstreamTruncated),
            ],
        );
        page.counter("dns_events", "Things that happened at the DNS servers.", Unit::None, events);
        let look_ups = rows(
            "outcome",
            &[
                ("any", Count::LookUps),
                ("failed", Count::LookUpsFailed),
                ("timed_out", Count::LookUpsTimedOut),
            ],
        );
        let help = "Names of DNS resources looked up; failed and timed out are those of any, by one family at least.";
        page.counter("dns_resource_look_ups", help, Unit::None, look_ups);
        let help =
            "How long an answer took: of queries that clients sent, and of addresses of DNS resources.";
        let rows = self.dns.latencies.seen().map(|seen| {
            let labels = [
                ("purpose", seen.purpose.label()),
                ("question_type", seen.kind.label()),
                ("response_code", seen.verdict.label()),
            ];
            (labels, Value::Buckets(seen))
        });
        page.family("dns_lookup_duration", help, Unit::Seconds, Kind::Histogram, rows);
    }

    fn kernel(&self, page: &mut Page) {
        let rows = self.capabilities.iter();
        let rows = rows.map(|(capability, used)| ([("capability", capability.word())], u64::from(*used)));
        let help = "Whether each of the kernel's ways to batch and steer packets is in use.";
        page.gauge("capability_in_use", help, Unit::None, rows);
        let rows = self.left_out.iter().map(|(map, count)| ([("map", *map)], *count));
        let help =
            "Entries that a full map of the kernel's did not take; what they are about goes the slow way.";
        page.counter("map_entries_left_out", help, Unit::None, rows);
    }

    fn fast_path(&self, page: &mut Page) {
        let on = self.fast_path.iter().map(|(status, _)| {
            let interface = status.interface.as_deref().unwrap_or("none");
            let mode = status.mode.map_or("off", Mode::label);
            ([("interface", interface), ("mode", mode)], u64::from(status.on))
        });
        let help = "Whether frames of this interface take the fast path, and in which mode; the log says why not in a better one.";
        page.gauge("fast_path_on", help, Unit::None, on);
        let frames = self.frames.iter().flatten();
        let frames = frames.map(|(outcome, count)| ([("outcome", outcome.label())], count.packets));
        let help = "Frames that came on the uplink, by what the XDP program did with them.";
        page.counter("fast_path_frames", help, Unit::None, frames);
        let carried = self.fast_path.iter().flat_map(|(_, (received, sent))| {
            [([("direction", "rx")], *received), ([("direction", "tx")], *sent)]
        });
        let help = "Frames between AF_XDP sockets and workers.";
        page.counter("fast_path_carried_frames", help, Unit::None, carried);
    }

    fn worker_names(&self) -> Vec<String> {
        self.workers.iter().map(|worker| worker.id.to_string()).collect()
    }
}

/// Who dropped a packet that a worker counted.
fn place(reason: DropReason) -> &'static str {
    use DropReason::{
        EmptyDatagram, MalformedOffload, NoDestination, OversizedDatagram, TunWrite, UdpSend, XskRefused,
        XskRingFull, XskStarved, XskTxInvalid,
    };
    match reason {
        EmptyDatagram | NoDestination | OversizedDatagram | UdpSend => "udp",
        MalformedOffload | TunWrite => "tun",
        XskRingFull | XskStarved | XskRefused | XskTxInvalid => "xdp",
        _ => "worker",
    }
}

/// Collects families.
struct Page(Vec<Family>);

/// Names and values of one sample's labels.
type Labels<'a, const N: usize> = [(&'static str, &'a str); N];

impl Page {
    fn counter<'a, const N: usize, V: Into<Value>>(
        &mut self,
        name: &'static str,
        help: &'static str,
        unit: Unit,
        rows: impl IntoIterator<Item = (Labels<'a, N>, V)>,
    ) {
        self.family(name, help, unit, Kind::Counter, rows);
    }

    fn gauge<'a, const N: usize, V: Into<Value>>(
        &mut self,
        name: &'static str,
        help: &'static str,
        unit: Unit,
        rows: impl IntoIterator<Item = (Labels<'a, N>, V)>,
    ) {
        self.family(name, help, unit, Kind::Gauge, rows);
    }

    fn family<'a, const N: usize, V: Into<Value>>(
        &mut self,
        name: &'static str,
        help: &'static str,
        unit: Unit,
        kind: Kind,
        rows: impl IntoIterator<Item = (Labels<'a, N>, V)>,
    ) {
        let sample = |(labels, value): (Labels<'a, N>, V)| Sample {
            labels: labels.map(|(name, value)| (name, value.to_owned())).to_vec(),
            value: value.into(),
        };
        let samples = rows.into_iter().map(sample).collect();
        self.0.push(Family { name, help, unit, kind, samples });
    }
}
