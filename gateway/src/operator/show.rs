//! Status, flows and verdicts as text for people. No colours, no width: it is for pipes as well.

use std::{
    fmt::Write as _,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::{
    status::{Client, Flows, Granted, Relay, Status, Volume, Way},
    why::{self, Why},
};

/// Writes a line into a `String`, which cannot fail.
macro_rules! line {
    ($into:expr, $($text:tt)*) => { let _ = writeln!($into, $($text)*); };
}

/// In the manner of `wg show`.
pub fn status(status: &Status) -> String {
    let mut text = String::new();
    let Status { version, compat_version, pid, portal, tun, dns, .. } = status;
    line!(
        text,
        "gateway: firezone-gateway {version} (as {compat_version}), pid {pid}, up {}",
        age(status.uptime_seconds)
    );
    let missing = status.missing.join(", ");
    let ready = if status.ready { "yes".to_owned() } else { format!("no, for want of {missing}") };
    line!(text, "  ready: {ready}");
    let away = portal.away_seconds.map_or_else(|| "connected".to_owned(), |s| format!("away for {}", age(s)));
    line!(text, "  portal: {away} ({} joins, {} failures)", portal.joins, portal.failures);
    let addresses =
        if tun.addresses.is_empty() { "no address yet".to_owned() } else { tun.addresses.join(", ") };
    line!(text, "  tunnel: {} {}, {addresses}", tun.name, if tun.up { "up" } else { "not up" });
    let listening = if dns.listening { "listening" } else { "not listening" };
    line!(
        text,
        "  dns: {listening}, {} queries, {} answered, {} failed",
        dns.queries,
        dns.answered,
        dns.failed
    );
    let used: Vec<_> =
        status.capabilities.iter().filter(|(_, used)| **used).map(|(word, _)| word.as_str()).collect();
    line!(
        text,
        "  kernel: {}",
        if used.is_empty() { "nothing of it in use".to_owned() } else { used.join(", ") }
    );
    for (word, why) in &status.capabilities_missing {
        line!(text, "    without {word}: {why}");
    }
    line!(text, "  fast path: {}", status.fast_path.words);
    let drops: Vec<_> = status.drops.iter().map(|(reason, packets)| format!("{reason} {packets}")).collect();
    line!(text, "  dropped: {}", if drops.is_empty() { "nothing".to_owned() } else { drops.join(", ") });
    for worker in &status.workers {
        line!(
            text,
            "  worker {}: {:.0} % busy, {} clients, {} out, {} in, waiting: {} of other workers, {} commands",
            worker.id,
            worker.busy_share * 100.0,
            worker.clients,
            bytes(worker.outbound.bytes),
            bytes(worker.inbound.bytes),
            bytes(worker.handover_bytes_waiting as u64),
            worker.commands_waiting
        );
    }
    for relay in &status.relays {
        show_relay(&mut text, relay);
    }
    for client in &status.clients {
        show_client(&mut text, client);
    }
    let untold = status.clients_total.saturating_sub(status.clients.len());
    if untold > 0 {
        line!(text, "\nand {untold} clients more");
    }
    text
}

fn show_relay(text: &mut String, relay: &Relay) {
    let at = relay.active.clone().unwrap_or_else(|| relay.addresses.join(", "));
    let rtt =
        relay.rtt_seconds.map_or_else(|| "no answer yet".to_owned(), |rtt| format!("{:.1} ms", rtt * 1000.0));
    line!(text, "\nrelay: {}", relay.id);
    line!(text, "  endpoint: {at}, {}, {rtt}", relay.state);
    if !relay.relayed.is_empty() {
        line!(text, "  our addresses on it: {}, {} channels", relay.relayed.join(", "), relay.channels);
    }
}

fn show_client(text: &mut String, client: &Client) {
    line!(text, "\nclient: {}", client.id);
    line!(text, "  tunnel addresses: {}", client.tunnel.join(", "));
    let path = client.path.as_ref().map_or_else(|| format!("none, {}", client.connection), way);
    line!(text, "  path: {path}");
    let handshake = client.handshake_age_seconds.map(|age_seconds| format!("{} ago", age(age_seconds)));
    line!(text, "  latest handshake: {}", handshake.as_deref().unwrap_or("none that is still in use"));
    line!(
        text,
        "  transfer: {} from the client, {} to it",
        bytes(client.outbound.bytes),
        bytes(client.inbound.bytes)
    );
    let worker = client.worker.map_or_else(|| "none".to_owned(), |worker| worker.to_string());
    let flows =
        client.flows.map_or_else(|| "flows not counted".to_owned(), |open| format!("{open} flows open"));
    line!(
        text,
        "  worker: {worker}, {flows}, {} translated sessions, {} names",
        client.translated,
        client.names
    );
    for resource in &client.resources {
        show_resource(text, resource);
    }
}

fn way(path: &Way) -> String {
    let Way { kind, ends, endpoint, local, relay, channel } = path;
    let through = match (local, relay, channel) {
        (Some(local), ..) => format!(" from {local}"),
        (_, Some(relay), Some(channel)) => format!(" through relay {relay}, channel {channel:#06x}"),
        (_, Some(relay), None) => format!(" through relay {relay}, channel not bound yet"),
        _ => String::new(),
    };
    format!("{kind} ({ends}), endpoint {endpoint}{through}")
}

fn show_resource(text: &mut String, resource: &Granted) {
    let until = match resource.expires_at {
        Some(at) => {
            format!("until {}", humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(at)))
        }
        None => "without end".to_owned(),
    };
    let late = resource
        .expires_at
        .is_some_and(|at| SystemTime::now().duration_since(UNIX_EPOCH).is_ok_and(|now| now.as_secs() > at));
    let carried = match (resource.to_resource, resource.from_resource) {
        (Some(to), Some(from)) => format!("; {} to it, {} from it", bytes(to.bytes), bytes(from.bytes)),
        _ => String::new(),
    };
    let late = if late { " (past)" } else { "" };
    line!(text, "  resource: {}, {until}{late}{carried}", why::describe_resource(resource));
}

/// A table.
pub fn flows(flows: &Flows) -> String {
    if !flows.counted {
        return "Flows are not counted. Start the gateway with --flow-logs, or turn flow logs on in the portal.\n"
            .to_owned();
    }
    let mut text = String::new();
    line!(text, "{} flows open, the newest first", flows.open);
    if flows.incomplete {
        line!(text, "There are too many to look at all of them: name a client by --client.");
    }
    for flow in &flows.flows {
        let name = flow.domain.as_ref().map(|name| format!(" ({name})")).unwrap_or_default();
        line!(
            text,
            "{} {} > {}{name}  {} to, {} from, {} old, quiet for {}, client {}",
            flow.protocol,
            flow.src,
            flow.dst,
            volume(flow.to_resource),
            volume(flow.from_resource),
            age(flow.age_seconds),
            age(flow.quiet_seconds),
            flow.client
        );
    }
    text
}

/// Sentences.
pub fn why(why: &Why) -> String {
    match &why.cure {
        Some(cure) => format!("{}\n{cure}.\n", why.words),
        None => format!("{}\n", why.words),
    }
}

fn volume(volume: Volume) -> String {
    format!("{} in {} packets", bytes(volume.bytes), volume.packets)
}

/// Such as `1.5 MiB`.
#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
pub fn bytes(bytes: u64) -> String {
    let mut value = bytes as f64;
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    for unit in ["KiB", "MiB", "GiB", "TiB"] {
        value /= 1024.0;
        if value < 1023.95 || unit == "TiB" {
            return format!("{value:.1} {unit}");
        }
    }
    unreachable!("the last unit takes all")
}

/// Such as `1h 2m`: the two largest units.
pub fn age(seconds: f64) -> String {
    let whole = Duration::try_from_secs_f64(seconds).unwrap_or_default().as_secs();
    if whole == 0 {
        return format!("{:.0} ms", seconds.max(0.0) * 1000.0);
    }
    let text = humantime::format_duration(Duration::from_secs(whole)).to_string();
    text.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_and_ages_are_short() {
        for (value, expect) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1_048_575, "1.0 MiB"),
            (1_572_864, "1.5 MiB"),
            (u64::MAX, "16777216.0 TiB"),
        ] {
            assert_eq!(bytes(value), expect);
        }
        for (seconds, expect) in [
            (-1.0, "0 ms"),
            (0.25, "250 ms"),
            (59.9, "59s"),
            (3725.0, "1h 2m"),
            (f64::NAN, "0 ms"),
            (f64::INFINITY, "inf ms"),
        ] {
            assert_eq!(age(seconds), expect, "{seconds}");
        }
    }
}
