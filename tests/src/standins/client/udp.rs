//! The client's two UDP sockets, with GRO on receive and GSO on send (connections.md section 2).

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use anyhow::{Context as _, Result};
use quinn_udp::{BATCH_SIZE, EcnCodepoint, RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use rustix::{
    io::Errno,
    net::{RecvFlags, recv, sockopt::set_socket_recv_buffer_size_force},
};
use socket2::{Domain, Protocol, Socket, Type};

/// 64 segments of 1316 bytes (section 2.3).
const BUFFER: usize = 64 * 1316;
/// Receive buffer that survives a burst while the thread is busy.
const SOCKET_BUFFER: usize = 8 << 20;
/// Receive buffer of a load: some milliseconds, in which the far ends may have no core.
const LOAD_BUFFER: usize = 32 << 20;
/// Batches that are skimmed before others have their turn.
const SKIM_LIMIT: usize = 64;
/// Bytes in one GSO send (section 2.4, the smaller of the two families).
const MAX_GSO_BYTES: usize = 65_535 - 68;

/// One socket.
pub(super) struct Udp {
    socket: std::net::UdpSocket,
    state: UdpSocketState,
    port: u16,
}

/// What one read brought. It is apart from the socket, so that handling a datagram may send.
pub(super) struct Inbox {
    buffers: Vec<Vec<u8>>,
    metas: [RecvMeta; BATCH_SIZE],
    count: usize,
    port: u16,
}

impl Inbox {
    /// Room for one `recvmmsg` of GRO batches.
    pub(super) fn new() -> Self {
        let buffers = vec![vec![0; BUFFER]; BATCH_SIZE];
        Self { buffers, metas: [RecvMeta::default(); BATCH_SIZE], count: 0, port: 0 }
    }

    /// Every datagram of the last read, cut out of its GRO batch.
    pub(super) fn datagrams(&self) -> impl Iterator<Item = Datagram<'_>> {
        let received = self.metas.iter().zip(&self.buffers).take(self.count);
        received.filter_map(|(meta, buffer)| Some((meta, meta.dst_ip?, &buffer[..meta.len]))).flat_map(
            |(meta, ip, bytes)| {
                let local = SocketAddr::new(ip, self.port);
                let congested = meta.ecn == Some(EcnCodepoint::Ce);
                let cut = bytes.chunks(meta.stride.max(1));
                cut.map(move |bytes| Datagram { from: meta.addr, local, congested, bytes })
            },
        )
    }
}

/// What [`Udp::skim`] threw away.
pub(super) struct Skimmed {
    pub(super) datagrams: u64,
    /// As the kernel delivered them.
    pub(super) batches: usize,
}

/// A received datagram, cut out of its batch.
pub(super) struct Datagram<'a> {
    pub(super) from: SocketAddr,
    pub(super) local: SocketAddr,
    pub(super) congested: bool,
    pub(super) bytes: &'a [u8],
}

impl Udp {
    /// Binds the wildcard address; another port is taken when `port` is in use.
    pub(super) fn bind(v6: bool, port: u16) -> Result<Self> {
        let ip: IpAddr = if v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
        let socket =
            Socket::new(if v6 { Domain::IPV6 } else { Domain::IPV4 }, Type::DGRAM, Some(Protocol::UDP))?;
        if v6 {
            socket.set_only_v6(true)?;
        }
        socket
            .bind(&SocketAddr::new(ip, port).into())
            .or_else(|_| socket.bind(&SocketAddr::new(ip, 0).into()))
            .context("cannot bind a UDP socket")?;
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        // The kernel's limit may be lower; then it is what we get.
        let _ = state.set_recv_buffer_size(UdpSockRef::from(&socket), SOCKET_BUFFER);
        let _ = state.set_send_buffer_size(UdpSockRef::from(&socket), SOCKET_BUFFER);
        let socket: std::net::UdpSocket = socket.into();
        let port = socket.local_addr()?.port();
        Ok(Self { socket, state, port })
    }

    /// Reads once into `inbox`. Returns false when there was nothing to read.
    pub(super) fn read(&self, inbox: &mut Inbox) -> io::Result<bool> {
        inbox.count = 0;
        let mut slices: [IoSliceMut<'_>; BATCH_SIZE] = {
            let mut buffers = inbox.buffers.iter_mut();
            std::array::from_fn(|_| IoSliceMut::new(buffers.next().map_or(&mut [], Vec::as_mut_slice)))
        };
        match self.state.recv(UdpSockRef::from(&self.socket), &mut slices, &mut inbox.metas) {
            Ok(count) => inbox.count = count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            // An ICMP error for something sent earlier; the next read works.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(error) => return Err(error),
        }
        inbox.port = self.port;
        Ok(true)
    }

    /// A receive buffer for a load, whatever the kernel's limit is.
    pub(super) fn widen(&self) -> io::Result<()> {
        Ok(set_socket_recv_buffer_size_force(&self.socket, LOAD_BUFFER)?)
    }

    /// Counts WireGuard data messages of `length` bytes without copying them out of the kernel; GRO may have merged them.
    pub(super) fn skim(&self, length: usize) -> io::Result<Skimmed> {
        let mut skimmed = Skimmed { datagrams: 0, batches: 0 };
        let mut kind = [0; 1];
        while skimmed.batches < SKIM_LIMIT {
            match recv(&self.socket, &mut kind, RecvFlags::PEEK | RecvFlags::TRUNC | RecvFlags::DONTWAIT) {
                Ok((_, bytes)) if kind == [4] && bytes % length == 0 => {
                    recv(&self.socket, &mut kind, RecvFlags::TRUNC | RecvFlags::DONTWAIT)?;
                    skimmed.datagrams += (bytes / length) as u64;
                    skimmed.batches += 1;
                }
                Ok(_) | Err(Errno::AGAIN) => break,
                Err(Errno::INTR | Errno::CONNREFUSED) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(skimmed)
    }

    /// Sends; waits while the socket's buffer is full.
    pub(super) fn send(
        &self,
        source: Option<IpAddr>,
        to: SocketAddr,
        ecn: u8,
        segment: Option<usize>,
        bytes: &[u8],
    ) -> io::Result<()> {
        let transmit = Transmit {
            destination: to,
            ecn: EcnCodepoint::from_bits(ecn),
            contents: bytes,
            segment_size: segment,
            src_ip: source,
        };
        loop {
            match self.state.try_send(UdpSockRef::from(&self.socket), &transmit) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait_writable()?,
                other => return other,
            }
        }
    }

    fn wait_writable(&self) -> io::Result<()> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let timeout = Timespec::try_from(Duration::from_millis(100)).expect("a short time fits");
        poll(&mut [PollFd::new(&self.socket, PollFlags::OUT)], Some(&timeout))?;
        Ok(())
    }

    /// How many segments one send may have.
    pub(super) fn max_segments(&self) -> usize {
        self.state.max_gso_segments()
    }
}

impl AsFd for Udp {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Datagrams of one size to one place, on their way into one send.
#[derive(Default)]
pub(super) struct Burst {
    key: Option<(Option<IpAddr>, SocketAddr, u8)>,
    bytes: Vec<u8>,
    segment: usize,
    /// A shorter datagram was added, so nothing may follow.
    closed: bool,
}

impl Burst {
    /// Lets `fill` append one datagram, sending what was there before if it does not fit in one send.
    ///
    /// `fill` gets the buffer and appends exactly one datagram, or nothing.
    pub(super) fn add(
        &mut self,
        sockets: &Sockets,
        source: Option<IpAddr>,
        to: SocketAddr,
        ecn: u8,
        datagram_len: usize,
        fill: impl FnOnce(&mut Vec<u8>),
    ) {
        let key = Some((source, to, ecn));
        let segments = self.bytes.len().checked_div(self.segment).unwrap_or(0);
        let fits = self.key == key
            && !self.closed
            && datagram_len <= self.segment
            && segments < sockets.max_segments(to)
            && self.bytes.len() + datagram_len <= MAX_GSO_BYTES;
        if !fits {
            self.flush(sockets);
            self.key = key;
            self.segment = datagram_len;
        }
        fill(&mut self.bytes);
        self.closed = datagram_len < self.segment;
    }

    /// Sends what is there.
    pub(super) fn flush(&mut self, sockets: &Sockets) {
        if let Some((source, to, ecn)) = self.key.take()
            && !self.bytes.is_empty()
        {
            let segment = (self.bytes.len() > self.segment).then_some(self.segment);
            sockets.send(source, to, ecn, segment, &self.bytes);
        }
        self.bytes.clear();
        self.segment = 0;
        self.closed = false;
    }
}

/// One socket per family; either may be missing.
pub(super) struct Sockets {
    pub(super) v4: Option<Udp>,
    pub(super) v6: Option<Udp>,
}

impl Sockets {
    /// Binds both families; one may fail.
    pub(super) fn bind(port: u16) -> Result<Self> {
        let (v4, v6) = (Udp::bind(false, port), Udp::bind(true, port));
        match (v4, v6) {
            (Err(error), Err(_)) => Err(error),
            (v4, v6) => Ok(Self { v4: v4.ok(), v6: v6.ok() }),
        }
    }

    /// Sends on the socket of the destination's family; a datagram that cannot be sent is lost, as on any network.
    pub(super) fn send(
        &self,
        source: Option<IpAddr>,
        to: SocketAddr,
        ecn: u8,
        segment: Option<usize>,
        bytes: &[u8],
    ) {
        let socket = if to.is_ipv4() { &self.v4 } else { &self.v6 };
        if let Some(socket) = socket {
            // Unreachable networks are normal while candidates are tried.
            let _ = socket.send(source, to, ecn, segment, bytes);
        }
    }

    fn max_segments(&self, to: SocketAddr) -> usize {
        let socket = if to.is_ipv4() { &self.v4 } else { &self.v6 };
        socket.as_ref().map_or(1, Udp::max_segments)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_keeps_datagrams_apart_and_in_order() {
        let sockets = Sockets::bind(0).unwrap();
        let receiver = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        receiver.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        let to = receiver.local_addr().unwrap();
        let mut burst = Burst::default();
        let sizes = [100, 100, 100, 40, 100, 100, 7];
        for (nth, size) in (0_u8..).zip(sizes) {
            burst.add(&sockets, None, to, 0, size, |buffer| buffer.extend(std::iter::repeat_n(nth, size)));
        }
        burst.flush(&sockets);
        let mut buffer = [0; 2000];
        for (nth, size) in (0_u8..).zip(sizes) {
            let length = receiver.recv(&mut buffer).unwrap();
            assert_eq!((length, buffer[0]), (size, nth));
        }
    }
}
