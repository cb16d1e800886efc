//! The end of a daemon: on SIGTERM it ends with code 0, and what its parts say then shows that nothing is left and that no
//! queue grew. They say it at DEBUG under a target of its own, so that every scenario's log has it.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;

use crate::net::process::Process;

/// What is added to every RUST_LOG.
pub const DIRECTIVE: &str = "firezone_gateway::rest=debug";

/// SIGTERM; the daemon ends within `limit`, with code 0 and in order. `clients` is how many it had at most.
///
/// # Errors
/// If it does not, or if [`check`] finds something.
pub fn terminate(gateway: &mut Process, limit: Duration, clients: usize) -> Result<()> {
    gateway.signal(Signal::TERM)?;
    let status = gateway.wait(limit)?;
    ensure!(status.code() == Some(0), "on SIGTERM the gateway ended with {status}");
    check(&gateway.log(), clients)
}

/// What each worker said about itself when it ended.
pub fn workers(log: &str) -> Vec<String> {
    log.lines().filter(|line| line.contains(WORKER)).map(str::to_owned).collect()
}

const WORKER: &str = "Worker at rest";
const CONTROL: &str = "Control at rest";
const PORTAL: &str = "Portal at rest";
const FLOW_LOGS: &str = "Flow logs at rest";

/// What a value must be.
#[derive(Debug, Clone, Copy)]
enum Must {
    /// A queue is empty.
    Be(u64),
    /// At most so many; or a queue never came to its bound.
    NotExceed(u64),
    /// A table has at most one entry for each value of another name.
    NotExceedValueOf(&'static str),
}

/// Each daemon whose end is in `log` left nothing, and no queue came to its bound with at most `clients` clients at once.
///
/// # Errors
/// Naming the first value that is wrong or missing.
pub fn check(log: &str, clients: usize) -> Result<()> {
    use Must::{Be, NotExceed, NotExceedValueOf};
    let clients = clients as u64;
    // Of what is said to the workers and the portal only the latest of each client, channel or kind waits.
    let told = NotExceed(64 + 16 * clients);
    let rules = [
        (WORKER, "batches_in_use", Be(0)),
        (WORKER, "packets_waiting", Be(0)),
        (WORKER, "rings_waiting", Be(0)),
        (WORKER, "mail_waiting", Be(0)),
        // A ring's capacity, with up to eight workers.
        (WORKER, "ring_bytes_most", NotExceed(1 << 20)),
        (WORKER, "commands_most", told),
        (CONTROL, "to_workers", Be(0)),
        (CONTROL, "to_network", Be(0)),
        (CONTROL, "to_shell", Be(0)),
        (CONTROL, "from_relays", Be(0)),
        // Candidates are held while the portal is away: one message for each client.
        (CONTROL, "to_portal", NotExceedValueOf("clients")),
        (CONTROL, "parked", Be(0)),
        // Names that clients asked for in the last moment.
        (CONTROL, "resolving", NotExceed(4 * clients)),
        (CONTROL, "early", NotExceed(clients)),
        (CONTROL, "clients", NotExceed(clients)),
        (CONTROL, "indices", NotExceedValueOf("clients")),
        (CONTROL, "usernames", NotExceedValueOf("clients")),
        (CONTROL, "timers", NotExceedValueOf("clients")),
        (CONTROL, "homes", NotExceedValueOf("clients")),
        // What the workers said in the last moment.
        (CONTROL, "events_waiting", NotExceed(16 + 4 * clients)),
        // The quota of STUN; what is beyond it is counted as dropped.
        (CONTROL, "events_most", NotExceed(1024 + 4 * clients)),
        (CONTROL, "portal_events_waiting", NotExceed(4 + clients)),
        (CONTROL, "portal_events_most", NotExceed(256)),
        (PORTAL, "commands_waiting", Be(0)),
        (PORTAL, "commands_most", told),
        // Half of what may wait.
        (FLOW_LOGS, "orders_waiting", Be(0)),
        (FLOW_LOGS, "orders_most", NotExceed(5000)),
        (FLOW_LOGS, "lost", Be(0)),
    ];
    for part in [WORKER, CONTROL, PORTAL, FLOW_LOGS] {
        let lines: Vec<&str> = log.lines().filter(|line| line.contains(part)).collect();
        ensure!(!lines.is_empty(), "nobody said \"{part}\"");
        for line in lines {
            for (_, name, must) in rules.iter().filter(|(of, ..)| *of == part) {
                let is = value(line, name)?;
                let holds = match *must {
                    Be(wanted) => is == wanted,
                    NotExceed(bound) => is <= bound,
                    NotExceedValueOf(other) => is <= value(line, other)?,
                };
                if !holds {
                    bail!("something is left or grew, {name} must {must:?}: {line}");
                }
            }
        }
    }
    Ok(())
}

/// The number in ` name=number`.
fn value(line: &str, name: &str) -> Result<u64> {
    let word = line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    word.and_then(|number| number.parse().ok()).with_context(|| format!("{name} is not said: {line}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "\
T DEBUG firezone_gateway::rest: Control at rest to_workers=0 to_network=0 to_portal=0 to_shell=0 from_relays=0 parked=0 \
resolving=0 early=0 clients=2 indices=2 usernames=2 timers=2 homes=2 events_waiting=1 events_most=9 portal_events_waiting=0 \
portal_events_most=3
T DEBUG firezone_gateway::rest: Worker at rest worker=0 batches_in_use=0 packets_waiting=0 rings_waiting=0 mail_waiting=0 \
ring_bytes_most=4096 commands_most=7 outbound_packets=12
T DEBUG firezone_gateway::rest: Portal at rest commands_waiting=0 commands_most=2
T DEBUG firezone_gateway::rest: Flow logs at rest orders_waiting=0 orders_most=3 lost=0
";

    #[test]
    fn what_is_left_grew_or_is_not_said_is_found() {
        check(GOOD, 2).unwrap();
        let table = [
            ("batches_in_use=0", "batches_in_use=1"),
            ("packets_waiting=0", "packets_waiting=1"),
            ("rings_waiting=0", "rings_waiting=1"),
            ("mail_waiting=0", "mail_waiting=1"),
            ("ring_bytes_most=4096", "ring_bytes_most=1048577"),
            ("commands_most=7", "commands_most=97"),
            ("orders_waiting=0", "orders_waiting=1"),
            ("orders_most=3", "orders_most=5001"),
            ("lost=0", "lost=1"),
            ("to_workers=0", "to_workers=1"),
            ("to_network=0", "to_network=1"),
            ("to_portal=0", "to_portal=3"),
            ("parked=0", "parked=1"),
            ("resolving=0", "resolving=9"),
            ("clients=2", "clients=3"),
            ("indices=2", "indices=3"),
            ("usernames=2", "usernames=3"),
            ("timers=2", "timers=3"),
            ("homes=2", "homes=3"),
            ("events_waiting=1", "events_waiting=25"),
            ("events_most=9", "events_most=1033"),
            ("portal_events_most=3", "portal_events_most=257"),
            ("commands_waiting=0", "commands_waiting=1"),
            ("commands_most=2", "commands_most=97"),
            ("homes=2", ""),
            ("Worker at rest", "Worker"),
            ("Control at rest", "Control"),
            ("Portal at rest", "Portal"),
        ];
        for (good, bad) in table {
            assert!(GOOD.contains(good), "{good}");
            check(&GOOD.replacen(good, bad, 1), 2).expect_err(bad);
        }
        check(&format!("{GOOD}{}", GOOD.replace("early=0", "early=9")), 2).expect_err("the second daemon");
    }
}
