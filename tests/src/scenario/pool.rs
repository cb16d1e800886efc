//! Scenarios side by side. Most of them wait most of the time, so a few at once cost one core little and much less time.
//!
//! ```text
//!   gateway-tests scenarios --jobs 3        the big file, the load, the count, the printing
//!     gateway-tests scenarios --exactly "direct: ..."      one scenario each: namespaces, folder, janitor of its own
//!     gateway-tests scenarios --exactly "relayed: ..."
//! ```
//!
//! What belongs to one process cannot be taken for another's: leftovers, time bounds and Ctrl-C work as in a run without
//! `--jobs`. What a scenario says is printed when it has ended, at once and whole. Those that must be alone follow last.

use std::{
    collections::VecDeque,
    fs::File,
    path::PathBuf,
    process::{Child, Command, ExitCode, ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result};

use super::{Arguments, Load, Scenario};
use crate::net::{
    janitor::{self, Janitor},
    services::BigFile,
};

/// Runs `selected`, at most `arguments.jobs` at once, and prints `N passed, N failed, N skipped`.
///
/// # Errors
/// If the run itself cannot be set up; a failing scenario is an exit code.
pub fn run(arguments: &Arguments, selected: &[&'static Scenario]) -> Result<ExitCode> {
    let _janitor = Janitor::start()?;
    let directory = janitor::directory(std::process::id());
    BigFile::make(&directory)?;
    let _load = arguments.load.then(Load::start).transpose()?;
    let mut pool = Pool { arguments, directory, running: Vec::new(), started: 0, sum: Counts::default() };
    let (alone, together): (Vec<_>, Vec<_>) = selected.iter().partition(|scenario| scenario.alone);
    pool.run(together, arguments.jobs)?;
    pool.run(alone, 1)?;
    let _swept_by_the_next_run = std::fs::remove_dir_all(&pool.directory);
    let Counts { passed, failed, skipped } = pool.sum;
    println!("\n{passed} passed, {failed} failed, {skipped} skipped");
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

struct Pool<'a> {
    arguments: &'a Arguments,
    directory: PathBuf,
    running: Vec<Running>,
    started: usize,
    sum: Counts,
}

struct Running {
    scenario: &'static Scenario,
    child: Child,
    output: PathBuf,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Counts {
    passed: u64,
    failed: u64,
    skipped: u64,
}

impl Pool<'_> {
    fn run(&mut self, scenarios: Vec<&'static Scenario>, jobs: usize) -> Result<()> {
        let mut waiting = VecDeque::from(scenarios);
        while !(waiting.is_empty() && self.running.is_empty()) {
            while self.running.len() < jobs
                && let Some(scenario) = waiting.pop_front()
            {
                self.started += 1;
                match self.start(scenario, self.started)? {
                    Some(running) => self.running.push(running),
                    None => waiting.clear(),
                }
            }
            self.reap()?;
            std::thread::sleep(Duration::from_millis(10));
        }
        janitor::park_if_interrupted();
        Ok(())
    }

    /// Nothing is started any more after a signal.
    fn start(&self, scenario: &'static Scenario, number: usize) -> Result<Option<Running>> {
        let output = self.directory.join(format!("said-{number}"));
        let file = File::create(&output)?;
        // It ends, as by Ctrl-C, when this process is gone.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "TERM", "--"]).arg(std::env::current_exe()?);
        command.args(["scenarios", "--exactly", scenario.name, "--big"]).arg(&self.directory);
        command.args(self.arguments.verbose.then_some("--verbose"));
        if let Some(gateway) = &self.arguments.gateway {
            command.arg("--gateway").arg(gateway);
        }
        if let Some(workers) = self.arguments.variation.workers {
            command.args(["--workers", &workers.to_string()]);
        }
        command.args(["--disable", &self.arguments.variation.disable]);
        command.args(["--fast-path", &self.arguments.variation.fast_path]);
        if self.arguments.variation.internet_v6 {
            command.arg("--internet-v6");
        }
        command.stdin(Stdio::null()).stderr(file.try_clone()?).stdout(file);
        let child = janitor::start_run(&mut command)
            .with_context(|| format!("cannot start a process for \"{}\"", scenario.name))?;
        Ok(child.map(|child| Running { scenario, child, output }))
    }

    /// Prints and counts what has ended.
    fn reap(&mut self) -> Result<()> {
        let mut index = 0;
        while let Some(running) = self.running.get_mut(index) {
            let Some(status) = running.child.try_wait()? else {
                index += 1;
                continue;
            };
            let running = self.running.swap_remove(index);
            janitor::run_has_ended(running.child.id());
            let said = std::fs::read(&running.output).unwrap_or_default();
            let (counts, shown) = judge(&String::from_utf8_lossy(&said), status, running.scenario.name);
            print!("{shown}");
            self.sum.passed += counts.passed;
            self.sum.failed += counts.failed;
            self.sum.skipped += counts.skipped;
            let _goes_with_the_folder = std::fs::remove_file(&running.output);
        }
        Ok(())
    }
}

/// What to count and to show of what a process said about its one scenario: all but the closing line.
fn judge(said: &str, status: ExitStatus, name: &str) -> (Counts, String) {
    let mut lines: Vec<&str> = said.lines().collect();
    let closing = lines.pop().and_then(closing_line);
    while lines.last().is_some_and(|line| line.is_empty()) {
        lines.pop();
    }
    let mut shown: String = lines.iter().map(|line| format!("{line}\n")).collect();
    match closing {
        Some(counts) if counts.failed > 0 || status.success() => (counts, shown),
        _ => {
            shown = format!("FAIL  {name}: its process ended with {status}\n{said}");
            if !shown.ends_with('\n') {
                shown.push('\n');
            }
            (Counts { failed: 1, ..Counts::default() }, shown)
        }
    }
}

fn closing_line(line: &str) -> Option<Counts> {
    let mut parts = line.split(", ");
    let mut number =
        |word: &str| -> Option<u64> { parts.next()?.strip_suffix(word)?.trim_end().parse().ok() };
    Some(Counts { passed: number("passed")?, failed: number("failed")?, skipped: number("skipped")? })
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    #[test]
    fn a_process_is_counted_by_its_closing_line_or_is_a_failure() {
        let table = [
            ("ok    x (0.1 s)\n\n1 passed, 0 failed, 0 skipped\n", 0, (1, 0, 0), "ok    x (0.1 s)\n"),
            (
                "FAIL  x (1 s): y\n    logs\n\n0 passed, 1 failed, 0 skipped\n",
                1,
                (0, 1, 0),
                "FAIL  x (1 s): y\n    logs\n",
            ),
            ("skip  x: no root\n\n0 passed, 0 failed, 1 skipped\n", 0, (0, 0, 1), "skip  x: no root\n"),
            // It passed and then could not end well.
            ("ok    x\n\n1 passed, 0 failed, 0 skipped\n", 1, (0, 1, 0), "FAIL  x: its process ended with "),
            ("thread 'main' panicked", 101, (0, 1, 0), "FAIL  x: its process ended with "),
            ("", 0, (0, 1, 0), "FAIL  x: its process ended with "),
        ];
        for (said, code, (passed, failed, skipped), start) in table {
            let (counts, shown) = judge(said, ExitStatus::from_raw(code << 8), "x");
            assert_eq!(counts, Counts { passed, failed, skipped }, "{said:?}");
            assert!(shown.starts_with(start) && shown.ends_with('\n'), "{said:?}: {shown:?}");
            assert!(failed == 0 || shown.contains(said.lines().next().unwrap_or("")), "{said:?}: {shown:?}");
        }
    }
}
