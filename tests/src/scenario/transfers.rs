//! Bulk: TCP with checksums, UDP, DNS, and what an idle gateway costs.

use std::{net::IpAddr, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::{
    Context,
    lab::{Lab, Options, http_both, lan4, lan6},
};
use crate::net::{
    NetNs,
    process::run,
    services::{BigFile, DNS_NAME, checksum},
    topology::LAN_HOST,
};

const SECOND: Duration = Duration::from_secs(1);

/// 100 MB down over IPv4 and up over IPv6, compared by SHA-256.
pub(super) fn hundred_megabytes(cx: &mut Context) -> Result<()> {
    let mut lab = Lab::start(cx, &Options::default())?;
    lab.connect(0, &[lan4(), lan6()])?;
    let client = &cx.topology.clients[0].namespace;
    let down = cx.logs.file("down");
    let url = format!("http://{}/big", LAN_HOST.0);
    run(client, 60 * SECOND, &["curl", "-sS", "-f", "-o", &down.display().to_string(), &url])?
        .success()
        .context("down")?;
    ensure!(checksum(&down)? == cx.big.sha256, "what came down is not what is there");
    let url = format!("http://[{}]/put/up", LAN_HOST.1);
    let source = cx.big.path.display().to_string();
    run(client, 60 * SECOND, &["curl", "-sS", "-f", "-T", &source, &url])?.success().context("up")?;
    ensure!(lab.lan.uploaded("up")? == cx.big.sha256, "what came up is not what was sent");
    std::fs::remove_file(down)?;
    ensure!(BigFile::LENGTH == 100_000_000, "the file is not 100 MB");
    lab.finish()
}

/// iperf3 over UDP at 20 Mbit/s each way loses next to nothing; DNS queries over UDP and TCP are answered.
pub(super) fn udp(cx: &mut Context) -> Result<()> {
    let mut lab = Lab::start(cx, &Options::default())?;
    lab.connect(0, &[lan4(), lan6()])?;
    let client = &cx.topology.clients[0].namespace;
    for (address, direction) in [(IpAddr::V4(LAN_HOST.0), ""), (IpAddr::V6(LAN_HOST.1), "-R")] {
        // The buffer holds what arrives while iperf3 itself waits for a core.
        let arguments = ["-u", "-b", "20M", "-l", "1200", "-t", "2", "-w", "2M", direction];
        let report = iperf3(client, address, &arguments)?;
        let sum = &report["end"]["sum"];
        let (lost, packets) = (sum["lost_percent"].as_f64(), sum["packets"].as_u64());
        ensure!(packets.is_some_and(|n| n > 3_000), "iperf3 sent {packets:?} packets");
        ensure!(lost.is_some_and(|lost| lost < 2.0), "UDP {direction} to {address} lost {lost:?} %");
    }
    for server in [format!("@{}", LAN_HOST.0), format!("@{}", LAN_HOST.1)] {
        for transport in ["+notcp", "+tcp"] {
            let command = ["dig", "+short", "+time=2", "+tries=1", transport, &server, DNS_NAME, "AAAA"];
            let answer = run(client, 5 * SECOND, &command)?.success()?;
            ensure!(answer.trim() == LAN_HOST.1.to_string(), "{server} {transport}: {answer:?}");
        }
    }
    lab.finish()
}

/// A connected client that says nothing: the gateway sleeps. A machine whose host is busy stretches
/// what little there is to do, so the CPU time counts where it was least; how often a thread woke
/// counts in every window.
pub(super) fn idle(cx: &mut Context) -> Result<()> {
    const WATCHED: Duration = Duration::from_secs(10);
    /// Wakes of all threads a second: a second's tick of the loop and each worker, keepalives, the heartbeat.
    const WAKES: u64 = 30;
    let mut lab = Lab::start(cx, &Options::default())?;
    lab.connect(0, &[lan4(), lan6()])?;
    http_both(&cx.topology.clients[0].namespace)?;
    std::thread::sleep(2 * SECOND);
    let mut least = Duration::MAX;
    for _ in 0..3 {
        let (before, woken) = (lab.gateway.cpu_time()?, lab.gateway.wakes()?);
        let mut awake = 0;
        for _ in 0..100 {
            std::thread::sleep(WATCHED / 100);
            awake += usize::from(lab.gateway.state()? != 'S');
        }
        let used = lab.gateway.cpu_time()?.saturating_sub(before);
        let woken = lab.gateway.wakes()? - woken;
        println!("{woken} wakes and {used:?} of CPU in {WATCHED:?}");
        ensure!(woken <= WAKES * WATCHED.as_secs(), "idle for {WATCHED:?}, the gateway woke {woken} times");
        ensure!(awake <= 5, "in {awake} of 100 looks the gateway was not asleep");
        least = least.min(used);
        // cpu_time counts in ticks of 10 ms: of 10 s, 1 % is 10 ticks.
        if least < WATCHED / 100 {
            return lab.finish();
        }
    }
    bail!("idle for three times {WATCHED:?}, the gateway used {least:?} of CPU and more in each")
}

/// `iperf3 -J` against the LAN host; its report.
///
/// # Errors
/// If iperf3 fails.
pub fn iperf3(client: &NetNs, server: IpAddr, arguments: &[&str]) -> Result<Value> {
    let server = server.to_string();
    let mut command = vec!["iperf3", "-J", "-c", &server];
    command.extend(arguments.iter().filter(|argument| !argument.is_empty()));
    let said = run(client, 30 * SECOND, &command)?;
    let report: Value =
        serde_json::from_str(&said.stdout).with_context(|| format!("iperf3 said {}", said.stdout))?;
    ensure!(said.status.success(), "iperf3: {}", report["error"]);
    Ok(report)
}
