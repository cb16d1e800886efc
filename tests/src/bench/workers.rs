//! What a packet costs with one worker and with two, all of them busy at once.
//!
//! Each worker is offered the same: two workers get twice as much from as many clients. How much that is, is found out once
//! for each direction, with two workers: nearly all that these cores carry together with the far ends.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};

use super::{
    accounting::{Meter, thread_times},
    crowd::{BYTES, Crowd},
    report::{Run, Spread, WorkerCount, Workers},
    traffic::Direction,
};

/// As many as a home for half of them can be unfair to.
const CLIENTS: usize = 16;
const COUNTS: [usize; 2] = [1, 2];
const DIRECTIONS: [(Direction, &str); 2] =
    [(Direction::Outbound, "UDP outbound"), (Direction::Inbound, "UDP inbound")];

/// Where the search for a rate begins, datagrams a second for two workers.
const FIRST_RATE: u64 = 200_000;
/// What is offered to be carried at most.
const LAST_RATE: u64 = 3_000_000;
const SEARCH_TIME: Duration = Duration::from_secs(1);
/// From here on the search goes in small steps: the end is near.
const BUSY: f64 = 40.0;
/// The search ends where the worker that does least is so busy, per cent of a core: the far ends need some, too.
const BUSY_ENOUGH: f64 = 70.0;
/// A rate is carried if no more is lost and no less is sent, per cent; a run is void if it is not.
const LOST_PERCENT: f64 = 1.0;
const SENT_PERCENT: f64 = 97.0;
/// How often a rate or a run is tried.
const TRIES: u32 = 4;

/// One run: its cost, and per cent of a core of the worker that did least and most.
struct Seen {
    run: Run,
    least: f64,
    most: f64,
}

/// Each round makes everything anew for each number of workers.
///
/// # Errors
/// If something does not come up, or the gateway has another number of workers than asked for.
pub(super) fn measure(directory: &Path, gateway: &Path, rounds: usize, seconds: u32) -> Result<Vec<Workers>> {
    let time = Duration::from_secs(seconds.into());
    let rates = search(directory, gateway, time)?;
    let mut seen: Vec<Vec<Vec<Seen>>> =
        DIRECTIONS.iter().map(|_| COUNTS.iter().map(|_| Vec::new()).collect()).collect();
    for round in 1..=rounds {
        for (nth, workers) in COUNTS.into_iter().enumerate() {
            let folder = directory.join(format!("crowd-{round}-{workers}"));
            let mut crowd = Crowd::start(&folder, gateway, workers, CLIENTS)?;
            for (((direction, name), rate), seen) in DIRECTIONS.iter().zip(&rates).zip(&mut seen) {
                let rate = rate * workers as u64;
                let one = carried(&mut crowd, *direction, rate, time)
                    .with_context(|| format!("{workers} workers, {name}"))?;
                println!("    run {round} of {rounds}: {workers} workers, {name}: {one}");
                seen[nth].push(one);
            }
        }
    }
    Ok(DIRECTIONS.iter().zip(seen).map(|((_, name), seen)| summary(name, seen)).collect())
}

/// What one worker of two can be offered in each direction for `time`, datagrams a second.
fn search(directory: &Path, gateway: &Path, time: Duration) -> Result<Vec<u64>> {
    let workers = COUNTS[COUNTS.len() - 1];
    let mut crowd = Crowd::start(&directory.join("crowd-search"), gateway, workers, CLIENTS)?;
    let of = |(direction, name): &(Direction, &str)| {
        let (mut rate, mut good) = (FIRST_RATE, None);
        while rate <= LAST_RATE {
            let one = carried(&mut crowd, *direction, rate, SEARCH_TIME)?;
            println!("    search: {workers} workers, {name}, {} kpps offered: {one}", rate / 1000);
            if one.run.void {
                break;
            }
            good = Some(rate);
            if one.least > BUSY_ENOUGH {
                break;
            }
            rate = if one.least < BUSY { rate * 5 / 4 } else { rate * 10 / 9 };
        }
        let good = good.with_context(|| format!("{name}: not even {FIRST_RATE} packets a second arrive"))?;
        // Away from the edge, where any disturbance costs packets.
        let mut rate = good * 9 / 10;
        while !lasts(&mut crowd, *direction, rate, time)? && rate > FIRST_RATE / 2 {
            println!("    search: {workers} workers, {name}, {} kpps do not last", rate / 1000);
            rate = rate * 9 / 10;
        }
        Ok(rate / workers as u64)
    };
    DIRECTIONS.iter().map(of).collect()
}

/// Whether a rate is carried for as long as a run takes, every time.
fn lasts(crowd: &mut Crowd, direction: Direction, rate: u64, time: Duration) -> Result<bool> {
    for _ in 0..TRIES / 2 {
        if send(crowd, direction, rate, time)?.run.void {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The first run of several in which what was offered was carried, or a void one: somebody else had the cores.
fn carried(crowd: &mut Crowd, direction: Direction, rate: u64, time: Duration) -> Result<Seen> {
    let mut repeated = 0;
    loop {
        let mut one = send(crowd, direction, rate, time)?;
        one.run.repeated = repeated;
        repeated += 1;
        if !one.run.void || repeated == TRIES {
            return Ok(one);
        }
    }
}

/// All clients at once.
fn send(crowd: &mut Crowd, direction: Direction, rate: u64, time: Duration) -> Result<Seen> {
    crowd.prepare(direction, rate, time)?;
    let pid = crowd.lab.gateway.pid();
    let meter = Meter::new(Some(pid), &crowd.napi);
    let (before, times) = (meter.read()?, thread_times(pid, "worker-"));
    let sent = crowd.send(direction, rate, time)?;
    let cost = before.until(&meter.read()?);
    let after = thread_times(pid, "worker-");
    ensure!(after.len() == times.len(), "a worker has ended");
    ensure!(sent.arrived <= sent.sent, "{} datagrams arrived of {}", sent.arrived, sent.sent);
    ensure!(sent.opened > 0, "none of {} datagrams was looked at", sent.arrived);
    let busy = after.iter().map(|(tid, time)| {
        let ns = time.saturating_sub(times.get(tid).copied().unwrap_or(0));
        100.0 * ns as f64 / (sent.seconds * 1e9)
    });
    let busy: Vec<f64> = busy.collect();
    let lost_percent = 100.0 * (sent.sent - sent.arrived) as f64 / sent.sent.max(1) as f64;
    let sent_percent = 100.0 * sent.sent as f64 / (rate as f64 * sent.seconds);
    let run = Run {
        packets: sent.arrived,
        bytes: sent.arrived * BYTES as u64,
        seconds: sent.seconds,
        lost_percent,
        cost,
        // The gateway has no core of its own here: what else the cores did is the far ends'.
        void: lost_percent > LOST_PERCENT || sent_percent < SENT_PERCENT,
        repeated: 0,
    };
    let least = busy.iter().copied().fold(f64::INFINITY, f64::min);
    let most = busy.iter().copied().fold(0.0, f64::max);
    Ok(Seen { run, least, most })
}

impl std::fmt::Display for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Run { packets, seconds, cost, lost_percent, .. } = &self.run;
        write!(
            f,
            "{:.0} ns/packet, of the workers {:.0}, of NAPI {:.0}; {:.0} kpps, lost {lost_percent:.2} %, workers busy {:.0} to \
             {:.0} %, all cores {:.0} %{}",
            self.run.ns_per_packet(),
            cost.threads_ns as f64 / *packets as f64,
            cost.napi_ns as f64 / *packets as f64,
            *packets as f64 / seconds / 1e3,
            self.least,
            self.most,
            100.0 * cost.machine_busy_ns as f64 / cost.wall_ns as f64,
            if self.run.void { " (void)" } else { "" },
        )
    }
}

fn summary(name: &str, seen: Vec<Vec<Seen>>) -> Workers {
    let count = |(workers, seen): (usize, Vec<Seen>)| {
        let all_void = seen.iter().all(|one| one.run.void);
        let counted = || seen.iter().filter(|one| all_void || !one.run.void);
        let over = |value: &dyn Fn(&Seen) -> f64| Spread::of(counted().map(value).collect());
        WorkerCount {
            workers,
            ns_per_packet: over(&|one| one.run.ns_per_packet()),
            gbit_per_second: over(&|one| one.run.bytes as f64 * 8.0 / one.run.seconds / 1e9),
            least_busy_percent: over(&|one| one.least),
            most_busy_percent: over(&|one| one.most),
            runs: seen.into_iter().map(|one| one.run).collect(),
        }
    };
    Workers {
        name: name.to_owned(),
        clients: CLIENTS,
        counts: COUNTS.into_iter().zip(seen).map(count).collect(),
    }
}
