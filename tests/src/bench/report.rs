//! What a run found: the types of `bench/results.json`.
//!
//! Raw figures stand beside what is computed from them, so that a reader can compute something else. `markdown` makes
//! tables of it and knows nothing that is not in here.

use serde::{Deserialize, Serialize};

/// `bench/results.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Results {
    pub(super) about: About,
    /// What the kernel refused, who is missing, and what else a reader must know.
    pub(super) notes: Vec<String>,
    pub(super) rows: Vec<Row>,
    /// Two contenders each: ours, and ours with a further task.
    #[serde(default)]
    pub(super) tasks: Vec<Row>,
    pub(super) aead: Vec<Aead>,
    pub(super) workers: Vec<Workers>,
    pub(super) floods: Vec<Flood>,
}

/// Where, when and how.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct About {
    /// The processor's name.
    pub(super) machine: String,
    pub(super) cores: usize,
    pub(super) kernel: String,
    /// Abbreviated hash; `+` if the tree had changes.
    pub(super) commit: String,
    /// UTC.
    pub(super) date: String,
    /// `full` or `quick`.
    pub(super) mode: String,
    /// Of each contender, interleaved.
    pub(super) rounds: usize,
    /// Of one run.
    pub(super) seconds: u32,
}

/// One kind of traffic, and everybody who forwarded it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Row {
    /// `direct TCP outbound, offloads on`
    pub(super) name: String,
    /// Ours first.
    pub(super) contenders: Vec<Contender>,
}

/// One who forwarded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Contender {
    pub(super) name: String,
    /// Of the runs that are not void, or of all if none is left.
    pub(super) summary: Summary,
    /// In order; round n of all contenders ran before round n + 1 of any.
    pub(super) runs: Vec<Run>,
}

/// Over the runs of one contender.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Summary {
    /// Inner packets per millisecond of CPU time of threads, NAPI and softirq.
    pub(super) kpkt_per_cpu_second: Spread,
    /// The same cost the other way round.
    pub(super) ns_per_packet: Spread,
    /// The process alone.
    pub(super) process_ns_per_packet: Spread,
    pub(super) gbit_per_second: Spread,
    /// Of UDP datagrams.
    pub(super) lost_percent: Spread,
    /// All cores: 200 is two of them busy all the time.
    pub(super) machine_percent: Spread,
    pub(super) void_runs: usize,
}

/// A median never stands alone.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

/// One run of one contender.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Run {
    /// Inner packets that arrived: UDP datagrams as the receiver counted them; for TCP the bytes received, in segments
    /// of one MTU.
    pub(super) packets: u64,
    /// Payload that arrived.
    pub(super) bytes: u64,
    /// For which was sent.
    pub(super) seconds: f64,
    /// Of UDP datagrams.
    pub(super) lost_percent: f64,
    pub(super) cost: Cost,
    /// More of the core's busy time than allowed was nobody's; with several workers, what was offered was not carried.
    pub(super) void: bool,
    /// How many void runs this one replaced.
    pub(super) repeated: u32,
}

/// CPU time of one run, nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Cost {
    pub(super) wall_ns: u64,
    /// All threads of the gateway.
    pub(super) threads_ns: u64,
    /// NAPI threads of its interfaces.
    pub(super) napi_ns: u64,
    pub(super) ksoftirqd_ns: u64,
    /// irq and softirq of its core as `/proc/stat` samples them; part of the times above where a thread was interrupted.
    pub(super) softirq_sampled_ns: u64,
    /// What `/proc/stat` says of its core, in ticks.
    pub(super) core_busy_ns: u64,
    pub(super) core_steal_ns: u64,
    /// Of the busy time, nobody's.
    pub(super) unattributed_ns: u64,
    /// Busy time of all cores.
    pub(super) machine_busy_ns: u64,
}

/// Encryption alone: boringtun and ring in a loop, packets of one size in the cache.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Aead {
    /// Of the inner packet.
    pub(super) bytes: usize,
    pub(super) seal_ns: Spread,
    pub(super) open_ns: Spread,
}

/// What a packet costs with several workers, all busy at once. The far ends are on the same cores.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Workers {
    /// `UDP outbound`
    pub(super) name: String,
    pub(super) clients: usize,
    /// One worker first; runs interleaved.
    pub(super) counts: Vec<WorkerCount>,
}

/// Of one number of workers; of the runs that are not void, or of all if none is left.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WorkerCount {
    pub(super) workers: usize,
    /// All threads and NAPI threads of the gateway.
    pub(super) ns_per_packet: Spread,
    pub(super) gbit_per_second: Spread,
    /// Of one core, of the worker that did least.
    pub(super) least_busy_percent: Spread,
    /// And of the one that did most.
    pub(super) most_busy_percent: Spread,
    pub(super) runs: Vec<Run>,
}

/// An established session while something floods the gateway.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Flood {
    pub(super) name: String,
    /// Datagrams per second that reached the gateway's interface, all traffic together, thousands.
    pub(super) arriving_kpps: Spread,
    /// Of UDP at a fixed rate.
    pub(super) goodput_mbit: Spread,
    /// Through the tunnel, of those that came back.
    pub(super) ping_p50_ms: Spread,
    pub(super) ping_p99_ms: Spread,
    pub(super) ping_lost_percent: Spread,
    /// From the connection's start to the answer's end.
    pub(super) healthz_p50_ms: Spread,
    pub(super) healthz_p99_ms: Spread,
    /// Threads and NAPI, of one core.
    pub(super) gateway_percent: Spread,
}

impl Cost {
    /// Threads, NAPI and softirq.
    pub(super) fn total_ns(&self) -> u64 {
        self.threads_ns + self.napi_ns + self.ksoftirqd_ns
    }
}

impl Run {
    pub(super) fn ns_per_packet(&self) -> f64 {
        self.cost.total_ns() as f64 / self.packets.max(1) as f64
    }
}

impl Contender {
    pub(super) fn new(name: &str, runs: Vec<Run>) -> Self {
        Self { name: name.to_owned(), summary: Summary::of(&runs), runs }
    }
}

impl Summary {
    pub(super) fn of(runs: &[Run]) -> Self {
        let void_runs = runs.iter().filter(|run| run.void).count();
        let counted: Vec<&Run> = runs.iter().filter(|run| !run.void || void_runs == runs.len()).collect();
        let over = |value: &dyn Fn(&Run) -> f64| Spread::of(counted.iter().map(|run| value(run)).collect());
        Self {
            kpkt_per_cpu_second: over(&|run| 1e6 / run.ns_per_packet()),
            ns_per_packet: over(&Run::ns_per_packet),
            process_ns_per_packet: over(&|run| run.cost.threads_ns as f64 / run.packets.max(1) as f64),
            gbit_per_second: over(&|run| run.bytes as f64 * 8.0 / run.seconds / 1e9),
            lost_percent: over(&|run| run.lost_percent),
            machine_percent: over(&|run| {
                100.0 * run.cost.machine_busy_ns as f64 / run.cost.wall_ns.max(1) as f64
            }),
            void_runs,
        }
    }
}

impl Spread {
    /// Of no values it is zero.
    pub(super) fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let median = match values.len() {
            0 => 0.0,
            n if n % 2 == 1 => values[middle],
            _ => f64::midpoint(values[middle - 1], values[middle]),
        };
        let three_decimals = |value: f64| (value * 1e3).round() / 1e3;
        Self {
            median: three_decimals(median),
            min: three_decimals(values.first().copied().unwrap_or(0.0)),
            max: three_decimals(values.last().copied().unwrap_or(0.0)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_median_and_ends() {
        let spread = |values: &[f64]| {
            let Spread { median, min, max } = Spread::of(values.to_vec());
            (median, min, max)
        };
        assert_eq!(spread(&[3.0, 1.0, 2.0]), (2.0, 1.0, 3.0));
        assert_eq!(spread(&[4.0, 1.0]), (2.5, 1.0, 4.0));
        assert_eq!(spread(&[]), (0.0, 0.0, 0.0));
    }

    #[test]
    fn void_runs_count_only_where_nothing_else_is() {
        let run = |threads_ns, void| Run {
            packets: 10,
            bytes: 1000,
            seconds: 1.0,
            lost_percent: 0.0,
            cost: Cost { threads_ns, wall_ns: 1_000_000_000, ..Cost::default() },
            void,
            repeated: 0,
        };
        let mixed = Summary::of(&[run(1000, false), run(9000, true)]);
        assert_eq!((mixed.ns_per_packet.max, mixed.void_runs), (100.0, 1));
        let all = Summary::of(&[run(1000, true), run(9000, true)]);
        assert_eq!((all.ns_per_packet.max, all.void_runs), (900.0, 2));
    }
}
