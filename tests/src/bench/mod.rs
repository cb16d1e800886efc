//! `gateway-tests bench`: the gateway beside plain WireGuard servers and the bare kernel, on one machine in one run.
//!
//! ```text
//!   bed: topology, contenders -- rows: what, whose turn -- traffic: iperf3, one run -- accounting: what it cost
//!                                                             report: results.json -- markdown: README.md
//! ```

mod accounting;
mod aead;
mod bed;
mod burst;
mod crowd;
mod flood;
mod markdown;
mod peers;
mod report;
mod rows;
mod traffic;
mod workers;

use std::{path::Path, path::PathBuf, process::Command, process::ExitCode};

use anyhow::{Context as _, Result, ensure};

use self::{
    accounting::OTHER_CORE,
    bed::{Bed, Who},
    report::{About, Results},
    rows::Effort,
};
use crate::{
    net::{
        janitor::{self, Janitor},
        process::Logs,
        services,
    },
    scenario,
};

/// Programs that the benchmark needs besides those of the scenarios, with the Debian package of each.
const PROGRAMS: &[(&str, &str)] = &[
    ("ethtool", "ethtool"),
    ("taskset", "util-linux"),
    ("unshare", "util-linux"),
    ("wg", "wireguard-tools"),
    ("wireguard-go", "wireguard-go"),
];

/// `gateway-tests bench`.
#[derive(Debug, Clone, clap::Args)]
pub struct Arguments {
    /// Fewer and shorter runs.
    #[arg(long)]
    pub quick: bool,
    /// Only rows whose name contains this, `aead`, `flood` or `workers`; nothing is written.
    #[arg(long)]
    pub only: Option<String>,
    /// One run of one row, to see that the benchmark itself works; nothing is written.
    #[arg(long)]
    pub smoke: bool,
    /// The daemon; by default `firezone-gateway` beside this program.
    #[arg(long)]
    pub gateway: Option<PathBuf>,
}

impl Arguments {
    fn effort(&self) -> Effort {
        match (self.smoke, self.quick) {
            (true, _) => Effort { rounds: 1, seconds: 1, repeats: 0 },
            (_, true) => Effort { rounds: 3, seconds: 1, repeats: 10 },
            _ => Effort { rounds: 5, seconds: 2, repeats: 40 },
        }
    }

    fn mode(&self) -> &'static str {
        if self.quick { "quick" } else { "full" }
    }
}

/// Measures all rows that are asked for; of all rows, writes `bench/results.json` and README.md's tables.
///
/// # Errors
/// If this machine cannot run it or something does not come up; everything is removed in any case.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    if let Some(reason) = scenario::cannot_run() {
        anyhow::bail!("the benchmark cannot run here: {reason}");
    }
    let missing = services::missing_of(PROGRAMS);
    ensure!(missing.is_empty(), "these programs are not installed: {}", missing.join(", "));
    let cores = std::thread::available_parallelism()?.get();
    ensure!(
        cores > 1,
        "the gateway needs a core of its own, and something must send: one core is not enough"
    );
    let mut janitor = Janitor::start()?;
    // Before any thread or process is started: they inherit it.
    accounting::pin(0, OTHER_CORE)?;
    accounting::prefer(0)?;
    accounting::prefer_session(&mut janitor)?;
    let awake = accounting::Awake::new();
    let directory = janitor::directory(std::process::id());
    let refused = awake.as_ref().err().map(|error| format!("{error:#}"));
    let result = measure(arguments, cores, &directory, refused);
    if result.is_err() {
        print!("{}", Logs::new(directory.clone())?.tails(15));
        println!("logs in {}", directory.display());
        janitor::keep(&directory);
    } else {
        let _ = std::fs::remove_dir_all(&directory);
    }
    drop(janitor);
    result.map(|()| ExitCode::SUCCESS)
}

fn measure(arguments: &Arguments, cores: usize, directory: &Path, refused: Option<String>) -> Result<()> {
    let mut plans = rows::all();
    let mut tasks = [Who::Counting, Who::Named].map(|who| (who, rows::tasks(who)));
    if let Some(only) = &arguments.only {
        plans.retain(|plan| plan.name().contains(only.as_str()));
        for (_, tasks) in &mut tasks {
            tasks.retain(|plan| plan.name().contains(only.as_str()));
        }
    }
    if arguments.smoke {
        plans.truncate(1);
        tasks.iter_mut().for_each(|(_, tasks)| tasks.truncate(usize::from(plans.is_empty())));
    }
    let effort = arguments.effort();
    println!("making a small internet, the gateway, its peers and their clients");
    let mut bed = Bed::start(directory, &scenario::gateway_path(arguments.gateway.as_deref()))?;
    bed.notes.extend(refused);
    for note in &bed.notes {
        println!("note: {note}");
    }
    let asked = |name: &str| match &arguments.only {
        Some(only) => name.contains(only.as_str()),
        None => !arguments.smoke,
    };
    let rows = rows::measure(&bed, &plans, effort)?;
    let mut task_rows = Vec::new();
    for (who, plans) in tasks.iter().filter(|(_, plans)| !plans.is_empty()) {
        if *who == Who::Named {
            bed.assign_name()?;
        }
        task_rows.extend(rows::measure(&bed, plans, effort)?);
        if *who == Who::Counting {
            // One for each beginning at least.
            let records = bed.records().context("flow logs")?;
            println!("    {records} records of flows");
            ensure!(records >= plans.len() * effort.rounds, "only {records} records of flows");
        }
    }
    for row in rows.iter().chain(&task_rows) {
        let ours = &row.contenders[0].summary;
        ensure!(ours.ns_per_packet.median > 0.0, "{}: no cost was measured", row.name);
    }
    let everything = arguments.only.is_none() && !arguments.smoke;
    let aead = if asked("aead") { aead::measure()? } else { Vec::new() };
    let rounds = effort.rounds.min(3);
    // What was measured before is not lost to what fails after it.
    let mut failures = Vec::new();
    let mut kept = |what: &str, error| failures.push(format!("{what} could not be measured: {error:#}"));
    let mut floods = Vec::new();
    if asked("flood") {
        println!("a session during floods");
        let seen = flood::measure(&mut bed, rounds, effort.seconds + 1);
        floods = seen.map_err(|error| kept("floods", error)).unwrap_or_default();
    }
    let mut notes = bed.notes.clone();
    // The next topology has the same names.
    drop(bed);
    let mut workers = Vec::new();
    if asked("workers") {
        println!("one worker and two");
        let gateway = scenario::gateway_path(arguments.gateway.as_deref());
        let seen = workers::measure(directory, &gateway, rounds, effort.seconds + 1);
        workers = seen.map_err(|error| kept("several workers", error)).unwrap_or_default();
    }
    notes.extend(failures.iter().cloned());
    notes.extend(NOTES.iter().map(|&note| note.to_owned()));
    let about = about(arguments, cores, effort)?;
    let results = Results { about, notes, rows, tasks: task_rows, aead, workers, floods };
    println!("\n{}", markdown::render(&results));
    if everything {
        markdown::save(&results)?;
    }
    ensure!(failures.is_empty(), "{}", failures.join("; "));
    Ok(())
}

/// What is true of every run.
const NOTES: &[&str] = &[
    "Cost: CPU time of the gateway's threads, of the NAPI threads of both its interfaces and of its core's ksoftirqd, by \
     the scheduler's clock. Gateway and NAPI threads have core 1; client, relay, routers, LAN host and iperf3 have core \
     0, which is what limits the throughput. All of them run at niceness -20. A run in which more than 5 % of core 1's \
     busy time and 2 % of its time are nobody's is repeated, and marked void if that does not help; what goes into idling \
     and coming back is, about 1 %.",
    "A packet is an inner packet that arrived: a UDP datagram of 1200 bytes, or 1228 bytes of TCP payload (one MTU); TCP's \
     acknowledgements cost, and are not counted.",
    "Offloads on: UDP super-packets cross the links whole; TCP towards the gateway comes in single frames that its GRO \
     merges, as from a NIC (a veth has NAPI only then); the gateway's interfaces merge UDP that is to be forwarded \
     (rx-udp-gro-forwarding). Offloads off: every frame holds one packet, both ways; GRO stays on.",
    "The gateway's interfaces moderate interrupts as NICs do: their NAPI threads look every 50 us while packets come. Idle cores \
     poll instead of halting: waking a halted core of a virtual machine costs whoever sends it a packet 10 to 20 us, a far end's \
     wake-up would be a third of a gateway's cost.",
    "The WireGuard servers decrypt, check the source address and forward, for the same client code; they have no policy, \
     no ICE and no relays. Conntrack and masquerade are in everybody's way.",
    "UDP without bursts is one datagram a system call: 25 us apart at 400 Mbit/s, about two for each look of NAPI. At 200 Mbit/s \
     there is one, and no offload has anything to do: the kernel's routing of that one packet and the wake-up are the same for \
     everybody, half of our cost, and bound the ratio. Bursts of 10 datagrams a call are what QUIC stacks send.",
    "Further tasks: the same process, in turns with itself, first one way, then the other. Flows counted: the portal wants flow logs, or does not; records are kept \
     on disk, and none is uploaded. DNS resource: what is sent to a proxy address, translated, beside what is sent to the same \
     host by its own address.",
    "Relayed rows have no peer (a plain WireGuard server speaks no TURN); coturn, on core 0 with the clients, bounds their \
     throughput, and sends every datagram by a call of its own.",
    "Several workers: each worker has a core and the same load, 16 clients together, in bursts of 32 datagrams of 1200 bytes; \
     how much is what two workers were found to carry, less a tenth or more. Far ends and NAPI threads (those of the gateway count) \
     share both cores with the workers, so a worker cannot have all of its own. Clients encrypt before \
     the measured time and decrypt a sample. Floods: one flooder sends single datagrams as fast as core 0 lets it, from one address; goodput is 100 Mbit/s of UDP \
     through an established session.",
];

fn about(arguments: &Arguments, cores: usize, effort: Effort) -> Result<About> {
    let cpu = std::fs::read_to_string("/proc/cpuinfo")?;
    let name = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let said = |program: &str, words: &[&str]| -> Result<String> {
        let output = Command::new(program).args(words).current_dir(markdown::root()).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let commit = said("git", &["rev-parse", "--short", "HEAD"])?;
    let changed = !said("git", &["status", "--porcelain"])?.is_empty();
    Ok(About {
        machine: name.trim_start_matches([' ', '\t', ':']).to_owned(),
        cores,
        kernel: kernel.trim().to_owned(),
        commit: if changed { format!("{commit}+") } else { commit },
        date: said("date", &["-u", "+%Y-%m-%d"])?,
        mode: arguments.mode().to_owned(),
        rounds: effort.rounds,
        seconds: effort.seconds,
    })
}
