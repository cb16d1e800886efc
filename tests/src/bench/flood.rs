//! An established session, and the process itself, while something floods the gateway's port.
//!
//! ```text
//!   portal's host (flooder, core 0) --> gateway:52625 <-- client0: iperf3 UDP and ping through the tunnel
//!                                       gateway 127.0.0.1:8080 <-- GET /healthz
//! ```

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use boringtun::{
    noise::{Tunn, TunnResult},
    x25519::{PublicKey, StaticSecret},
};
use rand::{RngCore as _, SeedableRng as _, rngs::SmallRng};

use super::{
    accounting::Meter,
    bed::{Bed, Who},
    report::{Flood, Spread},
    traffic::{self, Direction, Load},
};
use crate::{
    net::{NetNs, process},
    scenario::lab::GATEWAY_NAME,
    standins::portal::Role,
};

/// What the flooder sends.
#[derive(Debug, Clone, Copy)]
enum Weather {
    Calm,
    /// Of any length, of no protocol.
    RandomUdp,
    /// Initiations that fail the first check.
    WrongMac1,
    /// Initiations of nobody: MAC1 is right, for the gateway's key is no secret, and the gateway must do Diffie-Hellman or
    /// ask for a cookie.
    RightMac1,
}

const WEATHERS: [(Weather, &str); 4] = [
    (Weather::Calm, "none"),
    (Weather::RandomUdp, "random UDP"),
    (Weather::WrongMac1, "initiations, MAC1 wrong"),
    (Weather::RightMac1, "initiations, MAC1 right"),
];

/// What the session carries.
const LOAD: Load = Load::Udp { bytes: 1200, mbit: 100 };
const PORT: u16 = 52625;
/// Different datagrams that are sent again and again: making an initiation costs more than refusing it.
const VARIETY: usize = 256;
/// The flooder looks at its order to stop after this many.
const BURST: usize = 64;

/// One run of one weather.
struct Seen {
    arriving_kpps: f64,
    goodput_mbit: f64,
    ping: Pings,
    healthz: Vec<Duration>,
    gateway_percent: f64,
}

/// Measures `rounds` times, weathers interleaved.
///
/// # Errors
/// If there is no session before the flood, the flood does not arrive, or /healthz does not answer.
pub(super) fn measure(bed: &mut Bed, rounds: usize, seconds: u32) -> Result<Vec<Flood>> {
    let key = bed.lab.portal.public_key_of(Role::Gateway, GATEWAY_NAME).context("the gateway's key")?;
    let key = decode(&key)?;
    bed.set_offloads(true)?;
    bed.separate_queues()?;
    let mut seen: Vec<Vec<Seen>> = WEATHERS.iter().map(|_| Vec::new()).collect();
    for round in 1..=rounds {
        for ((weather, name), seen) in WEATHERS.iter().zip(&mut seen) {
            let one = once(bed, *weather, key, seconds).with_context(|| format!("flood of {name}"))?;
            println!(
                "    run {round} of {rounds}: flood {name:<24} {:5.0} kpps arrive, goodput {:.1} Mbit/s, ping p99 {:.2} ms, lost \
                 {:.1} %, /healthz p99 {:.2} ms, gateway {:.0} %",
                one.arriving_kpps,
                one.goodput_mbit,
                millis(percentile(&one.ping.times, 99)),
                one.ping.lost_percent,
                millis(percentile(&one.healthz, 99)),
                one.gateway_percent
            );
            if one.goodput_mbit == 0.0 {
                bed.renew_server(Who::Ours)?;
            }
            seen.push(one);
        }
    }
    let of = |(name, seen): (&str, &Vec<Seen>)| {
        let over = |value: &dyn Fn(&Seen) -> f64| Spread::of(seen.iter().map(value).collect());
        Flood {
            name: name.to_owned(),
            arriving_kpps: over(&|one| one.arriving_kpps),
            goodput_mbit: over(&|one| one.goodput_mbit),
            ping_p50_ms: over(&|one| millis(percentile(&one.ping.times, 50))),
            ping_p99_ms: over(&|one| millis(percentile(&one.ping.times, 99))),
            ping_lost_percent: over(&|one| one.ping.lost_percent),
            healthz_p50_ms: over(&|one| millis(percentile(&one.healthz, 50))),
            healthz_p99_ms: over(&|one| millis(percentile(&one.healthz, 99))),
            gateway_percent: over(&|one| one.gateway_percent),
        }
    };
    Ok(WEATHERS.iter().map(|(_, name)| *name).zip(&seen).map(of).collect())
}

fn once(bed: &Bed, weather: Weather, key: [u8; 32], seconds: u32) -> Result<Seen> {
    let topology = &bed.cx.topology;
    let (client, gateway) = (&topology.clients[0].namespace, &topology.gateway.namespace);
    let datagrams = datagrams(weather, key)?;
    let target = SocketAddr::new(topology.gateway.v4.into(), PORT);
    let stop = AtomicBool::new(false);
    let meter = Meter::new(bed.pid(Who::Ours), &bed.napi);
    std::thread::scope(|scope| {
        let flooder = scope.spawn(|| topology.portal.namespace.run(|| flood(&datagrams, target, &stop)));
        let pings = scope.spawn(|| ping(client, Who::Ours.target().into(), seconds));
        let healthz = scope.spawn(|| gateway.run(|| healthz(&stop)));
        let (packets, before) = (received(gateway)?, meter.read()?);
        let run = traffic::run(bed, Who::Ours, 0, LOAD, Direction::Outbound, seconds);
        let cost = before.until(&meter.read()?);
        let packets = received(gateway)?.saturating_sub(packets);
        let ping = join(pings);
        stop.store(true, Ordering::Relaxed);
        let flooded = join(flooder)?;
        let (ping, healthz) = (ping?, join(healthz)?);
        // A session that a flood breaks is a result; one that is broken in calm weather is none.
        let goodput_mbit = match run {
            Ok(run) => run.bytes as f64 * 8.0 / run.seconds / 1e6,
            Err(error) if datagrams.is_empty() => return Err(error),
            Err(error) => {
                println!("    the session carries nothing: {error:#}");
                0.0
            }
        };
        // A flood that does not arrive would make the gateway look well; what overflows the router's queue is lost.
        ensure!(
            packets >= flooded / 10,
            "of {flooded} datagrams of the flood, {packets} frames reached the gateway"
        );
        Ok(Seen {
            arriving_kpps: packets as f64 * 1e6 / cost.wall_ns as f64,
            goodput_mbit,
            ping,
            healthz,
            gateway_percent: 100.0 * cost.total_ns() as f64 / cost.wall_ns as f64,
        })
    })
}

fn join<T>(thread: std::thread::ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// What one weather sends; nothing if it is calm.
fn datagrams(weather: Weather, key: [u8; 32]) -> Result<Vec<Vec<u8>>> {
    let mut random = SmallRng::seed_from_u64(0xf100d);
    let one = |_| match weather {
        Weather::Calm => Ok(Vec::new()),
        Weather::RandomUdp => {
            let length = 1 + usize::try_from(random.next_u32() % 256)?;
            let mut bytes = vec![0; length];
            random.fill_bytes(&mut bytes);
            Ok(bytes)
        }
        Weather::WrongMac1 => {
            let mut bytes = initiation(key)?;
            bytes[116] ^= 1;
            Ok(bytes)
        }
        Weather::RightMac1 => initiation(key),
    };
    let count = if matches!(weather, Weather::Calm) { 0 } else { VARIETY };
    (0..count).map(one).collect()
}

/// By a key that nobody knows.
fn initiation(gateway: [u8; 32]) -> Result<Vec<u8>> {
    let private = StaticSecret::from(rand::random::<[u8; 32]>());
    let mut tunn = Tunn::new(private, PublicKey::from(gateway), None, None, rand::random::<u32>() >> 8, None);
    let mut buffer = [0; 148];
    match tunn.format_handshake_initiation(&mut buffer, false) {
        TunnResult::WriteToNetwork(datagram) => Ok(datagram.to_vec()),
        _ => anyhow::bail!("boringtun makes no initiation"),
    }
}

fn decode(base64: &str) -> Result<[u8; 32]> {
    use base64::Engine as _;
    let bytes = base64::engine::general_purpose::STANDARD.decode(base64)?;
    bytes.try_into().map_err(|_| anyhow::anyhow!("a key has 32 bytes"))
}

/// Sends as fast as the core allows to one that gives way to everything that is measured; how many.
fn flood(datagrams: &[Vec<u8>], target: SocketAddr, stop: &AtomicBool) -> Result<u64> {
    let mut sent = 0;
    if datagrams.is_empty() {
        return Ok(sent);
    }
    // Before everything else on this machine, but after what is measured.
    rustix::process::setpriority_process(Some(rustix::thread::gettid()), -15)?;
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(target)?;
    let mut bursts = datagrams.chunks(BURST).cycle();
    while !stop.load(Ordering::Relaxed) {
        for datagram in bursts.next().unwrap_or_default() {
            // It fails on a full queue, or for an ICMP error for an earlier one.
            sent += u64::from(socket.send(datagram).is_ok());
        }
    }
    Ok(sent)
}

/// Frames that the uplink has received.
fn received(gateway: &NetNs) -> Result<u64> {
    gateway.run(|| {
        let text = std::fs::read_to_string("/proc/thread-self/net/dev")?;
        let line = text.lines().find_map(|line| line.trim_start().strip_prefix("eth0:"));
        let packets = line.and_then(|line| line.split_whitespace().nth(1)).context("eth0's counters")?;
        Ok(packets.parse()?)
    })
}

#[derive(Debug, Default, PartialEq)]
struct Pings {
    times: Vec<Duration>,
    lost_percent: f64,
}

/// Fifty echoes a second through the tunnel; all may be lost.
fn ping(client: &NetNs, address: IpAddr, seconds: u32) -> Result<Pings> {
    let (count, address) = ((seconds * 50).to_string(), address.to_string());
    let command = ["ping", "-n", "-i", "0.02", "-c", &count, "-W", "1", &address];
    let said = process::run(client, Duration::from_secs(u64::from(seconds) + 10), &command)?;
    Ok(read_pings(&said.stdout, seconds * 50))
}

fn read_pings(text: &str, sent: u32) -> Pings {
    let times: Vec<Duration> = text
        .lines()
        .filter_map(|line| line.split_once("time=")?.1.split(' ').next()?.parse::<f64>().ok())
        .map(|ms| Duration::from_secs_f64(ms / 1e3))
        .collect();
    let lost_percent = 100.0 * (1.0 - times.len() as f64 / f64::from(sent.max(1)));
    Pings { times, lost_percent: lost_percent.max(0.0) }
}

/// One request every 20 ms, each on a connection of its own.
fn healthz(stop: &AtomicBool) -> Result<Vec<Duration>> {
    let address = SocketAddr::from(([127, 0, 0, 1], 8080));
    let mut times = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let started = Instant::now();
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).context("/healthz does not answer within 5 s")?;
        ensure!(answer.starts_with(b"HTTP/1.1 200"), "/healthz: {}", String::from_utf8_lossy(&answer));
        times.push(started.elapsed());
        std::thread::sleep(Duration::from_millis(20));
    }
    ensure!(!times.is_empty(), "no request was made");
    Ok(times)
}

/// Of `times` in any order; zero if there are none.
fn percentile(times: &[Duration], percent: usize) -> Duration {
    let mut times = times.to_vec();
    times.sort_unstable();
    let rank = (times.len() * percent).div_ceil(100);
    times.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_ranks() {
        let times: Vec<Duration> = (1..=100).rev().map(Duration::from_millis).collect();
        assert_eq!(percentile(&times, 50), Duration::from_millis(50));
        assert_eq!(percentile(&times, 99), Duration::from_millis(99));
        assert_eq!(percentile(&times[..1], 50), Duration::from_millis(100));
        assert_eq!(percentile(&[], 50), Duration::ZERO);
    }

    #[test]
    fn echoes_are_read() {
        let text = "PING 1 (1) 56(84) bytes of data.\n64 bytes from 1: icmp_seq=1 ttl=63 time=0.250 ms\n\
                    64 bytes from 1: icmp_seq=3 ttl=63 time=2 ms\n";
        let pings = read_pings(text, 4);
        assert_eq!(pings.times, [Duration::from_micros(250), Duration::from_millis(2)]);
        assert_eq!(pings.lost_percent, 50.0);
    }

    #[test]
    fn a_forged_initiation_has_the_form_of_one() {
        let gateway = PublicKey::from(&StaticSecret::from([7; 32]));
        let bytes = initiation(*gateway.as_bytes()).unwrap();
        assert_eq!((bytes.len(), &bytes[..4]), (148, &[1, 0, 0, 0][..]));
    }
}
