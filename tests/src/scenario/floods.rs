//! Floods from strangers, while a client works, others connect, and an operator's probe asks how it is.

use std::{
    collections::BTreeMap,
    net::{SocketAddr, UdpSocket},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use base64::Engine as _;
use boringtun::{
    noise::{Tunn, TunnResult},
    x25519::{PublicKey, StaticSecret},
};
use rand::{RngCore as _, SeedableRng as _, rngs::SmallRng};

use super::{
    Context, Skip,
    fast_path::Proof,
    lab::{Download, Lab, Options, health, http_both, lan4, lan6},
    swarm::Swarm,
    trouble::junk,
};
use crate::{
    net::{NetNs, process::run, topology::LAN_HOST},
    standins::{
        client::SwarmCommand,
        portal::{Direction, Role},
    },
};

const SECOND: Duration = Duration::from_secs(1);

/// The gateway's UDP port (connections.md section 2.1).
const PORT: u16 = 52625;
/// Sockets of the flood, each another source port.
const SOURCES: usize = 32;
/// Different datagrams that a flood repeats.
const DATAGRAMS: usize = 512;
/// Clients that connect while the flood runs.
const NEWCOMERS: usize = 16;
/// What a newcomer's session may take, from its connection's creation: about a second, and a client repeats an initiation that
/// was not answered after 5 s.
const NEWCOMER_LIMIT: Duration = Duration::from_secs(3);
/// The flood's pace per second, far above every budget. Without a pace it would be the test machine that gives out: flood,
/// clients, relay, LAN and gateway share its few cores.
const PACE: u64 = 20_000;

/// Random bytes, and headers that lead deep into each parser.
pub(super) fn random(cx: &mut Context) -> Result<()> {
    let mut random = SmallRng::seed_from_u64(0xf100d);
    let datagrams: Vec<Vec<u8>> = (0..DATAGRAMS)
        .map(|n| {
            let mut bytes = junk(&mut random);
            if n % 2 == 0 {
                random.fill_bytes(&mut bytes);
            }
            bytes.truncate(1400);
            bytes
        })
        .collect();
    flood(cx, &|cx, _| from_sockets(sockets(cx)?, datagrams_for_all(&datagrams)))
}

/// Initiations with a valid MAC1 by keys that nobody knows: each must be opened to see that.
pub(super) fn forged(cx: &mut Context) -> Result<()> {
    flood(cx, &|cx, lab| {
        let gateway = gateway_key(lab)?;
        let datagrams =
            (0..DATAGRAMS).map(|_| initiation(&mut stranger(gateway))).collect::<Result<Vec<_>>>()?;
        from_sockets(sockets(cx)?, datagrams_for_all(&datagrams))
    })
}

/// The same by attackers that own their addresses: each answers the cookie, so that its initiations prove where they come
/// from (MAC2).
pub(super) fn forged_with_cookies(cx: &mut Context) -> Result<()> {
    if cx.variation.is_fast() {
        let why = "XDP lets no more of strangers' handshakes pass than are opened without a cookie";
        return Err(Skip(why.to_owned()).into());
    }
    flood(cx, &|cx, lab| {
        let (gateway, sources) = (gateway_key(lab)?, sockets(cx)?);
        let pressure =
            (0..PRESSURE).map(|_| initiation(&mut stranger(gateway))).collect::<Result<Vec<_>>>()?;
        let datagrams =
            sources.iter().map(|socket| proven(gateway, socket, &pressure)).collect::<Result<_>>()?;
        from_sockets(sources, datagrams)
    })
}

/// The datagrams of each source.
type Ammunition = Vec<Vec<Vec<u8>>>;

fn datagrams_for_all(datagrams: &[Vec<u8>]) -> Ammunition {
    vec![datagrams.to_vec(); SOURCES]
}

/// Sends the datagram of a number. What is lost on the way is no failure of the flood.
pub(super) type Shoot = Box<dyn Fn(usize) + Send>;

/// A stranger's sockets, connected to the gateway.
pub(super) fn sockets(cx: &Context) -> Result<Vec<UdpSocket>> {
    let gateway = SocketAddr::new(cx.topology.gateway.v4.into(), PORT);
    let socket = |_| {
        let socket = cx.topology.portal.namespace.run(|| Ok(UdpSocket::bind("0.0.0.0:0")?))?;
        socket.connect(gateway)?;
        Ok(socket)
    };
    (0..SOURCES).map(socket).collect()
}

/// The sockets take turns, and each takes turns with its datagrams.
pub(super) fn from_sockets(sources: Vec<UdpSocket>, ammunition: Ammunition) -> Result<Shoot> {
    ensure!(sources.len() == ammunition.len(), "each source has its own");
    Ok(Box::new(move |number| {
        let (nth, round) = (number % sources.len(), number / sources.len());
        // A full queue, or an answer that nobody read.
        let _lost = sources[nth].send(&ammunition[nth][round % ammunition[nth].len()]);
    }))
}

/// Somebody with a fresh key who knows the gateway's.
pub(super) fn stranger(gateway: PublicKey) -> Tunn {
    let secret = StaticSecret::from(rand::random::<[u8; 32]>());
    Tunn::new(secret, gateway, None, None, rand::random::<u32>() >> 8, None)
}

pub(super) fn initiation(tunn: &mut Tunn) -> Result<Vec<u8>> {
    match tunn.format_handshake_initiation(&mut [0; 148], true) {
        TunnResult::WriteToNetwork(bytes) => Ok(bytes.to_vec()),
        other => bail!("no initiation: {other:?}"),
    }
}

/// Initiations that leave nothing of what strangers may open, after a few attempts: twice what a single worker may open again
/// during [`PAUSE`]. More at once would use up the cookies that they are about: four workers have 50 each after that time.
const PRESSURE: usize = 40;
/// How long the answer to an attempt may take.
const PAUSE: Duration = Duration::from_millis(200);

/// Initiations with the MAC2 that this socket's address earns. Only beyond the budget of strangers is the answer a cookie,
/// and each worker has a share of it: the pressure takes the same way.
fn proven(gateway: PublicKey, socket: &UdpSocket, pressure: &[Vec<u8>]) -> Result<Vec<Vec<u8>>> {
    /// A cookie is sealed for one sender's initiation, so each key needs its own.
    const KEYS: usize = 4;
    let mut datagrams = Vec::new();
    let deadline = Instant::now() + 15 * SECOND;
    while datagrams.len() < KEYS {
        ensure!(Instant::now() < deadline, "the gateway sent no cookie");
        let mut attacker = stranger(gateway);
        for datagram in pressure {
            socket.send(datagram)?;
        }
        socket.send(&initiation(&mut attacker)?)?;
        let mut answer = [0; 256];
        // Without an answer it was opened, or the cookies are used up, by the pressure itself. A worker's share of them is enough
        // for it again after this, while its share of what strangers may open is not.
        socket.set_read_timeout(Some(PAUSE))?;
        // What answers the pressure is not for this key.
        while let Ok(length) = socket.recv(&mut answer) {
            let mut scratch = [0; 256];
            let opened = attacker.decapsulate(None, &answer[..length], &mut scratch);
            if !matches!(opened, TunnResult::Err(_)) {
                break;
            }
        }
        let second = initiation(&mut attacker)?;
        // MAC2 is the last 16 bytes, zero as long as there is no cookie.
        if second[132..] != [0; 16] {
            datagrams.push(second);
        }
    }
    Ok(datagrams)
}

/// How a gateway feels.
struct Figures {
    ping_median: f64,
    ping_worst: f64,
    pings_lost: u32,
    health_worst: Duration,
}

impl std::fmt::Display for Figures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { ping_median, ping_worst, pings_lost, health_worst } = self;
        write!(
            f,
            "ping median {ping_median:.1} ms, worst {ping_worst:.1} ms, {pings_lost} of {PINGS} lost; "
        )?;
        write!(f, "/healthz at most {:.0} ms", health_worst.as_secs_f64() * 1e3)
    }
}

const PINGS: u32 = 60;

/// A flood of what `load` makes, beside a transfer and newcomers. With the fast path forced nearly all of it must die in XDP.
pub(super) fn flood(cx: &Context, load: &dyn Fn(&Context, &Lab) -> Result<Shoot>) -> Result<()> {
    let mut lab = Lab::start(cx, &Options::default())?;
    lab.connect(0, &[lan4(), lan6()])?;
    let client = &cx.topology.clients[0].namespace;
    let login = (&*lab.portal.url(), &*lab.client_token.clone());
    lab.expect_crowd(NEWCOMERS);
    let mut newcomers = Swarm::start(cx, client, login, "newcomer", NEWCOMERS, 20_000, 100)?;
    newcomers.wait_ready(15 * SECOND)?;
    let quiet = figures(cx, client)?;
    println!("      without: {quiet}");
    let shoot = load(cx, &lab)?;
    let transfer = Download::start(cx, client, "transfer", &format!("http://{}/slow", LAN_HOST.0))?;
    let undisturbed = transfer.growth_within(2 * SECOND);
    let proof = cx.variation.is_fast().then(|| Proof::of(&cx.topology));
    let before = proof.as_ref().map(Proof::drops).transpose()?;
    let (stop, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| -> Result<()> {
        scope.spawn(|| fire(shoot, &stop, &sent));
        // The flood must end whatever becomes of the rest, or the scope would wait for ever.
        let result = under_fire(cx, &lab, &mut newcomers, &transfer, undisturbed, &sent);
        stop.store(true, Ordering::Relaxed);
        result
    })?;
    if let (Some(proof), Some(before)) = (proof, before) {
        died_in_xdp(&proof, &before, sent.load(Ordering::Relaxed))?;
    }
    http_both(client).context("after the flood")?;
    ensure!(lab.portal.online(Role::Gateway).len() == 1, "the gateway lost its portal");
    lab.finish()
}

/// At least 19 of 20 datagrams of the flood were dropped by the kernel's program.
fn died_in_xdp(proof: &Proof, before: &BTreeMap<&'static str, u64>, sent: u64) -> Result<()> {
    let mut dropped = proof.drops()?;
    for (reason, packets) in &mut dropped {
        *packets -= before.get(reason).copied().unwrap_or(0);
    }
    let all: u64 = dropped.values().sum();
    println!("      {all} of {sent} datagrams were dropped in XDP: {dropped:?}");
    ensure!(all * 20 >= sent * 19, "{all} of {sent} datagrams were dropped in XDP: {dropped:?}");
    Ok(())
}

/// What must work meanwhile.
fn under_fire(
    cx: &Context,
    lab: &Lab,
    newcomers: &mut Swarm,
    transfer: &Download,
    undisturbed: u64,
    sent: &AtomicU64,
) -> Result<()> {
    let client = &cx.topology.clients[0].namespace;
    std::thread::sleep(SECOND / 2);
    let (began, before, cpu) = (Instant::now(), sent.load(Ordering::Relaxed), lab.gateway.cpu_time()?);
    let pressed = figures(cx, client)?;
    let meanwhile = transfer.growth_within(2 * SECOND);
    println!("      the transfer brings {meanwhile} bytes in 2 s, without {undisturbed}");
    ensure!(
        meanwhile * 2 >= undisturbed,
        "the transfer brings {meanwhile} bytes in 2 s, without {undisturbed}"
    );
    let asked = Instant::now();
    newcomers.command(&SwarmCommand::Want { resource: lan4().id })?;
    let report = newcomers.wait_established(20 * SECOND).context("clients that come during the flood")?;
    newcomers.command(&SwarmCommand::Echo { to: LAN_HOST.0 })?;
    newcomers.wait("echoes", 5 * SECOND, |report| report.reached == NEWCOMERS)?;
    let (connected, took) = (asked.elapsed(), began.elapsed().as_secs_f64());
    let rate = (sent.load(Ordering::Relaxed) - before) as f64 / took;
    let cpu = lab.gateway.cpu_time()?.saturating_sub(cpu).as_secs_f64() / took;
    println!("      {rate:.0} datagrams/s: {pressed}; gateway at {:.0} % of a core", 100.0 * cpu);
    println!(
        "      {NEWCOMERS} newcomers reached the LAN in {:.1} s, the slowest session took {} ms",
        connected.as_secs_f64(),
        report.slowest_ms
    );
    // Nobody's first initiation was taken for a stranger's: it would be repeated after 5 s.
    let slowest = Duration::from_millis(report.slowest_ms);
    ensure!(slowest < NEWCOMER_LIMIT, "a newcomer needed {slowest:?} for its session");
    ensure!(rate > PACE as f64 / 4.0, "this was no flood: {rate:.0} datagrams per second");
    ensure!(pressed.pings_lost <= PINGS / 5, "{} of {PINGS} echoes were lost", pressed.pings_lost);
    ensure!(pressed.health_worst < SECOND, "/healthz took {:?}", pressed.health_worst);
    Ok(())
}

/// The gateway's public key, as its log-in said.
pub(super) fn gateway_key(lab: &Lab) -> Result<PublicKey> {
    let entry = lab
        .portal
        .wait_for(SECOND, |entry| entry.peer == Role::Gateway && entry.dir == Direction::Connect)?;
    let text = entry.msg["query"]["public_key"].as_str().context("the log-in names a public key")?;
    let bytes = base64::engine::general_purpose::STANDARD.decode(text)?;
    let key: [u8; 32] = bytes.try_into().ok().context("a key of 32 bytes")?;
    Ok(PublicKey::from(key))
}

/// Sends at the pace until it is told to stop.
fn fire(shoot: Shoot, stop: &AtomicBool, sent: &AtomicU64) {
    const BURST: u64 = 64;
    let started = Instant::now();
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) {
        let due =
            u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX).saturating_mul(PACE) / 1000;
        if count + BURST > due {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        }
        // After a pause that the scheduler made, the flood goes on at its pace and does not catch up.
        count = count.max(due.saturating_sub(10 * BURST));
        for _ in 0..BURST {
            shoot(usize::try_from(count).unwrap_or(0));
            count += 1;
            sent.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Pings the LAN through the tunnel for three seconds and asks the health port meanwhile.
fn figures(cx: &Context, client: &NetNs) -> Result<Figures> {
    let count = PINGS.to_string();
    let address = LAN_HOST.0.to_string();
    let command = ["ping", "-n", "-c", &count, "-i", "0.05", "-W", "1", &address];
    std::thread::scope(|scope| {
        let ping = scope.spawn(|| run(client, 15 * SECOND, &command));
        let mut health_worst = Duration::ZERO;
        for _ in 0..10 {
            let asked = Instant::now();
            let (status, _) = health(cx, "/healthz")?;
            health_worst = health_worst.max(asked.elapsed());
            ensure!(status == 200, "/healthz answered {status}");
            std::thread::sleep(SECOND / 10);
        }
        let said = ping.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?.stdout;
        let mut times: Vec<f64> = said
            .lines()
            .filter_map(|line| line.split_once("time=")?.1.split(' ').next()?.parse().ok())
            .collect();
        times.sort_by(f64::total_cmp);
        ensure!(!times.is_empty(), "no echo came back: {said}");
        Ok(Figures {
            ping_median: times[times.len() / 2],
            ping_worst: times[times.len() - 1],
            pings_lost: PINGS.saturating_sub(u32::try_from(times.len())?),
            health_worst,
        })
    })
}
