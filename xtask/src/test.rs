//! `cargo xtask test`: everything CI runs, step by step, and one closing line that sums it up.
//!
//! A step that cannot run is counted as skipped and says why; a step whose foundation failed likewise. Nothing here
//! knows what is tested: a step is a command, and [`tally`] counts what it reports.

use std::{
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use anyhow::Result;

use crate::{
    build_ebpf,
    portable::{self, Compiler},
    release, run, setup,
    tally::{self, Tally},
    tidy,
};

/// Arguments of `cargo xtask test`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// A debug build, and no scenarios.
    #[arg(long)]
    quick: bool,
    /// Every scenario in every way of the fast path, instead of the core scenarios in a few: about an hour more.
    #[arg(long, conflicts_with = "quick")]
    all: bool,
    /// Only tests and scenarios whose name contains this; the checks of the source are left out.
    filter: Option<String>,
}

/// Tests of the compiled BPF object; the name is how they start. They run in a step of their own.
const BPF_TESTS: &str = "bpf::tests::";

/// How many workers the gateway has in the runs of all scenarios: none to share with, one for each of two cores, and
/// more than there are cores. The last shows that nothing depends on an idle machine.
const WORKERS: [(&[&str], &str); 4] = [
    (&["--workers", "2"], "network scenarios, two workers"),
    (&["--workers", "1", "--again"], "network scenarios, one worker"),
    (&["--workers", "4", "--again"], "network scenarios, four workers"),
    (&["--core", "--workers", "4", "--load"], "core scenarios, four workers, every core busy"),
];

/// How many scenarios run at once: on two cores three take half the time of one after the other, and load them less than
/// half. Those that measure something run alone anyway.
const SIDE_BY_SIDE: &str = "3";

/// Words of FIREZONE_DISABLE, one or several for each run of the core scenarios. Without both kinds of steering there is
/// nothing left that needs CAP_BPF, so that is what a gateway with CAP_NET_ADMIN alone does.
const DISABLED: [&str; 8] = [
    "tun-offload",
    "tun-uso",
    "udp-gro",
    "udp-gso",
    "sendmmsg",
    "reuseport-steering",
    "tun-steering",
    "reuseport-steering,tun-steering",
];

/// With the fast path forced, offloads of the uplink off: how it is attached, workers, the paths' address family. The kernel
/// must say of each scenario that packets took it.
struct Fast(&'static str, &'static str, Family);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    /// IPv4 alone.
    V4,
    /// Both; paths are over IPv6.
    V6,
}

/// Each pair of two of the three is in one of them.
const FAST_PAIRS: [Fast; 6] = [
    Fast("native", "2", Family::V4),
    Fast("native", "1", Family::V6),
    Fast("native", "4", Family::V6),
    Fast("generic", "2", Family::V6),
    Fast("generic", "1", Family::V4),
    Fast("generic", "4", Family::V4),
];

impl Fast {
    /// All of them.
    fn matrix() -> Vec<Self> {
        let mut all = Vec::new();
        for mode in ["native", "generic"] {
            for workers in ["2", "1", "4"] {
                all.extend([Family::V4, Family::V6].map(|family| Self(mode, workers, family)));
            }
        }
        all
    }
}

/// What a step came to.
enum Outcome {
    /// It ran; the counts of what it ran.
    Ran(Tally),
    /// It could not run, for this reason.
    Skipped(String),
}

/// Runs the steps and prints `N passed, N failed, N skipped` last; the exit code is 1 if anything failed.
///
/// # Errors
/// None of a step's failures is an error of the run.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let mut session = Session::new(arguments);
    let filter = arguments.filter.as_deref();

    let ready = session.step("setup", |_| succeeded(setup::install()));
    let object = session.step("build-ebpf", |_| succeeded(build_ebpf::build(false).map(drop)));
    if filter.is_none() {
        session.step("formatting", |_| formatting());
        session.step("clippy", |_| clippy());
        session.step("clippy of gateway-ebpf", |_| clippy_ebpf());
        session.step("licences, bans and sources of dependencies", |_| deny());
        session.step("advisories about dependencies", |_| advisories());
        session.step("tidy", |_| Ok(Outcome::Ran(tidy::check())));
        session.step("everything compiles for aarch64", |_| aarch64());
    } else {
        println!("\nThe checks of the source are left out, because a filter was given.");
    }
    session.step("unit tests", |session| session.unit_tests());
    session.step("core model tests, with a fake clock", |session| session.model_tests());
    session.step("BPF object in the kernel", |session| session.bpf_tests(object));
    for (variation, name) in WORKERS {
        session.step(name, |session| session.scenarios(ready, variation));
    }
    match arguments.all {
        false => session.step("core scenarios, fast path forced", |session| {
            session.fast_path(ready, object, &FAST_PAIRS, &["--core"])
        }),
        true => session.step("every scenario, fast path forced in every way", |session| {
            session.fast_path(ready, object, &Fast::matrix(), &[])
        }),
    };
    if filter.is_none() {
        session.step("core scenarios, each capability of the kernel off", |session| {
            session.without_each_capability(ready)
        });
    }
    session.step("demo", |session| session.demo(ready));
    session.step("benchmark, one run", |session| session.bench(ready));
    if filter.is_none() {
        session.step("static build, and a client that reaches a LAN through it", |session| {
            session.static_build(ready, object)
        });
    }
    Ok(session.close())
}

/// The run so far.
struct Session<'a> {
    arguments: &'a Arguments,
    started: Instant,
    steps: usize,
    sum: Tally,
    notes: Vec<String>,
}

impl<'a> Session<'a> {
    fn new(arguments: &'a Arguments) -> Self {
        Self { arguments, started: Instant::now(), steps: 0, sum: Tally::default(), notes: Vec::new() }
    }

    /// Runs one step, prints how it went and adds it up; true unless something in it failed or it was skipped.
    fn step(&mut self, name: &str, work: impl FnOnce(&Self) -> Result<Outcome>) -> bool {
        const STEPS: [usize; 2] = [21, 12];
        self.steps += 1;
        let of = STEPS[usize::from(self.arguments.filter.is_some())];
        println!("\n[{:>2}/{of}] {name} (at {})", self.steps, seconds(self.started.elapsed()));
        let started = Instant::now();
        let outcome = work(self);
        let took = seconds(started.elapsed());
        let tally = match outcome {
            Ok(Outcome::Ran(tally)) => tally,
            Ok(Outcome::Skipped(reason)) => Tally::skip(reason),
            Err(error) => {
                println!("        {error:#}");
                Tally { failed: 1, ..Tally::default() }
            }
        };
        let word = match (tally.failed, tally.passed) {
            (0, 0) if tally.skipped > 0 => "skipped",
            (0, _) => "ok",
            _ => "FAILED",
        };
        println!("        {word}: {tally} ({took})");
        for reason in &tally.reasons {
            println!("        skipped: {reason}");
        }
        self.notes.extend(tally.reasons.iter().map(|reason| format!("skipped in `{name}`: {reason}")));
        if tally.failed > 0 {
            self.notes.push(format!("FAILED: {name} ({} of it)", tally.failed));
            self.notes.extend(tally.failures.iter().map(|failure| format!("  {failure}")));
        }
        let fine = tally.failed == 0 && tally.passed > 0;
        self.sum.add(&tally);
        fine
    }

    fn close(self) -> ExitCode {
        println!("\nAll steps took {}.", seconds(self.started.elapsed()));
        for note in &self.notes {
            println!("  {note}");
        }
        println!("{}", self.sum);
        if self.sum.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }

    fn unit_tests(&self) -> Result<Outcome> {
        let mut cargo = run::cargo();
        cargo.args(["test", "--workspace", "--no-fail-fast", "--"]).args(&self.arguments.filter);
        Ok(Outcome::Ran(tally::run(cargo.args(["--skip", BPF_TESTS]))?))
    }

    fn model_tests(&self) -> Result<Outcome> {
        let mut cargo = run::cargo();
        cargo.args(["test", "-p", "gateway-proto", "--features", "mock-instant", "--no-fail-fast"]);
        // A folder of its own, or each of the two builds would throw the other one's dependencies away. One thread,
        // because boringtun's fake clock is one for the process.
        cargo.arg("--target-dir").arg(run::target().join("mock"));
        // Random walks of minutes otherwise; what is checked at run time in a debug build still is.
        cargo.env("CARGO_PROFILE_DEV_OPT_LEVEL", "1");
        cargo.arg("--").args(&self.arguments.filter).arg("--test-threads=1");
        Ok(Outcome::Ran(tally::run(&mut cargo)?))
    }

    fn bpf_tests(&self, object: bool) -> Result<Outcome> {
        if !object {
            return Ok(Outcome::Skipped("the BPF object was not built".into()));
        }
        if !run::is_root() {
            return Ok(Outcome::Skipped("loading BPF programs and making namespaces needs root".into()));
        }
        let mut cargo = run::cargo();
        // The whole workspace, though only the daemon has such tests: for it alone cargo would choose other features
        // of the dependencies and build them all again.
        cargo.args(["test", "--workspace", "--no-fail-fast", "--", "--ignored", "--test-threads=1"]);
        match &self.arguments.filter {
            None => cargo.arg(BPF_TESTS),
            Some(filter) if "bpf".contains(filter.as_str()) || filter.contains("bpf") => cargo.arg(BPF_TESTS),
            Some(_) => return Ok(Outcome::Skipped("the filter leaves them out".into())),
        };
        Ok(Outcome::Ran(tally::run(&mut cargo)?))
    }

    fn scenarios(&self, ready: bool, variation: &[&str]) -> Result<Outcome> {
        if let Some(reason) = self.no_network(ready) {
            return Ok(Outcome::Skipped(reason.into()));
        }
        build_release()?;
        let mut scenarios = run::command(run::target().join("release/gateway-tests"));
        scenarios.arg("scenarios").args(variation).args(["--jobs", SIDE_BY_SIDE]);
        if let Some(filter) = &self.arguments.filter {
            scenarios.arg("--filter").arg(filter);
        }
        Ok(Outcome::Ran(tally::run(&mut scenarios)?))
    }

    /// The scenarios of `list` once for each of `ways`; what does not depend on the workers runs with the first.
    fn fast_path(&self, ready: bool, object: bool, ways: &[Fast], list: &[&str]) -> Result<Outcome> {
        if !object {
            return Ok(Outcome::Skipped("the BPF object was not built".into()));
        }
        let runs = ways.iter().enumerate().map(|(index, Fast(mode, workers, family))| {
            let (family, name) = match family {
                Family::V4 => (None, "IPv4"),
                Family::V6 => (Some("--internet-v6"), "IPv6"),
            };
            let again = (index > 0).then_some("--again");
            let mut variation = vec!["--fast-path", *mode, "--workers", *workers];
            variation.extend(list.iter().copied().chain(family).chain(again));
            (format!("{mode}, {workers} workers, {name}"), variation)
        });
        self.variations(ready, runs)
    }

    /// What every kernel has that lacks one of them, or an operator who turned it off, lives with.
    fn without_each_capability(&self, ready: bool) -> Result<Outcome> {
        let runs = DISABLED
            .into_iter()
            .map(|words| (format!("without {words}"), vec!["--core", "--workers", "2", "--disable", words]));
        self.variations(ready, runs)
    }

    /// The sum of several runs, each with a name.
    fn variations<'v>(
        &self,
        ready: bool,
        runs: impl Iterator<Item = (String, Vec<&'v str>)>,
    ) -> Result<Outcome> {
        let mut sum = Tally::default();
        for (name, variation) in runs {
            println!("        {name}:");
            match self.scenarios(ready, &variation)? {
                Outcome::Ran(tally) => {
                    sum.add(&tally);
                    sum.reasons.extend(tally.reasons);
                    sum.failures.extend(tally.failures.iter().map(|failure| format!("{failure}, {name}")));
                }
                skipped @ Outcome::Skipped(_) => return Ok(skipped),
            }
        }
        Ok(Outcome::Ran(sum))
    }

    /// The README's first command, without what the steps before have done; its table is part of the output.
    fn demo(&self, ready: bool) -> Result<Outcome> {
        if let Some(reason) = self.left_out(ready, "demo") {
            return Ok(Outcome::Skipped(reason.into()));
        }
        build_release()?;
        let mut demo = run::command(run::target().join("release/gateway-tests"));
        succeeded(passes(demo.arg("demo")))
    }

    /// Only what depends on the C library and the linker; the same code has passed the steps before.
    fn static_build(&self, ready: bool, object: bool) -> Result<Outcome> {
        const SCENARIO: &str = "direct: ping";
        if let Some(reason) = self.no_network(ready) {
            return Ok(Outcome::Skipped(reason.into()));
        }
        if !object {
            return Ok(Outcome::Skipped("the BPF object was not built".into()));
        }
        if let Err(missing) = Compiler::find(&portable::musl()) {
            return Ok(Outcome::Skipped(format!("{missing:#}")));
        }
        let gateway = release::build(release::QUICK)?;
        build_release()?;
        let mut scenarios = run::command(run::target().join("release/gateway-tests"));
        scenarios.args(["scenarios", "--filter", SCENARIO, "--gateway"]).arg(gateway);
        let mut tally = tally::run(&mut scenarios)?;
        // The build and its checks.
        tally.passed += 1;
        Ok(Outcome::Ran(tally))
    }

    /// That the benchmark works; its figures mean nothing here.
    fn bench(&self, ready: bool) -> Result<Outcome> {
        if let Some(reason) = self.left_out(ready, "bench") {
            return Ok(Outcome::Skipped(reason.into()));
        }
        if std::thread::available_parallelism().is_ok_and(|cores| cores.get() < 2) {
            return Ok(Outcome::Skipped("the gateway needs a core of its own".into()));
        }
        build_release()?;
        let mut bench = run::command(run::target().join("release/gateway-tests"));
        succeeded(passes(bench.args(["bench", "--smoke"])))
    }

    /// Why the step `name`, one thing in the test network, does not run.
    fn left_out(&self, ready: bool, name: &str) -> Option<&'static str> {
        if let Some(reason) = self.no_network(ready) {
            return Some(reason);
        }
        if self.arguments.filter.as_ref().is_some_and(|filter| !name.contains(filter.as_str())) {
            return Some("the filter leaves it out");
        }
        (!run::is_root()).then_some("making network namespaces needs root")
    }

    /// Why nothing runs that needs the test network.
    fn no_network(&self, ready: bool) -> Option<&'static str> {
        if self.arguments.quick {
            return Some("left out by --quick");
        }
        (!ready).then_some("the programs that it needs could not be installed")
    }
}

fn build_release() -> Result<()> {
    run::run(run::cargo().args(["build", "--release", "-p", "firezone-gateway", "-p", "gateway-tests"]))
}

fn formatting() -> Result<Outcome> {
    let ours = passes(run::cargo().args(["fmt", "--all", "--check"]));
    let ebpf = passes(run::cargo().args(["fmt", "--manifest-path", "gateway-ebpf/Cargo.toml", "--check"]));
    ours.and_then(|()| succeeded(ebpf))
}

fn aarch64() -> Result<Outcome> {
    match Compiler::find(portable::AARCH64) {
        Ok(_) => succeeded(portable::check_aarch64()),
        Err(missing) => Ok(Outcome::Skipped(format!("{missing:#}"))),
    }
}

fn clippy() -> Result<Outcome> {
    let deny = ["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"];
    succeeded(passes(run::cargo().args(deny)))
}

/// For the host: clippy exists for no compiler that knows the BPF target, and the code is the same.
fn clippy_ebpf() -> Result<Outcome> {
    let mut cargo = run::cargo();
    cargo.args(["clippy", "--quiet", "--locked", "--manifest-path", "gateway-ebpf/Cargo.toml"]);
    cargo.arg("--target-dir").arg(run::root().join("target/bpf/clippy"));
    succeeded(passes(cargo.args(["--", "-D", "warnings"])))
}

const MANIFESTS: [&str; 2] = ["Cargo.toml", "gateway-ebpf/Cargo.toml"];

fn deny() -> Result<Outcome> {
    for manifest in MANIFESTS {
        let checks = ["licenses", "bans", "sources"];
        passes(cargo_deny(manifest, &[]).args(checks))?;
    }
    succeeded(Ok(()))
}

/// Only with a database that is there already: a test run must neither need nor change what is on the network.
fn advisories() -> Result<Outcome> {
    let folder = run::cargo_home().join("advisory-dbs");
    // A lock file alone is what a fetch leaves that could not reach anybody.
    let is_database =
        |entry: std::io::Result<std::fs::DirEntry>| entry.is_ok_and(|entry| entry.path().is_dir());
    if !std::fs::read_dir(&folder).is_ok_and(|mut entries| entries.any(is_database)) {
        let folder = folder.display();
        return Ok(Outcome::Skipped(format!("no advisory database in {folder}; `cargo deny fetch` gets it")));
    }
    for manifest in MANIFESTS {
        passes(cargo_deny(manifest, &["--offline"]).arg("advisories"))?;
    }
    succeeded(Ok(()))
}

fn cargo_deny(manifest: &str, options: &[&str]) -> Command {
    let mut cargo = run::cargo();
    cargo.args(["deny", "--workspace", "--log-level", "error", "--manifest-path", manifest]);
    cargo.args(options).arg("--config").arg(run::root().join("deny.toml")).arg("check");
    cargo
}

fn passes(command: &mut Command) -> Result<()> {
    println!("        $ {}", run::show(command));
    run::run(command)
}

/// A step that is one thing which works or does not.
fn succeeded(result: Result<()>) -> Result<Outcome> {
    result.map(|()| Outcome::Ran(Tally { passed: 1, ..Tally::default() }))
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each two of the three columns.
    fn pairs(ways: &[Fast]) -> Vec<String> {
        let of = |Fast(mode, workers, family): &Fast| {
            [format!("{mode} {workers}"), format!("{mode} {family:?}"), format!("{workers} {family:?}")]
        };
        let mut pairs: Vec<String> = ways.iter().flat_map(of).collect();
        pairs.sort();
        pairs.dedup();
        pairs
    }

    #[test]
    fn the_few_ways_of_the_fast_path_hold_every_pair_of_the_matrix() {
        assert_eq!(Fast::matrix().len(), 12);
        assert_eq!(pairs(&FAST_PAIRS), pairs(&Fast::matrix()));
    }
}
