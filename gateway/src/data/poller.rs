//! What a worker's thread sleeps on: its bell, its TUN queue and its sockets, AF_XDP ones included.
//!
//! An epoll set, because the thread sleeps once per packet while little arrives: `poll` would join and leave the wait
//! queue of each of them every time.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use rustix::event::{
    Timespec,
    epoll::{self, CreateFlags, Event, EventData, EventFlags},
};

use super::{tun::Tun, udp::DataSocket, wake::Wake, xsk::MAX_PORTS};

/// What woke the thread.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Ready {
    /// Control or another worker rang.
    pub called: bool,
    /// Something waits in the IPv4 socket.
    pub v4_in: bool,
    /// The IPv4 socket takes datagrams again.
    pub v4_out: bool,
    /// See [`Ready::v4_in`].
    pub v6_in: bool,
    /// See [`Ready::v4_out`].
    pub v6_out: bool,
    /// Something waits in the TUN queue.
    pub tun: bool,
}

/// The set.
pub struct Poller {
    epoll: OwnedFd,
    /// Whether the writability of the IPv4 socket is waited for, too, and that of the IPv6 socket.
    room: [bool; 2],
}

const BELL: u64 = 0;
const TUN: u64 = 1;
const V4: u64 = 2;
const V6: u64 = 3;
const RING: u64 = 4;
/// As many as there are descriptors: what is not reported is not ready.
const MOST: usize = 4 + MAX_PORTS;

impl Poller {
    /// With everything that can wake the thread. The descriptors stay open at least as long as it is used.
    ///
    /// # Errors
    /// None that has to do with what is waited for: the process has too many open files.
    pub fn new<'a>(
        bell: &Wake,
        tun: &Tun,
        sockets: impl IntoIterator<Item = &'a DataSocket>,
    ) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, bell, EventData::new_u64(BELL), EventFlags::IN)?;
        epoll::add(&epoll, tun, EventData::new_u64(TUN), EventFlags::IN)?;
        for socket in sockets {
            epoll::add(&epoll, socket, EventData::new_u64(name(socket)), EventFlags::IN)?;
        }
        Ok(Self { epoll, room: [false; 2] })
    }

    /// From now on, sleep also ends when frames wait in the ring of `socket`, at most [`MAX_PORTS`] of them.
    ///
    /// # Errors
    /// None that are known.
    pub fn add_ring(&self, socket: &impl AsFd) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, socket, EventData::new_u64(RING), EventFlags::IN)?)
    }

    /// From now on, sleep ends when `socket` takes datagrams again, or not. A system call only if that is a change.
    ///
    /// # Errors
    /// None that are known.
    pub fn wait_for_room(&mut self, socket: &DataSocket, wanted: bool) -> io::Result<()> {
        let room = &mut self.room[usize::from(socket.is_v6())];
        if *room != wanted {
            let flags = if wanted { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
            epoll::modify(&self.epoll, socket, EventData::new_u64(name(socket)), flags)?;
            *room = wanted;
        }
        Ok(())
    }

    /// Sleeps until something is to be done, or for `limit` (rounded up to milliseconds).
    ///
    /// # Errors
    /// None that are known; a signal is none.
    pub fn sleep(&self, limit: Option<Duration>) -> io::Result<Ready> {
        let limit = limit.map(|limit| Timespec {
            tv_sec: limit.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: limit.subsec_nanos().into(),
        });
        let mut events = [const { MaybeUninit::<Event>::uninit() }; MOST];
        let events = match epoll::wait(&self.epoll, &mut events, limit.as_ref()) {
            Ok((events, _)) => &*events,
            Err(rustix::io::Errno::INTR) => &[],
            Err(e) => return Err(e.into()),
        };
        let mut ready = Ready::default();
        for event in events {
            let flags = event.flags;
            // Errors and hang-ups are learnt by reading.
            let input = flags.intersects(EventFlags::IN | EventFlags::ERR | EventFlags::HUP);
            let output = flags.contains(EventFlags::OUT);
            match event.data.u64() {
                BELL => ready.called = input,
                TUN => ready.tun = input,
                // Each turn looks at every ring.
                RING => {}
                V4 => (ready.v4_in, ready.v4_out) = (input, output),
                _ => (ready.v6_in, ready.v6_out) = (input, output),
            }
        }
        Ok(ready)
    }
}

fn name(socket: &DataSocket) -> u64 {
    if socket.is_v6() { V6 } else { V4 }
}
