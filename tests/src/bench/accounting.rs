//! What forwarding cost: CPU time of the gateway's threads, of the NAPI threads of its interfaces, of its core.
//!
//! ```text
//!   core 0: iperf3, client, coturn, LAN, routers and their NAPI threads
//!   core 1: the gateway's threads | NAPI threads of its eth0 and eth1 | ksoftirqd/1        <- the cost
//!           what else the core did                                                        <- unattributed
//! ```
//!
//! Thread times are the scheduler's own (`schedstat`, nanoseconds). This kernel does not account softirqs apart from the
//! thread on whose back they run, so such time is in that thread's already; what a softirq does while the core is idle
//! shows as unattributed.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::report::Cost;
use crate::net::janitor::Janitor;

/// The core that the gateway has for itself.
pub(super) const GATEWAY_CORE: usize = 1;
/// The core that everything else shares.
pub(super) const OTHER_CORE: usize = 0;

/// Where times are read.
pub(super) struct Meter {
    /// The gateway, whatever it is; none for the kernel's own forwarding.
    process: Option<u32>,
    /// NAPI threads of the gateway's interfaces.
    napi: Vec<i32>,
    ksoftirqd: Option<i32>,
}

/// One reading.
pub(super) struct Reading {
    at: Instant,
    threads: BTreeMap<i32, u64>,
    napi: u64,
    ksoftirqd: u64,
    cores: Vec<Ticks>,
    /// What [`GATEWAY_CORE`] has idled, if the kernel says.
    idle: Option<u64>,
}

/// Of one core, in clock ticks.
#[derive(Debug, Clone, Copy, Default)]
struct Ticks {
    total: u64,
    idle: u64,
    irq: u64,
    softirq: u64,
    steal: u64,
}

impl Meter {
    pub(super) fn new(process: Option<u32>, napi: &[i32]) -> Self {
        let name = format!("ksoftirqd/{GATEWAY_CORE}");
        Self {
            process,
            napi: napi.to_vec(),
            ksoftirqd: kernel_threads().into_iter().find(|(_, comm)| *comm == name).map(|(pid, _)| pid),
        }
    }

    pub(super) fn read(&self) -> Result<Reading> {
        Ok(Reading {
            at: Instant::now(),
            threads: self.process.map(|pid| thread_times(pid, "")).unwrap_or_default(),
            napi: self.napi.iter().copied().map(run_time).sum(),
            ksoftirqd: self.ksoftirqd.map_or(0, run_time),
            cores: cores()?,
            idle: idle_time(GATEWAY_CORE),
        })
    }
}

impl Reading {
    /// What happened from `self` to `later`.
    pub(super) fn until(&self, later: &Self) -> Cost {
        let new = |tid| self.threads.get(tid).copied().unwrap_or(0);
        let threads_ns: u64 = later.threads.iter().map(|(tid, time)| time.saturating_sub(new(tid))).sum();
        let napi_ns = later.napi.saturating_sub(self.napi);
        let ksoftirqd_ns = later.ksoftirqd.saturating_sub(self.ksoftirqd);
        let wall = later.at.duration_since(self.at);
        let cores: Vec<Ticks> =
            self.cores.iter().zip(&later.cores).map(|(before, after)| after.since(*before)).collect();
        let own = cores.get(GATEWAY_CORE).copied().unwrap_or_default();
        let wall_ns = nanos(wall);
        let idle_ns = later.idle.zip(self.idle).map(|(after, before)| after.saturating_sub(before));
        let core_busy_ns = idle_ns.map_or(own.busy_ns(), |idle| wall_ns.saturating_sub(idle));
        Cost {
            wall_ns,
            threads_ns,
            napi_ns,
            ksoftirqd_ns,
            softirq_sampled_ns: (own.irq + own.softirq) * tick(),
            core_busy_ns,
            core_steal_ns: own.steal * tick(),
            unattributed_ns: core_busy_ns.saturating_sub(threads_ns + napi_ns + ksoftirqd_ns),
            machine_busy_ns: cores.iter().map(|core| core.busy_ns()).sum(),
        }
    }
}

impl Ticks {
    fn since(self, before: Self) -> Self {
        Self {
            total: self.total.saturating_sub(before.total),
            idle: self.idle.saturating_sub(before.idle),
            irq: self.irq.saturating_sub(before.irq),
            softirq: self.softirq.saturating_sub(before.softirq),
            steal: self.steal.saturating_sub(before.steal),
        }
    }

    fn busy_ns(self) -> u64 {
        self.total.saturating_sub(self.idle + self.steal) * tick()
    }
}

/// Kernel threads: `(pid, name)`. Their command line is empty.
pub(super) fn kernel_threads() -> Vec<(i32, String)> {
    let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.is_empty()))
        .filter_map(|pid| {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
            Some((pid, name.trim_end().to_owned()))
        })
        .collect()
}

/// Times of the threads of a process whose name begins with `prefix`, by thread.
pub(super) fn thread_times(pid: u32, prefix: &str) -> BTreeMap<i32, u64> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let tids = tasks.filter_map(|task| task.file_name().to_str()?.parse::<i32>().ok());
    let named = |tid: &i32| {
        std::fs::read_to_string(format!("/proc/{tid}/comm")).is_ok_and(|name| name.starts_with(prefix))
    };
    tids.filter(named).map(|tid| (tid, run_time(tid))).collect()
}

/// Nanoseconds that a thread has run; 0 for one that has ended.
fn run_time(tid: i32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{tid}/schedstat")).unwrap_or_default();
    text.split_whitespace().next().and_then(|field| field.parse().ok()).unwrap_or(0)
}

/// `/proc/stat`: per core user, nice, system, idle, iowait, irq, softirq, steal.
fn cores() -> Result<Vec<Ticks>> {
    let text = std::fs::read_to_string("/proc/stat")?;
    let of_cores = text.lines().filter(|line| line.starts_with("cpu") && !line.starts_with("cpu "));
    of_cores
        .map(|line| {
            let fields: Vec<u64> =
                line.split_whitespace().skip(1).map(str::parse).collect::<Result<_, _>>()?;
            let field = |index: usize| fields.get(index).copied().unwrap_or(0);
            Ok(Ticks {
                total: (0..8).map(field).sum(),
                idle: field(3) + field(4),
                irq: field(5),
                softirq: field(6),
                steal: field(7),
            })
        })
        .collect()
}

/// Nanoseconds for which a core was idle, as cpuidle has measured them; `None` where there is no cpuidle driver. Ticks are
/// samples, 4 ms apart: of work that timers start they see all or nothing.
fn idle_time(core: usize) -> Option<u64> {
    let states = std::fs::read_dir(format!("/sys/devices/system/cpu/cpu{core}/cpuidle")).ok()?;
    let time = |state: std::fs::DirEntry| -> Option<u64> {
        std::fs::read_to_string(state.path().join("time")).ok()?.trim_end().parse().ok()
    };
    states.flatten().map(|state| time(state).map(|microseconds| microseconds * 1000)).sum()
}

/// Whether more of the core's busy time was nobody's than may be: a twentieth, and 2 % of the core, half of which goes into
/// idling and coming back, which no thread is charged for.
pub(super) fn is_void(cost: &Cost) -> bool {
    cost.unattributed_ns > cost.core_busy_ns / 20 + cost.wall_ns / 50
}

/// Nanoseconds in a tick.
fn tick() -> u64 {
    1_000_000_000 / rustix::param::clock_ticks_per_second()
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Puts a thread, or with 0 the calling one, on one core.
///
/// # Errors
/// If the kernel refuses.
pub(super) fn pin(tid: i32, core: usize) -> Result<()> {
    allow(tid, &[core])
}

/// Lets a thread, or with 0 the calling one, run on these cores.
///
/// # Errors
/// If the kernel refuses.
pub(super) fn allow(tid: i32, on: &[usize]) -> Result<()> {
    let mut cores = rustix::thread::CpuSet::new();
    on.iter().for_each(|&core| cores.set(core));
    rustix::thread::sched_setaffinity(rustix::process::Pid::from_raw(tid), &cores)
        .with_context(|| format!("cannot put thread {tid} on {on:?}"))
}

/// Lets a thread, or with 0 the calling one and all that it starts, go before everything that has the usual niceness.
///
/// # Errors
/// If the kernel refuses.
pub(super) fn prefer(tid: i32) -> Result<()> {
    rustix::process::setpriority_process(rustix::process::Pid::from_raw(tid), -20)
        .with_context(|| format!("cannot raise the priority of thread {tid}"))
}

/// From now on, until this run is over, this session goes before other ones, and behind the kernel's NAPI threads, which are in
/// no session: a flooder of equal rank would starve the routers. With CONFIG_SCHED_AUTOGROUP niceness counts within a session
/// only, and a compiler in another one would get as much as the whole benchmark (sched(7), "The autogroup feature"). Left
/// raised, it would let whatever the session does next starve softirqs.
///
/// # Errors
/// If nobody could put it back.
pub(super) fn prefer_session(janitor: &mut Janitor) -> Result<()> {
    const FILE: &str = "/proc/self/autogroup";
    /// Nine times a usual session's weight, a ninth of a NAPI thread's.
    const NICE: &str = "-10";
    // /autogroup-415 nice 0, or nothing where there are no autogroups.
    let text = std::fs::read_to_string(FILE).unwrap_or_default();
    if let Some((_, nice)) = text.trim_end().rsplit_once("nice ") {
        janitor.put_back(FILE, nice)?;
        let _may_be_refused = std::fs::write(FILE, NICE);
    }
    Ok(())
}

/// While it lives, an idle core polls for work instead of halting, as bare metal does that is tuned for latency (tuned's
/// `network-latency` profile asks for it in the same way). In a virtual machine waking a halted core is an exit to the
/// hypervisor of 10 to 20 us, which whoever sends the packet pays: the far ends' wake-up would be most of a gateway's cost.
pub(super) struct Awake {
    /// The kernel takes the wish back when it is closed (Documentation/power/pm_qos_interface.rst).
    _wish: std::fs::File,
}

impl Awake {
    const FILE: &str = "/dev/cpu_dma_latency";

    /// # Errors
    /// If the kernel has no such interface, or does not let this process use it.
    pub(super) fn new() -> Result<Self> {
        let ask = || -> std::io::Result<_> {
            let mut wish = std::fs::OpenOptions::new().write(true).open(Self::FILE)?;
            std::io::Write::write_all(&mut wish, &0_i32.to_ne_bytes())?;
            Ok(wish)
        };
        Ok(Self { _wish: ask().with_context(|| format!("{}: idle cores halt", Self::FILE))? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_twentieth_of_the_busy_time_may_be_nobodys() {
        let (core_busy_ns, wall_ns) = (1_000_000_000, 2_000_000_000);
        let cost = |unattributed_ns| Cost { core_busy_ns, wall_ns, unattributed_ns, ..Cost::default() };
        assert!(!is_void(&cost(50_000_000 + 40_000_000)));
        assert!(is_void(&cost(50_000_001 + 40_000_000)));
    }

    #[test]
    fn what_this_thread_burns_is_counted() {
        let meter = Meter::new(Some(std::process::id()), &[]);
        let before = meter.read().unwrap();
        let end = Instant::now() + Duration::from_millis(100);
        let mut x = 0_u64;
        while Instant::now() < end {
            x = std::hint::black_box(x + 1);
        }
        let cost = before.until(&meter.read().unwrap());
        // Others may have had the core for part of the time.
        assert!(cost.threads_ns > 10_000_000, "{cost:?}");
        assert!(cost.wall_ns >= 100_000_000, "{cost:?}");
    }
}
