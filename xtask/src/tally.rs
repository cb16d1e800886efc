//! Counting what a test program reports: libtest's `test result:` lines, the scenario runner's closing line.

use std::{
    fmt,
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result};

use crate::run;

/// Counts, what failed, and why something was skipped.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// What held.
    pub passed: u64,
    /// What did not.
    pub failed: u64,
    /// What could not run.
    pub skipped: u64,
    /// One line each for what was skipped.
    pub reasons: Vec<String>,
    /// The names of what failed, as far as they were reported.
    pub failures: Vec<String>,
}

impl Tally {
    /// One thing skipped.
    pub fn skip(reason: String) -> Self {
        Self { skipped: 1, reasons: vec![reason], ..Self::default() }
    }

    /// Adds the counts of `other`; the lines stay where they are.
    pub fn add(&mut self, other: &Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }

    /// Takes one line of output into account; true if a person wants to see it.
    fn read(&mut self, line: &str) -> bool {
        if let Some(counts) = line.strip_prefix("test result: ").and_then(|rest| rest.split_once(". ")) {
            let (passed, failed, ignored) =
                (count(counts.1, "passed"), count(counts.1, "failed"), count(counts.1, "ignored"));
            self.passed += passed;
            self.failed += failed;
            self.skipped += ignored;
            return failed > 0;
        }
        if let Some((name, reason)) =
            line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... ignored"))
        {
            self.reasons.push(format!("{name}{}", reason.replacen(", ", ": ", 1)));
            return false;
        }
        if let Some(failed) = failed_name(line) {
            self.failures.push(failed.to_owned());
            return true;
        }
        if let Some(skipped) = line.strip_prefix("skip  ") {
            self.reasons.push(skipped.to_owned());
            return false;
        }
        if let Some(closing) = closing_line(line) {
            self.passed += closing.passed;
            self.failed += closing.failed;
            self.skipped += closing.skipped;
            return false;
        }
        // What went well one by one, and the frame around it, is noise.
        let noise = line.starts_with("test ") && line.ends_with(" ok") || line.starts_with("running ");
        !noise && !line.trim().is_empty()
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// Runs a test program, shows what a person wants to see of it and counts the rest.
///
/// A program that fails without having reported a failed test (it did not build, it crashed) is one failure.
///
/// # Errors
/// If it cannot be started.
pub fn run(command: &mut Command) -> Result<Tally> {
    let shown = run::show(command);
    println!("        $ {shown}");
    let mut child =
        command.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot start `{shown}`"))?;
    let output = child.stdout.take().expect("standard output is piped");
    let mut tally = Tally::default();
    for line in BufReader::new(output).split(b'\n') {
        let line = line.with_context(|| format!("cannot read the output of `{shown}`"))?;
        let line = String::from_utf8_lossy(&line);
        if tally.read(&line) {
            println!("        {line}");
        }
    }
    let status = child.wait()?;
    if !status.success() && tally.failed == 0 {
        println!("        `{shown}` failed ({status}) without reporting a failed test");
        tally.failed = 1;
    }
    Ok(tally)
}

/// The number in front of `word` in `12 passed; 0 failed; ...`.
fn count(counts: &str, word: &str) -> u64 {
    let part = counts.split(';').find_map(|part| part.trim().strip_suffix(word));
    part.and_then(|number| number.trim().parse().ok()).unwrap_or(0)
}

/// What failed, of `test NAME ... FAILED` and `FAIL  NAME (1.0 s): why`.
fn failed_name(line: &str) -> Option<&str> {
    if let Some(name) = line.strip_prefix("test ") {
        return name.strip_suffix(" ... FAILED");
    }
    // Everything up to the time: a name may have brackets, and why it failed may have more.
    let scenario = line.strip_prefix("FAIL  ")?;
    Some(
        scenario
            .split_once(" s): ")
            .and_then(|(name, _)| name.rsplit_once(" ("))
            .map_or(scenario, |(name, _)| name),
    )
}

/// `N passed, N failed, N skipped`, the whole line.
fn closing_line(line: &str) -> Option<Tally> {
    let mut parts = line.split(", ");
    let mut number =
        |word: &str| -> Option<u64> { parts.next()?.strip_suffix(word)?.trim_end().parse().ok() };
    let tally = Tally {
        passed: number("passed")?,
        failed: number("failed")?,
        skipped: number("skipped")?,
        ..Tally::default()
    };
    parts.next().is_none().then_some(tally)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libtest_is_counted_over_all_its_programs() {
        let (tally, shown) = read(&[
            "running 3 tests",
            "test a::b ... ok",
            "test a::slow ... ignored, needs a real NIC",
            "test a::c ... FAILED",
            "",
            "test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.05s",
            "running 0 tests",
            "test result: ok. 7 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s",
        ]);
        assert_eq!((tally.passed, tally.failed, tally.skipped), (8, 1, 1));
        assert_eq!(tally.reasons, ["a::slow: needs a real NIC"]);
        assert_eq!(tally.failures, ["a::c"]);
        assert_eq!(shown.len(), 2, "{shown:?}");
        assert!(shown[0].contains("a::c ... FAILED"));
    }

    #[test]
    fn the_scenario_runner_is_counted_by_its_closing_line() {
        let (tally, shown) = read(&[
            "ok    ping (0.3 s)",
            "skip  relay: no coturn",
            "FAIL  x (1.0 s): y",
            "FAIL  two (or 2) of them (10.0 s): took (1.0 s): z",
            "FAIL  w: its process ended with 1",
            "",
            "3 passed, 2 failed, 1 skipped",
        ]);
        assert_eq!((tally.passed, tally.failed, tally.skipped), (3, 2, 1));
        assert_eq!(tally.reasons, ["relay: no coturn"]);
        assert_eq!(tally.failures, ["x", "two (or 2) of them", "w: its process ended with 1"]);
        assert_eq!(shown.len(), 4, "{shown:?}");
        assert_eq!(shown[..2], ["ok    ping (0.3 s)", "FAIL  x (1.0 s): y"]);
    }

    #[test]
    fn lines_that_only_look_like_a_result_are_not_counted() {
        for line in [
            "3 passed",
            "3 passed, 2 failed",
            "x passed, 0 failed, 0 skipped",
            "1 passed, 0 failed, 0 skipped, 4 odd",
        ] {
            let (tally, shown) = read(&[line]);
            assert_eq!(tally, Tally::default(), "{line}");
            assert_eq!(shown, [line]);
        }
    }

    #[test]
    fn a_program_that_fails_silently_is_one_failure() {
        assert_eq!(run(run::command("sh").args(["-c", "exit 3"])).unwrap().failed, 1);
        let reported = "echo 'test result: FAILED. 0 passed; 2 failed; 0 ignored'; exit 101";
        assert_eq!(run(run::command("sh").args(["-c", reported])).unwrap().failed, 2);
    }

    fn read(lines: &[&str]) -> (Tally, Vec<String>) {
        let mut tally = Tally::default();
        let shown = lines.iter().filter(|line| tally.read(line)).map(|line| (*line).to_owned()).collect();
        (tally, shown)
    }
}
