//! Many clients at once, all behind one address: each with its own port, key, relay allocation and session.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;

use super::{
    Context,
    lab::{Lab, Options, http_both, lan4, lan6, start_gateway},
    swarm::Swarm,
};
use crate::{
    net::topology::LAN_HOST,
    standins::{client::SwarmCommand, portal::Role},
};

const SECOND: Duration = Duration::from_secs(1);

/// The first one's UDP port, outside of the range from which the kernel gives ports to others.
const FIRST_PORT: u16 = 20_000;
/// Log-ins per second: the portal stand-in is no part of what is tested.
const PACE: u32 = 500;
/// Under load a relayed path may be chosen first and fail; who is on it finds out after 16.5 s (connections.md section
/// 6.6) and asks again.
const ECHO_LIMIT: Duration = Duration::from_secs(60);

/// 200 ask at the same moment; every one is connected, reaches the LAN, and hears goodbye at the end.
pub(super) fn all_at_once(cx: &mut Context) -> Result<()> {
    const CLIENTS: usize = 200;
    let mut lab = Lab::start(cx, &Options::default())?;
    lab.connect(0, &[lan4(), lan6()])?;
    lab.expect_crowd(CLIENTS);
    let mut swarm = join(cx, &lab, CLIENTS)?;
    connect(&lab, &mut swarm, CLIENTS, 20 * SECOND)?;
    echo(&mut swarm, CLIENTS)?;
    http_both(&cx.topology.clients[0].namespace)?;
    let report = swarm.report()?;
    ensure!(report.closed == 0, "one of the crowd lost its connection: {report:?}");
    lab.terminate(5 * SECOND)?;
    swarm.wait("goodbyes", 2 * SECOND, |report| report.goodbyes == CLIENTS as u64)?;
    lab.clients[0].wait_goodbye(2 * SECOND)
}

/// 2 000 are connected when the gateway is started again, and once more when it is killed; all are served again.
pub(super) fn restart_with_thousands(cx: &mut Context) -> Result<()> {
    const CLIENTS: usize = 2_000;
    let mut lab = Lab::start(cx, &Options::default())?;
    lab.connect(0, &[lan4(), lan6()])?;
    lab.expect_crowd(CLIENTS);
    let mut swarm = join(cx, &lab, CLIENTS)?;
    connect(&lab, &mut swarm, CLIENTS, 60 * SECOND)?;
    echo(&mut swarm, CLIENTS)?;

    let ended = Instant::now();
    lab.terminate(10 * SECOND)?;
    let gone = swarm.wait("goodbyes", 10 * SECOND, |report| report.established == 0)?;
    ensure!(gone.goodbyes == CLIENTS as u64, "SIGTERM: {} of {CLIENTS} heard goodbye", gone.goodbyes);
    println!("      SIGTERM: all heard goodbye within {:.1} s", ended.elapsed().as_secs_f64());
    let began = Instant::now();
    lab.gateway = start_gateway(cx, "gateway-again", &lab.gateway_token, &lab.portal.url(), "info")?;
    let cpu = lab.gateway.cpu_time()?;
    swarm.wait_established(90 * SECOND).context("after the gateway was started again")?;
    println!(
        "      {CLIENTS} clients are back {:.1} s after the start, with {:.1} s of the gateway's CPU",
        began.elapsed().as_secs_f64(),
        lab.gateway.cpu_time()?.saturating_sub(cpu).as_secs_f64()
    );
    echo(&mut swarm, CLIENTS)?;
    lab.portal.wait_online(Role::Client, CLIENTS + 1, SECOND)?;

    // Without a goodbye clients find out by themselves: their checks stay unanswered (connections.md section 6.6).
    lab.gateway.signal(Signal::KILL)?;
    lab.gateway.wait(2 * SECOND)?;
    let began = Instant::now();
    let closed = swarm.report()?.closed + CLIENTS as u64;
    lab.gateway = start_gateway(cx, "gateway-third", &lab.gateway_token, &lab.portal.url(), "info")?;
    swarm
        .wait("all to come back", 120 * SECOND, |report| {
            report.closed >= closed && report.established == CLIENTS
        })
        .context("after the gateway was killed")?;
    println!(
        "      {CLIENTS} clients are back {:.1} s after SIGKILL, with {:.1} s of the gateway's CPU",
        began.elapsed().as_secs_f64(),
        lab.gateway.cpu_time()?.as_secs_f64()
    );
    echo(&mut swarm, CLIENTS)?;
    lab.finish()
}

/// Logs `count` clients in, without any request yet.
fn join(cx: &Context, lab: &Lab, count: usize) -> Result<Swarm> {
    let namespace = &cx.topology.clients[0].namespace;
    let url = lab.portal.url();
    let login = (&*url, &*lab.client_token);
    let mut swarm = Swarm::start(cx, namespace, login, "crowd", count, FIRST_PORT, PACE)?;
    swarm.wait_ready(60 * SECOND)?;
    Ok(swarm)
}

/// All ask for the LAN at the same moment.
fn connect(lab: &Lab, swarm: &mut Swarm, count: usize, limit: Duration) -> Result<()> {
    let (asked, cpu) = (Instant::now(), lab.gateway.cpu_time()?);
    swarm.command(&SwarmCommand::Want { resource: lan4().id })?;
    let report = swarm.wait_established(limit)?;
    println!(
        "      {count} clients connected in {:.1} s, {:.2} s of the gateway's CPU; the slowest took {} ms",
        asked.elapsed().as_secs_f64(),
        lab.gateway.cpu_time()?.saturating_sub(cpu).as_secs_f64(),
        report.slowest_ms
    );
    Ok(())
}

/// Everybody reaches the LAN. The crowd begins in one burst, which may overflow a queue on the way; then it asks again.
fn echo(swarm: &mut Swarm, count: usize) -> Result<()> {
    let before = swarm.report()?.echoes_sent;
    swarm.command(&SwarmCommand::Echo { to: LAN_HOST.0 })?;
    let report = swarm.wait("echoes", ECHO_LIMIT, |report| report.reached == count)?;
    println!(
        "      {count} clients ({} relayed) reached the LAN with {} echo requests",
        report.relayed,
        report.echoes_sent - before
    );
    Ok(())
}
