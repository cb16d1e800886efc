//! The runner: one table of scenarios, run one after the other or a few at once ([`pool`]), each in a topology of its own.
//!
//! A scenario is a plain function. It runs on a thread of its own, so that its time bound also ends one that hangs; its
//! processes die with that thread. After each scenario nothing may be left.

mod access;
mod capture;
mod checksums;
mod churn;
pub mod client;
mod crowd;
pub(crate) mod dns;
mod fast_faults;
mod fast_floods;
mod fast_path;
mod firewall;
mod floods;
mod flow_ends;
mod flow_logs;
mod flow_spool;
mod hostile_names;
pub mod lab;
mod links;
mod metrics;
pub(crate) mod names;
mod network;
mod operator;
mod paths;
mod pool;
mod relays;
mod resources;
pub mod rest;
mod script;
mod start;
pub mod swarm;
mod table;
pub mod transfers;
mod translation;
mod trouble;

use std::{
    path::PathBuf,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow};

use crate::net::{
    janitor::{self, Janitor},
    netns,
    process::{self, Logs},
    services::{self, BigFile},
    topology::{Plan, Topology},
};

/// One line of the table.
pub struct Scenario {
    /// What must hold, as a sentence.
    pub name: &'static str,
    /// Where it happens.
    pub plan: fn() -> Plan,
    /// It has failed if it takes longer.
    pub limit: Duration,
    /// The scenario itself.
    pub run: fn(&mut Context) -> Result<()>,
    /// It is one of the few that together exercise the whole data plane.
    pub core: bool,
    /// What it shows does not depend on the number of workers (the test network itself, the portal, the start), or it is
    /// long: enough to see it once.
    pub once: bool,
    /// It measures time or throughput, or it fills the machine: no other one beside it.
    pub alone: bool,
}

/// How every daemon is started, besides what its scenario says.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Variation {
    /// Workers of the gateway; by default as many as it chooses.
    #[arg(long)]
    pub workers: Option<usize>,
    /// What of the kernel the gateway does without: words of FIREZONE_DISABLE, separated by commas.
    #[arg(long, default_value = "")]
    pub disable: String,
    /// How the gateway's datagrams pass the socket layer by: `--fast-path` of the gateway. With anything but auto and off,
    /// each scenario must show that they did.
    #[arg(long, default_value = "auto")]
    pub fast_path: String,
    /// IPv6 on the internet besides IPv4, wherever a scenario does not say so itself: paths without NAT are over IPv6 then.
    #[arg(long)]
    pub internet_v6: bool,
}

impl Variation {
    /// Whether it is about what the kernel does for the gateway.
    pub fn is_kernel_varied(&self) -> bool {
        !self.disable.is_empty() || self.is_fast()
    }

    /// The variables that say so.
    pub fn environment(&self) -> Vec<(String, String)> {
        let workers = self.workers.map(|workers| ("FIREZONE_WORKERS".to_owned(), workers.to_string()));
        let disable =
            (!self.disable.is_empty()).then(|| ("FIREZONE_DISABLE".to_owned(), self.disable.clone()));
        let fast_path =
            (!self.fast_path.is_empty()).then(|| ("FIREZONE_FAST_PATH".to_owned(), self.fast_path.clone()));
        // Not where a gateway of this machine may have its own: no bpffs, so that nothing is pinned.
        let bpffs = janitor::directory(std::process::id()).join("bpffs").display().to_string();
        let bpffs = ("FIREZONE_BPFFS".to_owned(), bpffs);
        workers.into_iter().chain(disable).chain(fast_path).chain([bpffs]).collect()
    }

    /// Whether the gateway must take the fast path.
    pub fn is_fast(&self) -> bool {
        !matches!(&*self.fast_path, "" | "off" | "auto")
    }
}

/// What a scenario gets.
pub struct Context {
    /// The small internet.
    pub topology: Topology,
    /// Output of its processes.
    pub logs: Logs,
    /// The daemon.
    pub gateway: PathBuf,
    /// What transfers carry.
    pub big: BigFile,
    /// How the daemon is started.
    pub variation: Variation,
}

/// `gateway-tests scenarios`.
#[derive(Debug, Clone, clap::Args)]
pub struct Arguments {
    /// Only scenarios whose name contains this.
    #[arg(long)]
    pub filter: Option<String>,
    /// Only the scenario of this name: what `--jobs` starts its processes with.
    #[arg(long, hide = true)]
    pub exactly: Option<String>,
    /// The folder that has the big file already.
    #[arg(long, hide = true)]
    pub big: Option<PathBuf>,
    /// How many scenarios run at once, those excepted that must be alone.
    #[arg(long, default_value_t = 1)]
    pub jobs: usize,
    /// Print the names and end.
    #[arg(long)]
    pub list: bool,
    /// Print the logs of scenarios that pass, too.
    #[arg(long)]
    pub verbose: bool,
    /// The daemon; by default `firezone-gateway` beside this program.
    #[arg(long)]
    pub gateway: Option<PathBuf>,
    /// Only the core list: the few scenarios that together exercise the whole data plane.
    #[arg(long)]
    pub core: bool,
    /// Keep every core busy meanwhile, at the lowest priority: nothing may depend on an idle machine.
    #[arg(long)]
    pub load: bool,
    /// Without what a run with another number of workers has shown.
    #[arg(long)]
    pub again: bool,
    /// How the daemon is started.
    #[command(flatten)]
    pub variation: Variation,
}

/// Threads that never sleep, as long as this value lives.
struct Load(Arc<AtomicBool>);

impl Load {
    fn start() -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        for _ in 0..std::thread::available_parallelism()?.get() {
            let stop = Arc::clone(&stop);
            std::thread::Builder::new().name("load".to_owned()).spawn(move || {
                // On Linux the niceness is the thread's own. Without it the load is only heavier.
                let _nicer = rustix::process::nice(19);
                while !stop.load(Ordering::Relaxed) {
                    std::hint::black_box((0..100_000_u64).fold(0, u64::wrapping_add));
                }
            })?;
        }
        Ok(Self(stop))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The reason why a scenario cannot run on this machine.
#[derive(Debug)]
pub struct Skip(pub String);

impl std::fmt::Display for Skip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// Runs what the arguments select and prints `N passed, N failed, N skipped`.
///
/// # Errors
/// If the run itself cannot be set up; a failing scenario is an exit code.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let selected: Vec<&'static Scenario> = table::SCENARIOS
        .iter()
        .filter(|scenario| arguments.filter.as_deref().is_none_or(|filter| scenario.name.contains(filter)))
        .filter(|scenario| arguments.exactly.as_deref().is_none_or(|name| scenario.name == name))
        .filter(|scenario| scenario.core || !arguments.core)
        .filter(|scenario| !(scenario.once && arguments.again))
        .collect();
    if arguments.list {
        for scenario in &selected {
            println!("{} [{}, at most {:?}]", scenario.name, (scenario.plan)().name, scenario.limit);
        }
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(reason) = cannot_run() {
        for scenario in &selected {
            println!("skip  {}: {reason}", scenario.name);
        }
        println!("\n0 passed, 0 failed, {} skipped", selected.len());
        return Ok(ExitCode::SUCCESS);
    }
    if arguments.jobs > 1 && selected.len() > 1 {
        return pool::run(arguments, &selected);
    }
    let gateway = gateway_path(arguments.gateway.as_deref());
    let janitor = Janitor::start()?;
    let directory = janitor::directory(std::process::id());
    let big = BigFile::make(arguments.big.as_ref().unwrap_or(&directory))?;
    let _load = arguments.load.then(Load::start).transpose()?;
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for (index, scenario) in selected.iter().enumerate() {
        let logs = directory.join(format!("{index:02}"));
        let started = Instant::now();
        let mut result = run_one(scenario, &logs, &gateway, &big, &arguments.variation);
        janitor::park_if_interrupted();
        let left = leftovers(&janitor);
        if let (Ok(()), Some(left)) = (&result, left) {
            result = Err(anyhow!("it left behind: {left}"));
        }
        let took = started.elapsed().as_secs_f64();
        match result {
            Ok(()) => {
                passed += 1;
                println!("ok    {} ({took:.1} s)", scenario.name);
                if arguments.verbose {
                    print!("{}", Logs::new(logs)?.tails(40));
                }
            }
            Err(error) if error.is::<Skip>() => {
                skipped += 1;
                println!("skip  {}: {error}", scenario.name);
            }
            Err(error) => {
                failed += 1;
                println!("FAIL  {} ({took:.1} s): {error:#}", scenario.name);
                println!("    logs in {}", logs.display());
                print!("{}", Logs::new(logs)?.tails(25));
                janitor::keep(&directory);
            }
        }
    }
    if failed == 0 && !arguments.verbose {
        let _ = std::fs::remove_dir_all(&directory);
    }
    println!("\n{passed} passed, {failed} failed, {skipped} skipped");
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The daemon to test: what was asked for, or what stands beside this program.
pub fn gateway_path(asked: Option<&std::path::Path>) -> PathBuf {
    asked.map(std::path::Path::to_path_buf).unwrap_or_else(|| {
        let here = std::env::current_exe().unwrap_or_default();
        here.with_file_name("firezone-gateway")
    })
}

/// Why no scenario can run on this machine, if so.
pub fn cannot_run() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("needs root, to make network namespaces".to_owned());
    }
    let missing = services::missing_programs();
    (!missing.is_empty()).then(|| format!("these programs are not installed: {}", missing.join(", ")))
}

fn run_one(
    scenario: &Scenario,
    logs: &std::path::Path,
    gateway: &std::path::Path,
    big: &BigFile,
    variation: &Variation,
) -> Result<()> {
    let (sender, receiver) = mpsc::channel();
    let (plan, run) = (scenario.plan, scenario.run);
    let (logs, gateway, big) = (logs.to_path_buf(), gateway.to_path_buf(), big.clone());
    let variation = variation.clone();
    let thread = std::thread::Builder::new().name("scenario".to_owned()).spawn(move || {
        let result = (|| {
            let plan = plan();
            let internet_v6 = plan.internet_v6 || variation.internet_v6;
            let topology = Topology::build(Plan { internet_v6, ..plan })?;
            if variation.is_fast() {
                fast_path::prepare(&topology)?;
            }
            let mut context = Context { topology, logs: Logs::new(logs)?, gateway, big, variation };
            run(&mut context)
        })();
        let _nobody_waits_after_the_limit = sender.send(result);
    })?;
    match receiver.recv_timeout(scenario.limit) {
        Ok(result) => {
            // The answer is sent before the thread is gone, and its guards with it.
            let _the_answer_counts = thread.join();
            result
        }
        Err(mpsc::RecvTimeoutError::Timeout) => {
            netns::remove_run(std::process::id());
            // Without its processes the thread soon finds its end; its guards must not meet the next scenario's names.
            let patience = Instant::now() + Duration::from_secs(30);
            while !thread.is_finished() && Instant::now() < patience {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(anyhow!("it took longer than its bound of {:?}", scenario.limit))
        }
        Err(mpsc::RecvTimeoutError::Disconnected) => {
            let panic = thread.join().err();
            let text = panic.as_ref().and_then(|panic| {
                panic
                    .downcast_ref::<String>()
                    .map(String::as_str)
                    .or_else(|| panic.downcast_ref::<&str>().copied())
            });
            Err(anyhow!("it panicked: {}", text.unwrap_or("without a message")))
        }
    }
}

/// Namespaces, their inhabitants and child processes that outlived a scenario; they are removed.
fn leftovers(janitor: &Janitor) -> Option<String> {
    let namespaces = netns::of_run(std::process::id());
    let children: Vec<_> = process::children().into_iter().filter(|(pid, _)| *pid != janitor.pid()).collect();
    if namespaces.is_empty() && children.is_empty() {
        return None;
    }
    netns::remove_run(std::process::id());
    Some(format!("namespaces {namespaces:?}, processes {children:?}"))
}
