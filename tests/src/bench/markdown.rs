//! The tables in README.md, made of `bench/results.json` and of nothing else.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result};

use super::report::{Contender, Flood, Results, Row, Run, Spread, WorkerCount, Workers};

const BEGIN: &str = "<!-- written by `cargo xtask bench`: begin -->\n";
const END: &str = "<!-- written by `cargo xtask bench`: end -->";

/// Writes `bench/results.json` and README.md's section.
///
/// # Errors
/// If a file cannot be written, or README.md has no section.
pub(super) fn save(results: &Results) -> Result<()> {
    let json = root().join("bench/results.json");
    std::fs::create_dir_all(root().join("bench"))?;
    std::fs::write(&json, serde_json::to_string_pretty(results)? + "\n")
        .with_context(|| format!("cannot write {}", json.display()))?;
    let readme = root().join("README.md");
    let text = std::fs::read_to_string(&readme)?;
    let (before, _, after) = section(&text).context("README.md has no place for the benchmark's tables")?;
    std::fs::write(&readme, format!("{before}{BEGIN}{}{END}{after}", render(results)))?;
    println!("written: {} and the section in {}", json.display(), readme.display());
    Ok(())
}

/// The folder of the workspace.
pub(super) fn root() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// Before, inside and after the markers.
fn section(text: &str) -> Option<(&str, &str, &str)> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (inside, after) = rest.split_once(END)?;
    Some((before, inside, after))
}

/// Everything between the markers.
pub(super) fn render(results: &Results) -> String {
    let about = &results.about;
    let mut text = format!(
        "{}, {} cores, Linux {}; commit {}, {}, {} run: median (min-max) of {} interleaved runs of {} s.\n\n",
        about.machine,
        about.cores,
        about.kernel,
        about.commit,
        about.date,
        about.mode,
        about.rounds,
        about.seconds
    );
    rows(&mut text, &results.rows);
    tasks(&mut text, &results.tasks);
    if !results.aead.is_empty() {
        text.push_str("\n| encryption alone, ns per packet | seal | open |\n|---|---|---|\n");
        for one in &results.aead {
            let _ = writeln!(
                text,
                "| {} bytes | {} | {} |",
                one.bytes,
                spread(&one.seal_ns, 0),
                spread(&one.open_ns, 0)
            );
        }
    }
    workers(&mut text, &results.workers);
    floods(&mut text, &results.floods);
    text.push('\n');
    for note in &results.notes {
        let _ = writeln!(text, "* {note}");
    }
    text
}

/// Ratios first: of packets per CPU second, ours to the other's.
fn rows(text: &mut String, rows: &[Row]) {
    let Some(widest) = rows.iter().max_by_key(|row| row.contenders.len()) else { return };
    let others: Vec<&str> = widest.contenders.iter().skip(1).map(|other| other.name.as_str()).collect();
    text.push_str("| traffic |");
    for other in &others {
        let _ = write!(text, " to {other} |");
    }
    text.push_str(" kpkt per CPU-s | ns per packet | process alone | Gbit/s | lost | machine |\n|---|");
    text.push_str(&"---|".repeat(others.len() + 6));
    text.push('\n');
    for row in rows {
        let Some(ours) = row.contenders.first() else { continue };
        let mark = if ours.summary.void_runs == ours.runs.len() { " (void)" } else { "" };
        let _ = write!(text, "| {}{mark} |", row.name);
        for other in &others {
            let other = row.contenders.iter().find(|contender| contender.name == *other);
            let cell = other.map_or_else(String::new, |other| spread_of_ratio(ours, other));
            let _ = write!(text, " {cell} |");
        }
        let summary = &ours.summary;
        let _ = writeln!(
            text,
            " {} | {} | {} | {} | {:.1} % | {:.0} % |",
            spread(&summary.kpkt_per_cpu_second, 0),
            spread(&summary.ns_per_packet, 0),
            spread(&summary.process_ns_per_packet, 0),
            spread(&summary.gbit_per_second, 2),
            summary.lost_percent.median,
            summary.machine_percent.median
        );
    }
    text.push_str("\nThe others, kpkt per CPU-s (Gbit/s):\n\n| traffic |");
    for other in &others {
        let _ = write!(text, " {other} |");
    }
    let _ = writeln!(text, "\n|---|{}", "---|".repeat(others.len()));
    for row in rows.iter().filter(|row| row.contenders.len() > 1) {
        let _ = write!(text, "| {} |", row.name);
        for other in &others {
            let other = row.contenders.iter().find(|contender| contender.name == *other);
            let cell = other.map_or_else(String::new, |other| {
                let summary = &other.summary;
                let mark = if summary.void_runs == other.runs.len() { " (void)" } else { "" };
                format!(
                    "{} ({:.2}){mark}",
                    spread(&summary.kpkt_per_cpu_second, 0),
                    summary.gbit_per_second.median
                )
            });
            let _ = write!(text, " {cell} |");
        }
        text.push('\n');
    }
}

/// The ratio first: what a packet costs with the task, to what it cost without in the same round.
fn tasks(text: &mut String, rows: &[Row]) {
    if rows.is_empty() {
        return;
    }
    text.push_str(
        "\n| further task | ns per packet, to without | ns per packet | without | process alone | without |\n\
         |---|---|---|---|---|---|\n",
    );
    for row in rows {
        let [without, with] = &row.contenders[..] else { continue };
        let mark = if with.summary.void_runs == with.runs.len() { " (void)" } else { "" };
        let rounds =
            with.runs.iter().zip(&without.runs).filter(|(a, b)| !mark.is_empty() || !(a.void || b.void));
        let rounds = Spread::of(rounds.map(|(a, b)| a.ns_per_packet() / b.ns_per_packet()).collect());
        let _ = writeln!(
            text,
            "| {}{mark} | **{:.3}x** ({:.3}-{:.3}) | {} | {} | {} | {} |",
            row.name,
            rounds.median,
            rounds.min,
            rounds.max,
            spread(&with.summary.ns_per_packet, 0),
            spread(&without.summary.ns_per_packet, 0),
            spread(&with.summary.process_ns_per_packet, 0),
            spread(&without.summary.process_ns_per_packet, 0),
        );
    }
}

/// The ratio first: what a packet costs with more workers, to what it costs with one.
fn workers(text: &mut String, all: &[Workers]) {
    if all.is_empty() {
        return;
    }
    text.push_str(
        "\n| many clients, all workers busy | clients | workers | ns per packet, to one worker | ns per packet | process alone | \
         Gbit/s | lost | workers' share of a core |\n|---|---|---|---|---|---|---|---|---|\n",
    );
    for one in all {
        let Some(first) = one.counts.first() else { continue };
        for count in &one.counts {
            let over = |value: &dyn Fn(&Run) -> f64| Spread::of(count.runs.iter().map(value).collect());
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} | {} | {} | {} | {:.1} % | {:.0} to {:.0} % |",
                one.name,
                one.clients,
                count.workers,
                to_one_worker(count, first),
                spread(&count.ns_per_packet, 0),
                spread(&over(&|run| run.cost.threads_ns as f64 / run.packets.max(1) as f64), 0),
                spread(&count.gbit_per_second, 2),
                over(&|run| run.lost_percent).median,
                count.least_busy_percent.median,
                count.most_busy_percent.median
            );
        }
    }
}

/// Of the medians, and the ends of what the rounds said.
fn to_one_worker(count: &WorkerCount, first: &WorkerCount) -> String {
    let ratio = count.ns_per_packet.median / first.ns_per_packet.median;
    if count.workers == first.workers {
        return format!("{ratio:.2}x");
    }
    let void = if count.runs.iter().all(|run| run.void) { " (void)" } else { "" };
    let rounds = count.runs.iter().zip(&first.runs).filter(|(a, b)| !void.is_empty() || !(a.void || b.void));
    let rounds = Spread::of(rounds.map(|(a, b)| a.ns_per_packet() / b.ns_per_packet()).collect());
    format!("**{ratio:.2}x** ({:.2}-{:.2}){void}", rounds.min, rounds.max)
}

fn floods(text: &mut String, floods: &[Flood]) {
    let Some(calm) = floods.first() else { return };
    text.push_str(
        "\n| flood | kpps arriving | goodput kept | Mbit/s | ping p50, ms | p99, ms | ping lost | /healthz p50, ms | p99, ms | \
         gateway, of a core |\n|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for flood in floods {
        let _ = writeln!(
            text,
            "| {} | {} | **{:.0} %** | {} | {} | {} | {:.1} % | {} | {} | {:.0} % |",
            flood.name,
            spread(&flood.arriving_kpps, 0),
            100.0 * flood.goodput_mbit.median / calm.goodput_mbit.median,
            spread(&flood.goodput_mbit, 1),
            spread(&flood.ping_p50_ms, 2),
            spread(&flood.ping_p99_ms, 2),
            flood.ping_lost_percent.median,
            spread(&flood.healthz_p50_ms, 2),
            spread(&flood.healthz_p99_ms, 2),
            flood.gateway_percent.median
        );
    }
}

/// Ratio of the medians, and the least and greatest ratio of two runs of the same round.
fn spread_of_ratio(ours: &Contender, other: &Contender) -> String {
    let (a, b) = (&ours.summary.kpkt_per_cpu_second, &other.summary.kpkt_per_cpu_second);
    let rounds = ours.runs.iter().zip(&other.runs);
    let rounds = Spread::of(rounds.map(|(a, b)| b.ns_per_packet() / a.ns_per_packet()).collect());
    format!("**{:.2}x** ({:.2}-{:.2})", a.median / b.median, rounds.min, rounds.max)
}

fn spread(spread: &Spread, decimals: usize) -> String {
    let Spread { median, min, max } = spread;
    format!("{median:.decimals$} ({min:.decimals$}-{max:.decimals$})")
}

#[cfg(test)]
mod tests {
    use super::super::report::Summary;
    use super::*;

    /// What the command wrote last is what the types of today say and what README.md shows.
    #[test]
    fn readme_shows_what_results_json_holds() {
        let json = std::fs::read_to_string(root().join("bench/results.json")).unwrap();
        let results: Results = serde_json::from_str(&json).unwrap();
        for contender in results.rows.iter().chain(&results.tasks).flat_map(|row| &row.contenders) {
            assert_eq!(contender.summary, Summary::of(&contender.runs), "{}", contender.name);
        }
        let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
        let (_, inside, _) = section(&readme).unwrap();
        assert_eq!(inside, render(&results));
    }
}
