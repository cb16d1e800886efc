//! The rows: which traffic is sent through whom, in which order, how often.

use anyhow::Result;

use super::{
    bed::{Bed, Who},
    burst::Bursts,
    report::{Contender, Row, Run},
    traffic::{self, Direction, Load},
};

/// One row before it is measured.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    relayed: bool,
    load: Load,
    direction: Direction,
    offloads: bool,
    beside: Beside,
}

/// Whom we are compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Beside {
    /// Everybody else.
    Others,
    /// Ourselves, doing more: [`Who::Counting`] or [`Who::Named`].
    Ourselves(Who),
}

/// How often and how long.
#[derive(Debug, Clone, Copy)]
pub(super) struct Effort {
    pub(super) rounds: usize,
    pub(super) seconds: u32,
    /// Void runs that may be repeated, in all rows together: on a busy machine all are void, and it must end.
    pub(super) repeats: u32,
}

/// Attempts at one run.
const ATTEMPTS: u32 = 3;

/// TCP takes what it gets.
const ONE: Load = Load::Tcp { streams: 1 };
/// Flows whose packets alternate: what merges packets of one flow has many to keep apart.
const MANY: Load = Load::Tcp { streams: 60 };

/// One datagram a system call.
const fn single(mbit: u32) -> Load {
    Load::Udp { bytes: 1200, mbit }
}

/// As QUIC stacks send.
const fn bursts(mbit: u32) -> Load {
    Load::Bursts(Bursts { bytes: 1200, mbit, datagrams: 10 })
}

/// UDP is sent at a rate that most contenders carry: where each frame holds one packet, and through the relay, half as much.
const DIRECT: [Load; 4] = [ONE, single(400), bursts(400), single(200)];
const SLOWER: [Load; 3] = [ONE, single(200), bursts(200)];

/// All of them; those with equal offloads stand together.
pub(super) fn all() -> Vec<Plan> {
    let both = [Direction::Outbound, Direction::Inbound];
    let mut plans = Vec::new();
    for (offloads, relayed) in [(true, false), (true, true), (false, false), (false, true)] {
        let loads: &[Load] = if offloads && !relayed { &DIRECT } else { &SLOWER };
        for load in loads {
            plans.extend(both.map(|direction| Plan {
                relayed,
                load: *load,
                direction,
                offloads,
                beside: Beside::Others,
            }));
        }
    }
    // Merging is what outbound packets meet. A relay's row would be the relay's, and inbound some of the peers are too slow for
    // so many streams: iperf3 loses its own connection then.
    let many = Plan {
        relayed: false,
        load: MANY,
        direction: Direction::Outbound,
        offloads: true,
        beside: Beside::Others,
    };
    plans.insert(2, many);
    plans
}

/// What a further task of a gateway costs, beside the same gateway without it.
pub(super) fn tasks(who: Who) -> Vec<Plan> {
    let mut plans = Vec::new();
    for load in [ONE, bursts(400)] {
        plans.extend([Direction::Outbound, Direction::Inbound].map(|direction| Plan {
            relayed: false,
            load,
            direction,
            offloads: true,
            beside: Beside::Ourselves(who),
        }));
    }
    plans
}

impl Plan {
    pub(super) fn name(&self) -> String {
        let way = if self.relayed { "relayed" } else { "direct" };
        let load = match self.load {
            Load::Tcp { streams: 1 } => "TCP".to_owned(),
            Load::Tcp { streams } => format!("TCP, {streams} streams"),
            Load::Udp { mbit, .. } => format!("UDP {mbit} Mbit/s"),
            Load::Bursts(Bursts { mbit, datagrams, .. }) => {
                format!("UDP {mbit} Mbit/s in bursts of {datagrams}")
            }
        };
        let direction = match self.direction {
            Direction::Outbound => "outbound",
            Direction::Inbound => "inbound",
        };
        let offloads = if self.offloads { "offloads on" } else { "offloads off" };
        let task = match self.beside {
            Beside::Ourselves(Who::Counting) => "flows counted: ",
            Beside::Ourselves(Who::Named) => "DNS resource: ",
            Beside::Ourselves(_) | Beside::Others => "",
        };
        format!("{task}{way} {load} {direction}, {offloads}")
    }
}

/// Measures `plans`, one after the other; within a row the contenders take turns.
///
/// # Errors
/// If the traffic of a run fails.
pub(super) fn measure(bed: &Bed, plans: &[Plan], effort: Effort) -> Result<Vec<Row>> {
    let mut repeats = effort.repeats;
    let mut rows = Vec::new();
    for (index, plan) in plans.iter().enumerate() {
        let name = plan.name();
        println!("[{}/{}] {name}", index + 1, plans.len());
        bed.set_offloads(plan.offloads)?;
        let who = match plan.beside {
            Beside::Ourselves(more) => vec![Who::Ours, more],
            Beside::Others if plan.relayed => vec![Who::Ours],
            Beside::Others => bed.contenders(),
        };
        let mut runs: Vec<Vec<Run>> = vec![Vec::new(); who.len()];
        for round in 1..=effort.rounds {
            let mut turns: Vec<usize> = (0..who.len()).collect();
            // A machine that gets slower from run to run would speak for whoever is first each time: a few per cent, which is
            // what a task costs.
            if matches!(plan.beside, Beside::Ourselves(_)) && round % 2 == 0 {
                turns.reverse();
            }
            for turn in turns {
                let run = once(bed, who[turn], plan, effort.seconds, &mut repeats)?;
                println!("    run {round} of {}: {}", effort.rounds, show(who[turn], &run));
                runs[turn].push(run);
            }
        }
        let contenders = who.iter().zip(runs).map(|(who, runs)| Contender::new(who.name(), runs)).collect();
        rows.push(Row { name, contenders });
    }
    Ok(rows)
}

/// A run that is void is repeated, while that is allowed.
fn once(bed: &Bed, who: Who, plan: &Plan, seconds: u32, repeats: &mut u32) -> Result<Run> {
    let mut repeated = 0;
    loop {
        let client = usize::from(plan.relayed);
        let run = match traffic::run(bed, who, client, plan.load, plan.direction, seconds) {
            Ok(run) => run,
            // iperf3 sometimes loses its own connection through a slow server.
            Err(error) if repeated + 1 < ATTEMPTS => {
                println!("    failed, repeated: {}: {error:#}", who.name());
                repeated += 1;
                continue;
            }
            Err(error) => return Err(error),
        };
        if !run.void || repeated + 1 == ATTEMPTS || *repeats == 0 {
            return Ok(Run { repeated, ..run });
        }
        *repeats -= 1;
        repeated += 1;
        println!("    void, repeated: {}", show(who, &run));
    }
}

fn show(who: Who, run: &Run) -> String {
    let cost = &run.cost;
    let percent = |part: u64, whole: u64| 100.0 * part as f64 / whole.max(1) as f64;
    format!(
        "{:<26} {:6.0} kpkt/CPU-s, {:5.0} ns/packet (threads {:.0} %, NAPI {:.0} %), {:.2} Gbit/s, lost {:.1} %, core {:.0} %, \
         nobody's {:.0} % of it",
        who.name(),
        1e6 / run.ns_per_packet(),
        run.ns_per_packet(),
        percent(cost.threads_ns, cost.total_ns()),
        percent(cost.napi_ns, cost.total_ns()),
        run.bytes as f64 * 8.0 / run.seconds / 1e9,
        run.lost_percent,
        percent(cost.total_ns(), cost.wall_ns),
        percent(cost.unattributed_ns, cost.core_busy_ns),
    )
}
