//! The memory that frames lie in, and who owns each frame.
//!
//! ```text
//!    +----------> Pool <--------put--------+-------------------------------+
//!    |             |                       |                               |
//!   put           take                     |                               |
//!    |             v                       |                               |
//!    +---------- Frame --- TxRing ------> kernel --- CompletionRing ---> Frame
//!                Frame --- FillRing ----> kernel --- RxRing -----------> Frame (Received)
//!                  ^                                                       |
//!                  +-------------------------------------------------------+
//! ```
//!
//! A [`Frame`] is the right to read and write one frame. There is at most one for each: it is made by the pool and by
//! what the kernel gives back, and used up by what gives it to the kernel or to the pool. One that is dropped anywhere
//! else would be lost: debug builds panic, and keep a ledger of what is the kernel's.

#[cfg(any(test, debug_assertions))]
use std::sync::atomic::{AtomicBool, Ordering};
use std::{io, mem, slice, sync::Arc};

use super::{
    memory::Area,
    ring::{Consumer, Desc, Producer},
};

/// What the kernel leaves free in front of each received frame (XDP_PACKET_HEADROOM), in bytes.
pub const KERNEL_HEADROOM: usize = 256;

/// The frames of one device queue.
pub struct Umem {
    area: Area,
    /// Bytes of a frame, a power of two.
    frame_size: usize,
    count: u32,
    /// Which frames are not the kernel's.
    #[cfg(any(test, debug_assertions))]
    ours: Box<[AtomicBool]>,
}

impl Umem {
    /// `count` frames of `frame_size` bytes (2048 or 4096), and the pool that holds all of them.
    ///
    /// # Errors
    /// There is no memory, or another size was asked for.
    pub fn new(count: u32, frame_size: usize) -> io::Result<(Arc<Self>, Pool)> {
        if !matches!(frame_size, 2048 | 4096) || count == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let umem = Arc::new(Self {
            area: Area::anonymous(count as usize * frame_size)?,
            frame_size,
            count,
            #[cfg(any(test, debug_assertions))]
            ours: (0..count).map(|_| AtomicBool::new(true)).collect(),
        });
        let pool = Pool { umem: Arc::clone(&umem), free: (0..count).rev().collect() };
        Ok((umem, pool))
    }

    /// The memory, for the kernel.
    pub fn area(&self) -> &Area {
        &self.area
    }

    /// The bytes of a frame.
    #[inline]
    pub fn bytes<'a>(&'a self, frame: &'a Frame) -> &'a [u8] {
        let at = self.start_of(frame);
        // SAFETY: the frame lies inside the mapping, which lives as long as `self`. Whoever has the `Frame` is the only
        // one who reaches these bytes, the kernel included, and has lent it for reading.
        #[expect(unsafe_code, reason = "bytes that are shared with the kernel by turns")]
        let bytes = unsafe { slice::from_raw_parts(self.area.base().byte_add(at).as_ptr(), self.frame_size) };
        bytes
    }

    /// The bytes of a frame, to be written.
    #[inline]
    pub fn bytes_mut<'a>(&'a self, frame: &'a mut Frame) -> &'a mut [u8] {
        let at = self.start_of(frame);
        // SAFETY: as above, and the `Frame` is lent for writing.
        #[expect(unsafe_code, reason = "bytes that are shared with the kernel by turns")]
        let bytes =
            unsafe { slice::from_raw_parts_mut(self.area.base().byte_add(at).as_ptr(), self.frame_size) };
        bytes
    }

    /// Where a frame begins, in bytes from the start of the memory.
    ///
    /// # Panics
    /// It is another UMEM's.
    #[inline]
    fn start_of(&self, frame: &Frame) -> usize {
        assert!(frame.home == self.name() && frame.index < self.count, "a frame of another UMEM");
        frame.index as usize * self.frame_size
    }

    /// What tells this memory from all others.
    fn name(&self) -> usize {
        self.area.base().addr().get()
    }

    fn frame(&self, index: u32) -> Frame {
        Frame { index, home: self.name() }
    }

    /// The frame around `addr`, which the kernel has just given back, and how far into it `addr` is. `None` if there is
    /// no such frame, which only a broken kernel says.
    #[inline]
    fn take_back(&self, addr: u64) -> Option<(Frame, usize)> {
        let at = usize::try_from(addr).ok()?;
        let index = u32::try_from(at / self.frame_size).ok().filter(|index| *index < self.count)?;
        #[cfg(any(test, debug_assertions))]
        assert!(
            !self.ours[index as usize].swap(true, Ordering::Relaxed),
            "the kernel gave frame {index} back twice"
        );
        Some((self.frame(index), at % self.frame_size))
    }

    /// The kernel has it from now on. Returns where the frame begins.
    #[inline]
    fn give_away(&self, frame: Frame) -> u64 {
        let at = self.start_of(&frame);
        #[cfg(any(test, debug_assertions))]
        assert!(
            self.ours[frame.index as usize].swap(false, Ordering::Relaxed),
            "frame {} was the kernel's already",
            frame.index
        );
        mem::forget(frame);
        at as u64
    }

    /// How many frames are not the kernel's.
    #[cfg(test)]
    pub fn ours(&self) -> usize {
        self.ours.iter().filter(|ours| ours.load(Ordering::Relaxed)).count()
    }
}

/// The right to read and write one frame of a [`Umem`].
#[derive(Debug)]
pub struct Frame {
    index: u32,
    /// See [`Umem::name`].
    home: usize,
}

impl Drop for Frame {
    fn drop(&mut self) {
        let checked = cfg!(any(test, debug_assertions));
        assert!(!checked || std::thread::panicking(), "frame {} is lost", self.index);
    }
}

/// The frames that nobody uses.
pub struct Pool {
    umem: Arc<Umem>,
    free: Vec<u32>,
}

impl Pool {
    /// A frame; the one that was put back last, for it may still be in a cache.
    #[inline]
    pub fn take(&mut self) -> Option<Frame> {
        self.free.pop().map(|index| self.umem.frame(index))
    }

    /// Back.
    #[inline]
    pub fn put(&mut self, frame: Frame) {
        self.umem.start_of(&frame);
        self.free.push(frame.index);
        mem::forget(frame);
    }

    /// How many there are.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.free.len()
    }
}

/// Empty frames to the kernel, for what it receives. Shared by the sockets of a queue.
pub struct FillRing {
    umem: Arc<Umem>,
    ring: Producer<u64>,
}

impl FillRing {
    /// Over the ring of the same memory.
    pub fn new(umem: Arc<Umem>, ring: Producer<u64>) -> Self {
        Self { umem, ring }
    }

    /// Gives a frame; back comes one that there is no place for.
    #[inline]
    pub fn push(&mut self, frame: Frame) -> Result<(), Frame> {
        if self.ring.is_full() {
            return Err(frame);
        }
        let pushed = self.ring.push(self.umem.give_away(frame));
        debug_assert!(pushed, "there was room");
        Ok(())
    }

    /// The kernel may use what was given. True if that was something.
    #[inline]
    pub fn submit(&mut self) -> bool {
        self.ring.submit()
    }

    /// See [`Producer::needs_wakeup`].
    #[inline]
    pub fn needs_wakeup(&self) -> bool {
        self.ring.needs_wakeup()
    }
}

/// Frames that were sent, from the kernel. Shared by the sockets of a queue.
pub struct CompletionRing {
    umem: Arc<Umem>,
    ring: Consumer<u64>,
}

impl CompletionRing {
    /// Over the ring of the same memory.
    pub fn new(umem: Arc<Umem>, ring: Consumer<u64>) -> Self {
        Self { umem, ring }
    }

    /// Takes all frames that were sent.
    #[inline]
    pub fn drain(&mut self, pool: &mut Pool) {
        if self.ring.look() == 0 {
            return;
        }
        while let Some(addr) = self.ring.pop() {
            if let Some((frame, _)) = self.umem.take_back(addr) {
                pool.put(frame);
            }
        }
        self.ring.release();
    }
}

/// What one socket received.
pub struct RxRing {
    umem: Arc<Umem>,
    ring: Consumer<Desc>,
}

/// A frame with something in it.
#[derive(Debug)]
pub struct Received {
    frame: Frame,
    at: u32,
    len: u32,
}

impl Received {
    /// What was received, from the Ethernet header on.
    #[inline]
    pub fn bytes<'a>(&'a self, umem: &'a Umem) -> &'a [u8] {
        &umem.bytes(&self.frame)[self.at as usize..][..self.len as usize]
    }

    /// What was received is not needed any more.
    pub fn into_frame(self) -> Frame {
        self.frame
    }
}

impl RxRing {
    /// Over the ring of a socket bound to the same memory.
    pub fn new(umem: Arc<Umem>, ring: Consumer<Desc>) -> Self {
        Self { umem, ring }
    }

    /// How many frames wait; [`RxRing::pop`] goes no further.
    #[inline]
    pub fn look(&mut self) -> usize {
        self.ring.look()
    }

    /// The next frame. What is longer than a frame, or not all there, is empty.
    #[inline]
    pub fn pop(&mut self) -> Option<Received> {
        loop {
            let desc = self.ring.pop()?;
            let Some((frame, at)) = self.umem.take_back(desc.addr) else { continue };
            let whole = desc.options == 0 && at + desc.len as usize <= self.umem.frame_size;
            #[expect(clippy::cast_possible_truncation, reason = "below the size of a frame")]
            let (at, len) = if whole { (at as u32, desc.len) } else { (0, 0) };
            return Some(Received { frame, at, len });
        }
    }

    /// The kernel has the places of what was read back.
    #[inline]
    pub fn release(&mut self) {
        self.ring.release();
    }
}

/// What one socket sends.
pub struct TxRing {
    umem: Arc<Umem>,
    ring: Producer<Desc>,
}

impl TxRing {
    /// Over the ring of a socket bound to the same memory.
    pub fn new(umem: Arc<Umem>, ring: Producer<Desc>) -> Self {
        Self { umem, ring }
    }

    /// Whether nothing more fits.
    #[inline]
    pub fn is_full(&mut self) -> bool {
        self.ring.is_full()
    }

    /// Sends `len` bytes that begin `at` bytes into the frame; back comes one that there is no place for.
    #[inline]
    pub fn push(&mut self, frame: Frame, at: usize, len: usize) -> Result<(), Frame> {
        if self.ring.is_full() || len == 0 || at.saturating_add(len) > self.umem.frame_size {
            return Err(frame);
        }
        let addr = self.umem.give_away(frame) + at as u64;
        #[expect(clippy::cast_possible_truncation, reason = "at most the size of a frame")]
        let pushed = self.ring.push(Desc { addr, len: len as u32, options: 0 });
        debug_assert!(pushed, "there was room");
        Ok(())
    }

    /// The kernel may send what was given. True if that was something.
    #[inline]
    pub fn submit(&mut self) -> bool {
        self.ring.submit()
    }

    /// What the kernel has not looked at yet.
    #[inline]
    pub fn waiting(&self) -> usize {
        self.ring.waiting()
    }

    /// See [`Producer::needs_wakeup`].
    #[inline]
    pub fn needs_wakeup(&self) -> bool {
        self.ring.needs_wakeup()
    }
}

#[cfg(test)]
mod tests {
    use super::{super::ring, *};

    #[test]
    fn only_sizes_that_the_kernel_takes_are_memory() {
        for (count, size, good) in
            [(1, 2048, true), (3, 4096, true), (0, 2048, false), (4, 1024, false), (4, 8192, false)]
        {
            assert_eq!(Umem::new(count, size).is_ok(), good, "{count} of {size}");
        }
    }

    #[test]
    fn frames_are_apart_and_the_last_one_put_is_the_next_one_taken() {
        let (umem, mut pool) = Umem::new(4, 2048).unwrap();
        let mut frames: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!((frames.len(), pool.len()), (4, 0));
        for (i, frame) in (0..).zip(&mut frames) {
            umem.bytes_mut(frame).fill(i);
        }
        for (i, frame) in (0..).zip(&frames) {
            assert!(umem.bytes(frame).len() == 2048 && umem.bytes(frame).iter().all(|byte| *byte == i));
        }
        let index = frames[2].index;
        pool.put(frames.swap_remove(2));
        let again = pool.take().unwrap();
        assert_eq!(again.index, index);
        frames.push(again);
        frames.into_iter().for_each(|frame| pool.put(frame));
        assert_eq!(umem.ours(), 4);
    }

    #[test]
    fn what_the_kernel_says_wrongly_is_no_frame_and_no_bytes() {
        let (umem, mut pool) = Umem::new(4, 2048).unwrap();
        let (fill, mut fill_end, _) = ring::pair::<u64>(8, 0);
        let (mut rx_end, rx, _) = ring::pair::<Desc>(8, 0);
        let mut filler = FillRing::new(umem.clone(), fill);
        let mut rx = RxRing::new(umem.clone(), rx);
        for _ in 0..4 {
            filler.push(pool.take().unwrap()).unwrap();
        }
        filler.submit();
        fill_end.look();
        let addrs: Vec<_> = std::iter::from_fn(|| fill_end.pop()).collect();
        assert_eq!((addrs.len(), umem.ours()), (4, 0));
        let table = [
            (Desc { addr: addrs[0] + 256, len: 60, options: 0 }, Some(60)),
            (Desc { addr: addrs[1] + 256, len: 1793, options: 0 }, Some(0)),
            (Desc { addr: addrs[2] + 256, len: 60, options: 1 }, Some(0)),
            (Desc { addr: addrs[3] + 256, len: u32::MAX, options: 0 }, Some(0)),
            (Desc { addr: 4 * 2048, len: 60, options: 0 }, None),
            (Desc { addr: u64::MAX, len: 60, options: 0 }, None),
        ];
        for (desc, expect) in table {
            rx_end.push(desc);
            rx_end.submit();
            rx.look();
            let received = rx.pop();
            assert_eq!(received.as_ref().map(|r| r.bytes(&umem).len()), expect, "{desc:?}");
            if let Some(received) = received {
                pool.put(received.into_frame());
            }
        }
        assert_eq!((pool.len(), umem.ours()), (4, 4));
    }

    #[test]
    fn what_is_outside_its_frame_is_not_sent() {
        let (umem, mut pool) = Umem::new(1, 2048).unwrap();
        let (tx, mut tx_end, _) = ring::pair::<Desc>(2, 0);
        let mut tx = TxRing::new(umem.clone(), tx);
        let mut frame = pool.take().unwrap();
        for (at, len) in [(0, 0), (2000, 49), (usize::MAX, 1), (0, 2049)] {
            frame = tx.push(frame, at, len).unwrap_err();
        }
        tx.push(frame, 2000, 48).unwrap();
        tx.submit();
        tx_end.look();
        assert_eq!(tx_end.pop(), Some(Desc { addr: 2000, len: 48, options: 0 }));
        assert_eq!((umem.ours(), tx.waiting()), (0, 1));
    }

    #[test]
    #[should_panic(expected = "is lost")]
    fn a_frame_that_is_dropped_is_noticed() {
        let (_umem, mut pool) = Umem::new(1, 2048).unwrap();
        drop(pool.take());
    }

    #[test]
    #[should_panic(expected = "gave frame 0 back twice")]
    fn a_frame_that_comes_back_twice_is_noticed() {
        let (umem, mut pool) = Umem::new(1, 2048).unwrap();
        let (mut end, completion, _) = ring::pair::<u64>(2, 0);
        let (tx, ..) = ring::pair::<Desc>(2, 0);
        TxRing::new(umem.clone(), tx).push(pool.take().unwrap(), 0, 60).unwrap();
        end.push(0);
        end.push(0);
        end.submit();
        CompletionRing::new(umem, completion).drain(&mut pool);
    }

    #[test]
    #[should_panic(expected = "of another UMEM")]
    fn a_frame_is_not_read_in_another_memory() {
        let (_umem, mut pool) = Umem::new(1, 2048).unwrap();
        let (other, _) = Umem::new(1, 2048).unwrap();
        let frame = pool.take().unwrap();
        other.bytes(&frame);
    }
}
