//! The UDP sockets of the data plane, two for each worker: how they are opened, and batches in (connections.md
//! section 2).
//!
//! Everything travels through these: relay control traffic, relayed data, direct data. Batches out are `gso.rs`.

use std::{
    io::{self, ErrorKind, IoSliceMut},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::{AsFd, BorrowedFd},
};

use anyhow::{Context as _, Result, bail};
use arrayvec::ArrayVec;
use gateway_common::{Counters, DropReason};
use gateway_proto::{Datagram, Ecn, Transmit, addr::MAX_DATAGRAM};
use nix::{
    setsockopt_impl, sockopt_impl,
    sys::socket::{
        setsockopt,
        sockopt::{ReceiveTimestampns, UdpGroSegment},
    },
};
use quinn_udp::{BATCH_SIZE, EcnCodepoint, RecvMeta, UdpSocketState};
use socket2::{Domain, Protocol, Socket, Type};

use super::{
    capabilities::{Capabilities, Capability, InUse, NOT_OFFERED},
    sendmmsg,
};

/// What every socket towards the Internet is marked with, so that its packets skip the tunnel's routes.
pub const MARK: u32 = 0xfd00_2021;
/// The port both sockets want: 49152 + 3473.
pub const PORT: u16 = 52_625;
/// What is asked for as receive buffer, in bytes: 10 ms at 10 Gbit/s, rounded up to a power of two.
pub const RECV_BUFFER: usize = 16 << 20;
/// What is asked for as send buffer, in bytes: 1 ms at 10 Gbit/s, rounded up to a power of two.
pub const SEND_BUFFER: usize = 2 << 20;
/// Smaller buffers are not asked for.
const MIN_BUFFER: usize = 64 << 10;

/// Kernel buffer sizes of each socket, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BufferSizes {
    /// SO_RCVBUF.
    pub recv: usize,
    /// SO_SNDBUF.
    pub send: usize,
}

impl BufferSizes {
    /// The defaults, or what FIREZONE_UDP_RECV_BUFFER_SIZE and FIREZONE_UDP_SEND_BUFFER_SIZE say.
    ///
    /// # Errors
    /// A variable that is not a number of bytes.
    pub fn from_env() -> Result<Self> {
        Self::from_vars(|name| std::env::var(name).ok())
    }

    fn from_vars(var: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let size = |name: &str, default: usize| match var(name).filter(|text| !text.is_empty()) {
            None => Ok(default),
            Some(text) => match text.trim().parse() {
                Ok(bytes) => Ok(bytes),
                Err(_) => bail!("{name} must be a number of bytes, not {text:?}"),
            },
        };
        Ok(Self {
            recv: size("FIREZONE_UDP_RECV_BUFFER_SIZE", RECV_BUFFER)?,
            send: size("FIREZONE_UDP_SEND_BUFFER_SIZE", SEND_BUFFER)?,
        })
    }
}

/// A worker's sockets; at least one is there.
pub struct Sockets {
    /// 0.0.0.0
    pub v4: Option<DataSocket>,
    /// [::], IPv6 only
    pub v6: Option<DataSocket>,
}

impl Sockets {
    /// Opens both families for each of `workers`; one family may be missing on this machine. The sockets of one family
    /// share a port, in the order of the workers.
    ///
    /// # Errors
    /// Neither family works, or the mark that keeps our packets out of our own tunnel is refused.
    pub fn open(workers: usize, sizes: BufferSizes, allowed: Capabilities) -> Result<Vec<Self>> {
        let v4 = DataSocket::open(workers, Ipv4Addr::UNSPECIFIED.into(), sizes, allowed)?;
        let v6 = DataSocket::open(workers, Ipv6Addr::UNSPECIFIED.into(), sizes, allowed)?;
        match (&v4, &v6) {
            (Err(v4), Err(v6)) => bail!("No UDP socket could be opened: IPv4: {v4}; IPv6: {v6}"),
            (Err(e), _) => tracing::info!("Going on without IPv4: {e}"),
            (_, Err(e)) => tracing::info!("Going on without IPv6: {e}"),
            _ => {}
        }
        let mut v4 = v4.unwrap_or_default().into_iter();
        let mut v6 = v6.unwrap_or_default().into_iter();
        let sockets: Vec<Self> = (0..workers).map(|_| Self { v4: v4.next(), v6: v6.next() }).collect();
        let port = |socket: &Option<DataSocket>| socket.as_ref().map(DataSocket::port);
        if let Some(first) = sockets.first() {
            tracing::info!(ipv4_port = port(&first.v4), ipv6_port = port(&first.v6), "UDP sockets are open");
        }
        Ok(sockets)
    }

    /// Further handles of the same sockets, for the control thread's own datagrams.
    pub fn try_clone(&self) -> io::Result<Self> {
        let clone = |socket: &Option<DataSocket>| socket.as_ref().map(DataSocket::try_clone).transpose();
        Ok(Self { v4: clone(&self.v4)?, v6: clone(&self.v6)? })
    }

    /// Says what of batching the kernel does not offer.
    pub fn report(&self, in_use: &mut InUse) {
        let sockets = || [&self.v4, &self.v6].into_iter().flatten();
        if !sockets().all(|socket| socket.state.gro_segments() > 1) {
            in_use.missing(Capability::UdpGro, NOT_OFFERED);
        }
        if !sockets().all(|socket| socket.state.max_gso_segments() > 1) {
            in_use.missing(Capability::UdpGso, NOT_OFFERED);
        }
        if !sockets().all(|socket| sendmmsg::is_offered(socket.as_fd())) {
            in_use.missing(Capability::Sendmmsg, NOT_OFFERED);
        }
    }

    /// Sends one datagram of the control plane; STUN and TURN repeat what the kernel refuses.
    ///
    /// # Errors
    /// Why it was not sent, as far as this machine knows.
    pub fn transmit(&self, transmit: &Transmit) -> io::Result<()> {
        let socket = if transmit.dst.is_ipv4() { &self.v4 } else { &self.v6 };
        let socket = socket.as_ref().ok_or(ErrorKind::AddrNotAvailable)?;
        socket.state.try_send(
            (&socket.socket).into(),
            &quinn_udp::Transmit {
                destination: transmit.dst,
                ecn: None,
                contents: &transmit.payload,
                segment_size: None,
                src_ip: transmit.src.map(|src| src.ip()),
            },
        )
    }
}

/// One bound, marked, non-blocking socket.
pub struct DataSocket {
    pub(super) socket: UdpSocket,
    pub(super) state: UdpSocketState,
    port: u16,
    v6: bool,
    allowed: Capabilities,
    takes_many: bool,
}

impl DataSocket {
    /// One for each of `workers`, all on one port. The outer error ends the gateway; the inner one means that this family
    /// is not available.
    fn open(
        workers: usize,
        ip: IpAddr,
        sizes: BufferSizes,
        allowed: Capabilities,
    ) -> Result<io::Result<Vec<Self>>> {
        let mut sockets = Vec::with_capacity(workers);
        for _ in 0..workers {
            let domain = if ip.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
            let socket = match Socket::new(domain, Type::DGRAM, Some(Protocol::UDP)) {
                Ok(socket) => socket,
                Err(e) => return Ok(Err(e)),
            };
            socket.set_mark(MARK).context(
                "Failed to mark a UDP socket (SO_MARK), without which the tunnel would carry its own packets; \
                 run as root or grant CAP_NET_ADMIN",
            )?;
            sockets.push(socket);
        }
        Ok(bind_group(&sockets, ip).and_then(|()| {
            sockets.into_iter().map(|socket| Self::set_up(socket, ip, sizes, allowed)).collect()
        }))
    }

    fn set_up(socket: Socket, ip: IpAddr, sizes: BufferSizes, allowed: Capabilities) -> io::Result<Self> {
        size_buffers(&socket, sizes);
        let socket = UdpSocket::from(socket);
        let state = state_of(&socket, allowed)?;
        let port = socket.local_addr()?.port();
        let takes_many = allowed.allow(Capability::Sendmmsg) && sendmmsg::is_offered(socket.as_fd());
        Ok(Self { socket, state, port, v6: ip.is_ipv6(), allowed, takes_many })
    }

    fn try_clone(&self) -> io::Result<Self> {
        let socket = self.socket.try_clone()?;
        let state = state_of(&socket, self.allowed)?;
        let Self { port, v6, allowed, takes_many, .. } = *self;
        Ok(Self { socket, state, port, v6, allowed, takes_many })
    }

    /// The port the kernel gave us.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// May several datagrams be sent at once, and does the kernel know how?
    pub fn segments(&self) -> bool {
        self.allowed.allow(Capability::UdpGso) && self.state.max_gso_segments() > 1
    }

    /// May several sends be one system call, and does the kernel know how?
    pub fn takes_many(&self) -> bool {
        self.takes_many
    }

    /// A new state in place of one that quinn-udp has spoiled; see [`state_of`].
    pub fn renew(&mut self) {
        if let Ok(state) = state_of(&self.socket, self.allowed) {
            self.state = state;
        }
    }

    /// Which of the two it is.
    pub fn is_v6(&self) -> bool {
        self.v6
    }
}

impl AsFd for DataSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Binds `sockets` to one port of `ip`, the usual one if nobody has it.
///
/// The first is bound without SO_REUSEPORT: a stranger on the port is an error then, even one with that option, whose
/// group we would otherwise join and share its packets. Once the port is ours, the group is opened to the others
/// (a group begins with whoever is bound and has the option when the second comes).
fn bind_group(sockets: &[Socket], ip: IpAddr) -> io::Result<()> {
    let mut port = PORT;
    for (i, socket) in sockets.iter().enumerate() {
        if ip.is_ipv6() {
            socket.set_only_v6(true)?;
            if let Err(e) = setsockopt(socket, Ipv6AddrPreferences, &PREFER_PUBLIC) {
                tracing::debug!("Temporary IPv6 source addresses stay preferred: {e}");
            }
        }
        if i > 0 {
            socket.set_reuse_port(true)?;
            socket.bind(&SocketAddr::new(ip, port).into())?;
            continue;
        }
        if socket.bind(&SocketAddr::new(ip, port).into()).is_err() {
            socket.bind(&SocketAddr::new(ip, 0).into())?;
        }
        port = socket.local_addr()?.as_socket().map_or(0, |addr| addr.port());
        if sockets.len() > 1 {
            socket.set_reuse_port(true)?;
        }
    }
    Ok(())
}

/// quinn-udp's state of a socket, which sets its options.
///
/// It also asks for receive timestamps, and its buffer for control messages (96 bytes) is too short for those
/// together with what we need: of a GRO super-datagram the kernel then leaves out the TOS or traffic class, so that
/// ECN is lost. So they are turned off again.
fn state_of(socket: &UdpSocket, allowed: Capabilities) -> io::Result<UdpSocketState> {
    let state = UdpSocketState::new(socket.into())?;
    setsockopt(socket, ReceiveTimestampns, &false)?;
    if !allowed.allow(Capability::UdpGro) {
        setsockopt(socket, UdpGroSegment, &false)?;
    }
    Ok(state)
}

sockopt_impl!(
    /// RFC 5014; in no crate's list yet.
    Ipv6AddrPreferences,
    SetOnly,
    libc::IPPROTO_IPV6,
    IPV6_ADDR_PREFERENCES,
    libc::c_int
);
/// include/uapi/linux/in6.h
const IPV6_ADDR_PREFERENCES: libc::c_int = 72;
/// IPV6_PREFER_SRC_PUBLIC
const PREFER_PUBLIC: libc::c_int = 2;

/// Past the sysctl limits if we may; else as much as the kernel accepts.
fn size_buffers(socket: &Socket, sizes: BufferSizes) {
    if rustix::net::sockopt::set_socket_recv_buffer_size_force(socket, sizes.recv).is_err() {
        halve_until_accepted(sizes.recv, |size| socket.set_recv_buffer_size(size));
    }
    if rustix::net::sockopt::set_socket_send_buffer_size_force(socket, sizes.send).is_err() {
        halve_until_accepted(sizes.send, |size| socket.set_send_buffer_size(size));
    }
    // The kernel reports twice what it was asked for: it counts its own overhead.
    let shown = |size: io::Result<usize>| size.map_or(0, |s| s / 2);
    tracing::debug!(
        recv = shown(socket.recv_buffer_size()),
        send = shown(socket.send_buffer_size()),
        "UDP socket buffers"
    );
}

fn halve_until_accepted(mut size: usize, set: impl Fn(usize) -> io::Result<()>) {
    while set(size).is_err() && size / 2 >= MIN_BUFFER {
        size /= 2;
    }
}

/// Receive buffers for one `recvmmsg`, used by both sockets in turn and made once.
pub struct Receiver {
    /// [`BATCH_SIZE`] buffers of [`MESSAGE`] bytes.
    bytes: Box<[u8]>,
    meta: [RecvMeta; BATCH_SIZE],
    /// How many messages the next call offers room for: describing the room for [`BATCH_SIZE`] costs more than receiving
    /// one. Twice of what the last call brought.
    width: usize,
}

/// Of what is offered at least: a message, and the answer whether there is another.
const MIN_WIDTH: usize = 2;

/// A GRO super-datagram is a UDP payload like any other: it never exceeds the 16-bit length field.
const MESSAGE: usize = 65_536;

impl Receiver {
    /// With its buffers; pages are touched as traffic needs them.
    pub fn new() -> Self {
        Self {
            bytes: vec![0; MESSAGE * BATCH_SIZE].into_boxed_slice(),
            meta: std::array::from_fn(|_| RecvMeta::default()),
            width: MIN_WIDTH,
        }
    }

    /// One `recvmmsg`.
    ///
    /// # Errors
    /// `WouldBlock` when nothing waits.
    pub fn recv(&mut self, socket: &DataSocket) -> io::Result<Received<'_>> {
        let width = self.width;
        let mut buffers: ArrayVec<IoSliceMut<'_>, BATCH_SIZE> =
            self.bytes.chunks_exact_mut(MESSAGE).take(width).map(IoSliceMut::new).collect();
        let messages = socket.state.recv((&socket.socket).into(), &mut buffers, &mut self.meta)?;
        drop(buffers);
        self.width = (2 * messages).clamp(MIN_WIDTH, BATCH_SIZE);
        let full = messages == width;
        Ok(Received { bytes: &self.bytes, meta: &self.meta[..messages], port: socket.port, full })
    }
}

/// What one `recvmmsg` brought.
pub struct Received<'a> {
    bytes: &'a [u8],
    meta: &'a [RecvMeta],
    port: u16,
    full: bool,
}

impl<'a> Received<'a> {
    /// Whether the socket may hold more.
    pub fn is_full(&self) -> bool {
        self.full
    }

    /// How many datagrams it is, useless ones included.
    pub fn count(&self) -> usize {
        self.meta.iter().map(datagrams_of).sum()
    }

    /// How many messages it was.
    #[cfg(test)]
    pub fn messages(&self) -> usize {
        self.meta.len()
    }

    /// Every datagram, super-datagrams cut at their stride. What cannot be used is counted in `drops`.
    pub fn datagrams(self, drops: &mut Counters) -> impl Iterator<Item = Datagram<'a>> + use<'a> {
        let usable = |meta: &RecvMeta| match refusal(meta) {
            None => true,
            Some(reason) => {
                drops.add(reason, datagrams_of(meta) as u64);
                false
            }
        };
        // Filtered before anything is yielded, so that `drops` is free again when the caller gets the iterator.
        let usable: ArrayVec<bool, BATCH_SIZE> = self.meta.iter().map(usable).collect();
        let Self { bytes, meta, port, .. } = self;
        meta.iter().enumerate().filter(move |(i, _)| usable[*i]).flat_map(move |(i, meta)| {
            let message = &bytes[i * MESSAGE..][..meta.len];
            let local = SocketAddr::new(meta.dst_ip.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)), port);
            let ecn = ecn_of(meta.ecn);
            // An empty datagram is one datagram, though it has no chunk.
            let empty = message.is_empty().then_some(message);
            empty.into_iter().chain(message.chunks(meta.stride.max(1))).map(move |payload| Datagram {
                local,
                from: meta.addr,
                ecn,
                payload,
            })
        })
    }
}

/// How many datagrams a received message is.
fn datagrams_of(meta: &RecvMeta) -> usize {
    if meta.stride == 0 { 1 } else { meta.len.div_ceil(meta.stride).max(1) }
}

/// Why a received message cannot be used.
fn refusal(meta: &RecvMeta) -> Option<DropReason> {
    if meta.dst_ip.is_none() {
        return Some(DropReason::NoDestination);
    }
    // "Stride 0 or stride > 1316: whole message dropped" (connections.md section 2.3); an empty datagram is one too,
    // but is counted where the others are classified.
    (meta.stride > MAX_DATAGRAM || (meta.stride == 0 && meta.len > 0))
        .then_some(DropReason::OversizedDatagram)
}

fn ecn_of(codepoint: Option<EcnCodepoint>) -> Ecn {
    codepoint.map_or(Ecn::NotEct, |c| Ecn::from_bits(c as u8))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn buffer_sizes_come_from_the_environment() {
        let table = [
            (None, Ok(RECV_BUFFER)),
            (Some(""), Ok(RECV_BUFFER)),
            (Some("65536"), Ok(65_536)),
            (Some(" 1 "), Ok(1)),
            (Some("16M"), Err("FIREZONE_UDP_RECV_BUFFER_SIZE must be a number of bytes, not \"16M\"")),
            (Some("-1"), Err("FIREZONE_UDP_RECV_BUFFER_SIZE must be a number of bytes, not \"-1\"")),
        ];
        for (value, expect) in table {
            let var =
                |name: &str| value.filter(|_| name == "FIREZONE_UDP_RECV_BUFFER_SIZE").map(str::to_owned);
            let got = BufferSizes::from_vars(var);
            match expect {
                Ok(recv) => assert_eq!(got.unwrap(), BufferSizes { recv, send: SEND_BUFFER }, "{value:?}"),
                Err(error) => assert_eq!(got.unwrap_err().to_string(), error),
            }
        }
    }

    #[test]
    fn refused_sizes_are_halved_down_to_64_kib() {
        let table =
            [(1 << 20, 1 << 18, 1 << 18), (1 << 20, 1 << 20, 1 << 20), (1 << 20, 1, 1 << 16), (3, 1, 3)];
        for (wanted, limit, last) in table {
            let tried = RefCell::new(Vec::new());
            halve_until_accepted(wanted, |size| {
                tried.borrow_mut().push(size);
                if size <= limit { Ok(()) } else { Err(ErrorKind::InvalidInput.into()) }
            });
            assert_eq!(tried.borrow().last(), Some(&last), "{wanted} with a limit of {limit}");
        }
    }

    #[test]
    fn messages_are_cut_at_their_stride_and_useless_ones_counted() {
        let here = Some(IpAddr::V4(Ipv4Addr::LOCALHOST));
        // length, stride, destination -> lengths of the datagrams, or why not and how many
        type Expect = Result<&'static [usize], (DropReason, u64)>;
        let table: &[(usize, usize, Option<IpAddr>, Expect)] = &[
            (3000, 1316, here, Ok(&[1316, 1316, 368])),
            (2632, 1316, here, Ok(&[1316, 1316])),
            (100, 100, here, Ok(&[100])),
            (0, 0, here, Ok(&[0])),
            (3000, 1317, here, Err((DropReason::OversizedDatagram, 3))),
            (3000, 0, here, Err((DropReason::OversizedDatagram, 1))),
            (3000, 1316, None, Err((DropReason::NoDestination, 3))),
            (0, 0, None, Err((DropReason::NoDestination, 1))),
        ];
        for (len, stride, dst_ip, expect) in table {
            let meta = |len, stride, dst_ip| {
                let mut meta = RecvMeta::default();
                (meta.len, meta.stride, meta.dst_ip) = (len, stride, dst_ip);
                meta
            };
            // A good message on either side: one bad message never ends a batch.
            let metas = [meta(1, 1, here), meta(*len, *stride, *dst_ip), meta(2, 2, here)];
            let received = Received { bytes: &vec![0; 3 * MESSAGE], meta: &metas, port: 5, full: false };
            let mut drops = Counters::default();
            let count = received.count();
            let got: Vec<usize> = received.datagrams(&mut drops).map(|d| d.payload.len()).collect();
            let (lengths, counted) = match expect {
                Ok(lengths) => (*lengths, vec![]),
                Err(counted) => (&[][..], vec![*counted]),
            };
            assert_eq!(got, [&[1], lengths, &[2]].concat(), "{len} bytes, stride {stride}");
            let dropped: usize = counted.iter().map(|(_, n)| usize::try_from(*n).unwrap()).sum();
            assert_eq!(count, got.len() + dropped, "{len} bytes, stride {stride}");
            assert_eq!(drops.iter().collect::<Vec<_>>(), counted, "{len} bytes, stride {stride}");
        }
    }
}
