//! `sendmmsg(2)`: several sends in one system call, each with its own destination, source, codepoint and segment size.
//!
//! No crate offers it with control messages per send. What they mean is in udp(7), ip(7) and ipv6(7).

#![expect(unsafe_code, reason = "the call takes addresses of addresses")]
#![expect(
    clippy::cast_possible_truncation,
    reason = "constants and sizes of C types, whose types differ between C libraries"
)]

use std::{
    io,
    mem::zeroed,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd as _, BorrowedFd},
    ptr,
};

use arrayvec::ArrayVec;
use gateway_proto::{Ecn, Route};

/// One send.
#[derive(Debug, Clone, Copy)]
pub struct Message<'a> {
    /// Where from and to.
    pub route: &'a Route,
    /// The payload: one datagram, or several.
    pub bytes: &'a [u8],
    /// The length in bytes of every datagram but the last; `None` if there is one.
    pub segment: Option<usize>,
}

/// How many go with one call at most.
pub const MOST: usize = 64;

/// Whether the kernel (and what filters system calls) lets us use it at all.
pub fn is_offered(socket: BorrowedFd<'_>) -> bool {
    // SAFETY: no message is read, as there are none.
    unsafe { sendmmsg(socket, ptr::null_mut(), 0) == 0 }
}

/// Sends `messages` in order, the first [`MOST`] at most; returns how many were sent, at least one.
///
/// # Errors
/// Why the first was not sent. Why a later one was not is known when that is the first.
pub fn send(socket: BorrowedFd<'_>, messages: &[Message<'_>]) -> io::Result<usize> {
    let messages = &messages[..messages.len().min(MOST)];
    // Everything the headers will point to is in its place before the first header is made.
    let mut names: ArrayVec<Name, MOST> = messages.iter().map(|m| Name::of(&m.route.dst)).collect();
    let mut parts: ArrayVec<libc::iovec, MOST> = messages
        .iter()
        .map(|m| libc::iovec { iov_base: m.bytes.as_ptr().cast_mut().cast(), iov_len: m.bytes.len() })
        .collect();
    let mut controls: ArrayVec<Control, MOST> = messages.iter().map(Control::of).collect();
    let mut headers: ArrayVec<libc::mmsghdr, MOST> = ArrayVec::new();
    for ((name, part), control) in names.iter_mut().zip(&mut parts).zip(&mut controls) {
        // SAFETY: integers and pointers, for which zero is a value; the C libraries disagree about its padding.
        let mut header: libc::mmsghdr = unsafe { zeroed() };
        let inner = &mut header.msg_hdr;
        (inner.msg_name, inner.msg_namelen) = name.raw();
        (inner.msg_iov, inner.msg_iovlen) = (part, 1);
        if control.len > 0 {
            inner.msg_control = control.bytes.as_mut_ptr().cast();
            inner.msg_controllen = control.len as _;
        }
        headers.push(header);
    }
    let count = u32::try_from(headers.len()).unwrap_or(0);
    loop {
        // SAFETY: `count` headers, whose names, parts and control messages live and stay where they are until the end of
        // this function; the kernel reads all of it and writes only `msg_len` of the headers (sendmmsg(2)).
        let sent = unsafe { sendmmsg(socket, headers.as_mut_ptr(), count) };
        if let Ok(sent) = usize::try_from(sent) {
            return Ok(sent);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// The system call itself: in musl, the function of this name is a loop of `sendmsg`, which asks no kernel whether it can.
///
/// # Safety
/// `headers` point to `count` headers as the kernel reads them (zero in what a C library calls padding), and everything
/// that these point to is there.
unsafe fn sendmmsg(socket: BorrowedFd<'_>, headers: *mut libc::mmsghdr, count: u32) -> libc::c_long {
    const FLAGS: libc::c_int = 0;
    // SAFETY: the caller's promise is what the call asks for.
    unsafe { libc::syscall(libc::SYS_sendmmsg, socket.as_raw_fd(), headers, count, FLAGS) }
}

/// A destination as the kernel reads it.
enum Name {
    V4(libc::sockaddr_in),
    V6(libc::sockaddr_in6),
}

impl Name {
    fn of(addr: &SocketAddr) -> Self {
        match addr {
            SocketAddr::V4(addr) => Self::V4(libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: addr.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(addr.ip().octets()) },
                sin_zero: [0; 8],
            }),
            SocketAddr::V6(addr) => Self::V6(libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: addr.port().to_be(),
                sin6_flowinfo: addr.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: addr.ip().octets() },
                sin6_scope_id: addr.scope_id(),
            }),
        }
    }

    fn raw(&mut self) -> (*mut libc::c_void, libc::socklen_t) {
        match self {
            Self::V4(name) => (ptr::from_mut(name).cast(), size_of_val(name) as libc::socklen_t),
            Self::V6(name) => (ptr::from_mut(name).cast(), size_of_val(name) as libc::socklen_t),
        }
    }
}

/// The control messages of one send.
#[repr(C, align(8))]
struct Control {
    bytes: [u8; Self::CAPACITY],
    len: usize,
}

impl Control {
    /// Codepoint, source, segment size.
    const CAPACITY: usize =
        Self::space::<libc::c_int>() + Self::space::<libc::in6_pktinfo>() + Self::space::<u16>();

    fn of(message: &Message<'_>) -> Self {
        let mut control = Self { bytes: [0; Self::CAPACITY], len: 0 };
        let v6 = message.route.dst.is_ipv6();
        if message.route.ecn != Ecn::NotEct {
            let (level, kind) =
                if v6 { (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) } else { (libc::IPPROTO_IP, libc::IP_TOS) };
            control.push(level, kind, libc::c_int::from(message.route.ecn as u8));
        }
        match message.route.src.map(|src| src.ip()) {
            Some(IpAddr::V4(ip)) => {
                let source = libc::in_addr { s_addr: u32::from_ne_bytes(ip.octets()) };
                let info = libc::in_pktinfo {
                    ipi_ifindex: 0,
                    ipi_spec_dst: source,
                    ipi_addr: libc::in_addr { s_addr: 0 },
                };
                control.push(libc::IPPROTO_IP, libc::IP_PKTINFO, info);
            }
            Some(IpAddr::V6(ip)) => {
                let info =
                    libc::in6_pktinfo { ipi6_ifindex: 0, ipi6_addr: libc::in6_addr { s6_addr: ip.octets() } };
                control.push(libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, info);
            }
            None => {}
        }
        if let Some(size) = message.segment {
            control.push(libc::SOL_UDP, libc::UDP_SEGMENT, u16::try_from(size).unwrap_or(u16::MAX));
        }
        control
    }

    /// Bytes that a message with a `T` takes: `CMSG_SPACE`.
    const fn space<T>() -> usize {
        size_of::<libc::cmsghdr>().next_multiple_of(8) + size_of::<T>().next_multiple_of(8)
    }

    fn push<T: Copy>(&mut self, level: libc::c_int, kind: libc::c_int, value: T) {
        const { assert!(align_of::<libc::cmsghdr>() <= 8 && align_of::<T>() <= 8) };
        let end = self.len + Self::space::<T>();
        assert!(end <= Self::CAPACITY, "three kinds, each once");
        // SAFETY: zero is a value of each field.
        let mut header: libc::cmsghdr = unsafe { zeroed() };
        header.cmsg_len = (size_of::<libc::cmsghdr>().next_multiple_of(8) + size_of::<T>()) as _;
        (header.cmsg_level, header.cmsg_type) = (level, kind);
        let at = self.bytes[self.len..].as_mut_ptr();
        // SAFETY: the space of both was just checked; `bytes` is aligned to 8 and `len` a multiple of it.
        unsafe {
            at.cast::<libc::cmsghdr>().write(header);
            at.add(size_of::<libc::cmsghdr>().next_multiple_of(8)).cast::<T>().write(value);
        }
        self.len = end;
    }
}

#[cfg(test)]
mod tests {
    use std::{net::UdpSocket, os::fd::AsFd as _, time::Duration};

    use super::*;

    #[test]
    fn each_message_goes_its_own_way_and_the_first_failure_ends_the_call() {
        let receivers = ["127.0.0.1:0", "127.0.0.2:0"].map(|at| UdpSocket::bind(at).unwrap());
        let sender = UdpSocket::bind("0.0.0.0:0").unwrap();
        assert!(is_offered(sender.as_fd()));
        let port = sender.local_addr().unwrap().port();
        let route = |src: Option<&str>, to: &UdpSocket| Route {
            src: src.map(|src| SocketAddr::new(src.parse().unwrap(), port)),
            dst: to.local_addr().unwrap(),
            ecn: Ecn::Ect0,
        };
        let plain = route(None, &receivers[0]);
        let from_nine = route(Some("127.0.0.9"), &receivers[1]);
        let from_nowhere = route(Some("192.0.2.99"), &receivers[0]);
        let message = |route, bytes, segment| Message { route, bytes, segment };
        let messages = [
            message(&plain, &b"one"[..], None),
            message(&from_nine, b"aabbc", Some(2)),
            message(&from_nowhere, b"lost", None),
            message(&plain, b"two", None),
        ];
        assert_eq!(send(sender.as_fd(), &messages).unwrap(), 2);
        assert!(send(sender.as_fd(), &messages[2..]).is_err());
        assert_eq!(send(sender.as_fd(), &messages[3..]).unwrap(), 1);
        let mut got = Vec::new();
        for (receiver, count) in receivers.iter().zip([2, 3]) {
            receiver.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            for _ in 0..count {
                let mut buffer = [0; 10];
                let (len, from) = receiver.recv_from(&mut buffer).unwrap();
                assert_eq!(from.port(), port);
                got.push((from.ip().to_string(), String::from_utf8_lossy(&buffer[..len]).into_owned()));
            }
        }
        let got: Vec<_> = got.iter().map(|(ip, text)| (&**ip, &**text)).collect();
        let nine = "127.0.0.9";
        assert_eq!(
            got,
            [("127.0.0.1", "one"), ("127.0.0.1", "two"), (nine, "aa"), (nine, "bb"), (nine, "c")]
        );
    }
}
