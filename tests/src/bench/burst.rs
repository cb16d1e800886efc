//! UDP in bursts that one system call hands to the kernel, as QUIC stacks send; iperf3 sends one datagram a call.
//!
//! ```text
//!   client0 -- "hello" until it is heard --> LAN host        opens NAT and conntrack, names the way back
//!   sender  == bursts, paced ==> receiver                    for `seconds`
//! ```

use std::{
    io::{ErrorKind, IoSliceMut},
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use quinn_udp::{RecvMeta, Transmit, UdpSocketState};

use super::{bed::Who, traffic::Direction};
use crate::net::NetNs;

/// Where the LAN host waits on each contender's address.
const PORT: u16 = 5302;
const PATIENCE: Duration = Duration::from_secs(5);
/// How long what is under way may take behind the last burst.
const GRACE: Duration = Duration::from_millis(200);
/// The longest message, however many datagrams it was.
const MESSAGE: usize = 65_536;

/// What is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bursts {
    /// Payload of a datagram.
    pub(super) bytes: u32,
    pub(super) mbit: u32,
    /// Datagrams of one system call.
    pub(super) datagrams: u32,
}

/// What was sent and what arrived, in datagrams.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen {
    pub(super) sent: u64,
    pub(super) arrived: u64,
    pub(super) seconds: f64,
}

/// Sends between a host and the LAN host, through `who`.
///
/// # Errors
/// If the LAN host hears no hello, or a socket fails.
pub(super) fn run(
    client: &NetNs,
    lan: &NetNs,
    who: Who,
    bursts: Bursts,
    direction: Direction,
    seconds: u32,
) -> Result<Seen> {
    let [target, address] = [who.target(), who.address()].map(|ip| SocketAddr::from((ip, PORT)));
    let far = lan.run(|| Ok(UdpSocket::bind(address)?)).context("on the LAN host")?;
    let near =
        client.run(|| Ok(UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?)).context("on the client's host")?;
    let from = greet(&near, &far, target)?;
    let ((sender, to), receiver) = match direction {
        Direction::Outbound => ((&near, target), &far),
        Direction::Inbound => ((&far, from), &near),
    };
    let over = AtomicBool::new(false);
    let (ready, is_ready) = mpsc::channel();
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| receive(receiver, bursts.bytes, &over, &ready));
        is_ready.recv_timeout(PATIENCE).context("the receiver does not start")?;
        let started = Instant::now();
        let sent = send(sender, to, bursts, Duration::from_secs(seconds.into()));
        let elapsed = started.elapsed().as_secs_f64();
        std::thread::sleep(GRACE);
        over.store(true, Ordering::Relaxed);
        let arrived = receiver.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let sent = sent?;
        ensure!(arrived <= sent, "{arrived} datagrams arrived of {sent}");
        Ok(Seen { sent, arrived, seconds: elapsed })
    })
}

/// Returns where the far end heard the near one.
fn greet(near: &UdpSocket, far: &UdpSocket, target: SocketAddr) -> Result<SocketAddr> {
    far.set_read_timeout(Some(Duration::from_millis(100)))?;
    let deadline = Instant::now() + PATIENCE;
    let mut buffer = [0; 16];
    let mut heard = None;
    while heard.is_none() && Instant::now() < deadline {
        near.send_to(b"hello", target)?;
        heard = far.recv_from(&mut buffer).ok();
    }
    let (_, from) = heard.context("the LAN host hears no hello")?;
    // Others that were repeated are no datagrams of a burst.
    std::thread::sleep(Duration::from_millis(10));
    far.set_nonblocking(true)?;
    while far.recv_from(&mut buffer).is_ok() {}
    Ok(from)
}

/// How many datagrams were sent in `time`, evenly.
fn send(socket: &UdpSocket, to: SocketAddr, bursts: Bursts, time: Duration) -> Result<u64> {
    let state = UdpSocketState::new(socket.into())?;
    ensure!(
        state.max_gso_segments() >= bursts.datagrams as usize,
        "the kernel has no UDP segmentation offload"
    );
    socket.set_nonblocking(false)?;
    let contents = vec![0x5a; (bursts.bytes * bursts.datagrams) as usize];
    let transmit = Transmit {
        destination: to,
        ecn: None,
        contents: &contents,
        segment_size: Some(bursts.bytes as usize),
        src_ip: None,
    };
    let burst_bits = 8.0 * contents.len() as f64;
    let pause = Duration::from_secs_f64(burst_bits / (f64::from(bursts.mbit) * 1e6));
    let started = Instant::now();
    let mut sent = 0;
    let mut nth = 0;
    while started.elapsed() < time {
        state.try_send(socket.into(), &transmit)?;
        sent += u64::from(bursts.datagrams);
        nth += 1;
        // What a late wake-up has missed is caught up on.
        std::thread::sleep((pause * nth).saturating_sub(started.elapsed()));
    }
    Ok(sent)
}

/// Datagrams of `bytes` that arrive until it is `over`.
fn receive(socket: &UdpSocket, bytes: u32, over: &AtomicBool, ready: &mpsc::Sender<()>) -> Result<u64> {
    let state = UdpSocketState::new(socket.into())?;
    let _ = state.set_recv_buffer_size(socket.into(), 4 << 20);
    socket.set_nonblocking(false)?;
    socket.set_read_timeout(Some(GRACE / 4))?;
    let mut buffer = vec![0; MESSAGE];
    let mut arrived = 0;
    let _ = ready.send(());
    while !over.load(Ordering::Relaxed) {
        let mut meta = [RecvMeta::default()];
        match state.recv(socket.into(), &mut [IoSliceMut::new(&mut buffer)], &mut meta) {
            Ok(_) => {
                arrived += (meta[0].len / bytes as usize) as u64;
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(e) => return Err(e).context("receiving bursts"),
        }
    }
    Ok(arrived)
}
