//! The AF_XDP sockets of one device queue: made, bound, and their rings mapped (Documentation/networking/af_xdp.rst).
//!
//! ```text
//!   device queue --- first socket   UMEM, fill, completion, rx, tx    bound to the queue, says the mode
//!                +-- others         rx, tx                            bound with XDP_SHARED_UMEM to the first
//! ```
//!
//! All of a queue's sockets are made together and end together: one that is closed alone takes the frames in its rings
//! with it. Which frame goes to which of them is decided by the XDP program, by slots of its map. A socket in a slot of
//! another queue than its own gets nothing, and the kernel does not count what it drops for that.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, send, socket_with,
        sockopt::{
            set_xdp_rx_ring_size, set_xdp_tx_ring_size, set_xdp_umem_completion_ring_size,
            set_xdp_umem_fill_ring_size, set_xdp_umem_reg, xdp_mmap_offsets, xdp_options, xdp_statistics,
        },
        xdp::{
            SocketAddrXdp, SocketAddrXdpFlags, SocketAddrXdpWithSharedUmem, XDP_PGOFF_RX_RING,
            XDP_PGOFF_TX_RING, XDP_UMEM_PGOFF_COMPLETION_RING, XDP_UMEM_PGOFF_FILL_RING, XdpOptionsFlags,
            XdpRingOffset, XdpUmemReg, XdpUmemRegFlags,
        },
    },
};
use thiserror::Error;

use super::{
    memory::Area,
    port::{Port, Queue, Statistics, Wire},
    ring::{Consumer, Entry, Layout, Producer},
    umem::{CompletionRing, FillRing, KERNEL_HEADROOM, RxRing, TxRing, Umem},
};

/// How frames get into the UMEM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transfer {
    /// The kernel copies; any driver can.
    Copy,
    /// The device writes and reads it; the driver must know how.
    ZeroCopy,
}

/// Places in rings, and frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Bytes of a frame.
    pub frame: usize,
    /// Places in each receive ring.
    pub rx: u32,
    /// Places in each transmit ring.
    pub tx: u32,
    /// Places in the fill ring, and frames that are offered to receive into.
    pub fill: u32,
    /// Places in the completion ring.
    pub completion: u32,
    /// Frames in all.
    pub frames: u32,
}

/// Ethernet header and a VLAN tag.
const LINK_HEADER: usize = 18;
/// More sockets on one queue need so much memory that one worker should read for all.
pub const MAX_SOCKETS: usize = 8;

impl Sizes {
    /// For so many sockets on one queue of a device with this MTU; `None` if its packets do not fit a frame.
    ///
    /// There are frames for every place of every ring, so that a worker that is late keeps nobody else waiting.
    pub fn plan(sockets: usize, mtu: usize) -> Option<Self> {
        const RING: u32 = 1024;
        let frame = [2048, 4096].into_iter().find(|size| mtu + LINK_HEADER <= size - KERNEL_HEADROOM)?;
        let sockets = u32::try_from(sockets).ok().filter(|n| (1..=MAX_SOCKETS).contains(&(*n as usize)))?;
        let fill = ((sockets + 1) * RING).next_power_of_two();
        let completion = (sockets * RING).next_power_of_two();
        Some(Self { frame, rx: RING, tx: RING, fill, completion, frames: fill + 2 * sockets * RING })
    }
}

/// Why a queue has no sockets.
#[derive(Debug, Error)]
pub enum OpenError {
    /// See the text.
    #[error("this kernel has no AF_XDP sockets")]
    NotOffered,
    /// See the text.
    #[error("AF_XDP sockets need CAP_NET_RAW")]
    NotAllowed,
    /// See the text.
    #[error("{0} bytes of locked memory are not allowed; grant CAP_IPC_LOCK or raise RLIMIT_MEMLOCK")]
    Memory(usize),
    /// See the text.
    #[error("queue {0} has AF_XDP sockets of another program")]
    Taken(u32),
    /// See the text.
    #[error("the driver has no zero-copy mode for AF_XDP")]
    NoZeroCopy,
    /// See the text.
    #[error("there is no queue {0}")]
    NoQueue(u32),
    /// See the text.
    #[error("the interface is gone")]
    NoInterface,
    /// See the text.
    #[error("the rings of the socket are not where the kernel says")]
    Layout,
    /// Anything else.
    #[error("{step} failed: {cause}")]
    Other {
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        cause: io::Error,
    },
}

/// What to open.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// The interface's index.
    pub interface: u32,
    /// The number of the receive queue; what is sent leaves by the transmit queue of that number.
    pub queue: u32,
    /// How frames get into memory.
    pub transfer: Transfer,
}

/// How long to wait for a queue whose sockets have just been closed: the kernel lets go of it some time later.
const PATIENCE: Duration = Duration::from_millis(500);
/// How often to try meanwhile.
const RETRY: Duration = Duration::from_millis(10);

/// Opens `sockets` sockets on a queue, in the network namespace of the calling thread. Blocks for half a second if the
/// queue is in use.
///
/// # Errors
/// See [`OpenError`]; nothing is left behind.
pub fn open(
    place: Place,
    sockets: usize,
    sizes: Sizes,
) -> Result<(Arc<Queue>, Vec<Port<Socket>>), OpenError> {
    let other = |step| move |cause: Errno| OpenError::Other { step, cause: cause.into() };
    let bytes = sizes.frames as usize * sizes.frame;
    let (umem, pool) = Umem::new(sizes.frames, sizes.frame)
        .map_err(|cause| OpenError::Other { step: "mapping memory", cause })?;
    let first = new_socket()?;
    let reg = XdpUmemReg {
        addr: umem.area().base().addr().get() as u64,
        len: bytes as u64,
        chunk_size: u32::try_from(sizes.frame).unwrap_or(u32::MAX),
        headroom: 0,
        flags: XdpUmemRegFlags::empty(),
        tx_metadata_len: 0,
    };
    set_xdp_umem_reg(&first, reg).map_err(|e| match e {
        Errno::NOBUFS | Errno::NOMEM => OpenError::Memory(bytes),
        Errno::PERM => OpenError::NotAllowed,
        e => other("registering memory")(e),
    })?;
    set_xdp_umem_fill_ring_size(&first, sizes.fill).map_err(other("making the fill ring"))?;
    set_xdp_umem_completion_ring_size(&first, sizes.completion)
        .map_err(other("making the completion ring"))?;
    let offsets = xdp_mmap_offsets(&first).map_err(other("asking where rings are"))?;
    let fill = map(&first, XDP_UMEM_PGOFF_FILL_RING, &offsets.fr, sizes.fill, Producer::new)?;
    let completion =
        map(&first, XDP_UMEM_PGOFF_COMPLETION_RING, &offsets.cr, sizes.completion, Consumer::new)?;
    let fill = FillRing::new(Arc::clone(&umem), fill);
    let completion = CompletionRing::new(Arc::clone(&umem), completion);
    // Before it is bound: a driver without copies looks for frames at once.
    let queue = Arc::new(Queue::new(Arc::clone(&umem), pool, fill, completion, sizes.fill as usize));

    let mut bound: Vec<(OwnedFd, RxRing, TxRing)> = Vec::with_capacity(sockets);
    let mut next = Some(first);
    for _ in 0..sockets {
        let socket = match next.take() {
            Some(first) => first,
            None => new_socket()?,
        };
        set_xdp_rx_ring_size(&socket, sizes.rx).map_err(other("making a receive ring"))?;
        set_xdp_tx_ring_size(&socket, sizes.tx).map_err(other("making a transmit ring"))?;
        let rx = map(&socket, XDP_PGOFF_RX_RING, &offsets.rx, sizes.rx, Consumer::new)?;
        let tx = map(&socket, XDP_PGOFF_TX_RING, &offsets.tx, sizes.tx, Producer::new)?;
        let shared = bound.first().map(|(first, ..)| first.as_fd());
        let deadline = Instant::now() + PATIENCE;
        let bound_to = loop {
            match bind_to(&socket, place, shared) {
                Err(Errno::BUSY) if Instant::now() < deadline => std::thread::sleep(RETRY),
                result => break result,
            }
        };
        bound_to.map_err(|e| match e {
            Errno::BUSY => OpenError::Taken(place.queue),
            Errno::OPNOTSUPP if place.transfer == Transfer::ZeroCopy => OpenError::NoZeroCopy,
            Errno::INVAL if shared.is_none() => OpenError::NoQueue(place.queue),
            Errno::NODEV => OpenError::NoInterface,
            e => other("binding a socket")(e),
        })?;
        bound.push((socket, RxRing::new(Arc::clone(&umem), rx), TxRing::new(Arc::clone(&umem), tx)));
    }
    let ports = bound.into_iter().map(|(fd, rx, tx)| {
        let zero_copy =
            xdp_options(&fd).is_ok_and(|options| options.contains(XdpOptionsFlags::XDP_OPTIONS_ZEROCOPY));
        Port::new(Arc::clone(&queue), rx, tx, Socket { fd, zero_copy })
    });
    let ports = ports.collect();
    Ok((queue, ports))
}

fn new_socket() -> Result<OwnedFd, OpenError> {
    socket_with(AddressFamily::XDP, SocketType::RAW, SocketFlags::CLOEXEC, None).map_err(|e| match e {
        Errno::AFNOSUPPORT => OpenError::NotOffered,
        Errno::PERM => OpenError::NotAllowed,
        e => OpenError::Other { step: "making a socket", cause: e.into() },
    })
}

fn bind_to(socket: &OwnedFd, place: Place, shared: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
    let address = |flags| SocketAddrXdp::new(flags, place.interface, place.queue);
    match shared {
        // The mode is the first one's, and must not be said again.
        Some(shared_umem_fd) => {
            let addr = address(SocketAddrXdpFlags::XDP_SHARED_UMEM);
            bind(socket, &SocketAddrXdpWithSharedUmem { addr, shared_umem_fd })
        }
        None => {
            let mode = match place.transfer {
                Transfer::Copy => SocketAddrXdpFlags::XDP_COPY,
                Transfer::ZeroCopy => SocketAddrXdpFlags::XDP_ZEROCOPY,
            };
            bind(socket, &address(mode | SocketAddrXdpFlags::XDP_USE_NEED_WAKEUP))
        }
    }
}

fn map<E: Entry, R>(
    socket: &OwnedFd,
    offset: u64,
    at: &XdpRingOffset,
    size: u32,
    ring: impl FnOnce(Arc<Area>, Layout, u32) -> Option<R>,
) -> Result<R, OpenError>
where
    R: Of<E>,
{
    let place = |at: u64| usize::try_from(at).map_err(|_| OpenError::Layout);
    let layout = Layout {
        producer: place(at.producer)?,
        consumer: place(at.consumer)?,
        // Linux 5.4 and later; without it there is no XDP_USE_NEED_WAKEUP either.
        flags: place(at.flags.ok_or(OpenError::NotOffered)?)?,
        entries: place(at.desc)?,
    };
    let len = layout.entries + size as usize * E::WORDS * size_of::<u64>();
    let area = Area::of(socket.as_fd(), offset, len)
        .map_err(|cause| OpenError::Other { step: "mapping a ring", cause })?;
    ring(Arc::new(area), layout, size).ok_or(OpenError::Layout)
}

/// Which entries a ring has, so that its length need not be said twice.
trait Of<E> {}
impl<E> Of<E> for Producer<E> {}
impl<E> Of<E> for Consumer<E> {}

/// A bound socket.
pub struct Socket {
    fd: OwnedFd,
    zero_copy: bool,
}

impl Socket {
    /// Whether the device itself writes to the memory.
    pub fn is_zero_copy(&self) -> bool {
        self.zero_copy
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Wire for Socket {
    fn kick(&self) -> io::Result<()> {
        match send(&self.fd, &[], SendFlags::DONTWAIT) {
            Ok(_) => Ok(()),
            // The queue of the device is full, or what waits there is as much as the socket may have.
            Err(Errno::AGAIN | Errno::BUSY | Errno::NOBUFS) => Err(io::ErrorKind::WouldBlock.into()),
            Err(e) => Err(e.into()),
        }
    }

    fn sends_later(&self) -> bool {
        self.zero_copy
    }

    fn wake(&self) {
        // Nothing is received by it. If it fails, the interface is down, and being up again wakes the driver, too.
        let _none = recv(&self.fd, &mut [0_u8; 0], RecvFlags::DONTWAIT);
    }

    fn statistics(&self) -> Statistics {
        let Ok(found) = xdp_statistics(&self.fd) else { return Statistics::default() };
        Statistics {
            dropped: found.rx_dropped,
            ring_full: found.rx_ring_full.unwrap_or_default(),
            fill_empty: found.rx_fill_ring_empty_descs.unwrap_or_default(),
            tx_invalid: found.tx_invalid_descs,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_frame_for_every_place_whatever_the_number_of_sockets() {
        for sockets in 1..=MAX_SOCKETS {
            let sizes = Sizes::plan(sockets, 1500).unwrap();
            let Sizes { rx, tx, fill, completion, frames, .. } = sizes;
            let sockets = u32::try_from(sockets).unwrap();
            assert!([rx, tx, fill, completion].into_iter().all(u32::is_power_of_two), "{sizes:?}");
            assert!(fill >= rx * sockets + rx, "one batch behind everywhere, and still some to receive into");
            assert!(completion >= tx * sockets && frames >= fill + tx * sockets, "{sizes:?}");
        }
        assert_eq!((Sizes::plan(0, 1500), Sizes::plan(MAX_SOCKETS + 1, 1500)), (None, None));
    }

    #[test]
    fn frames_are_as_large_as_the_mtu_needs() {
        let table = [
            (1280, Some(2048)),
            (1500, Some(2048)),
            (1774, Some(2048)),
            (1775, Some(4096)),
            (3822, Some(4096)),
            (3823, None),
            (9000, None),
        ];
        for (mtu, frame) in table {
            assert_eq!(Sizes::plan(1, mtu).map(|sizes| sizes.frame), frame, "MTU {mtu}");
        }
    }
}
