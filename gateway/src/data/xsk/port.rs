//! One worker's end of one device queue: batches of frames in, frames out.
//!
//! ```text
//!   Queue (of all workers, one lock)           Port (of one worker)
//!   fill, completion, pool  <----- recycle ----  Batch  <- rx ring
//!                            ----- recycle ---->  stock  -> tx ring
//! ```
//!
//! A frame that was received goes back to the fill ring when its batch is done with; what was sent comes back by the
//! completion ring. Both, and the frames for the next datagrams, are dealt with under the queue's lock in one go:
//! [`Port::recycle`], once per batch. Everything else is this worker's alone.

use std::{
    io::{self, ErrorKind},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use arrayvec::ArrayVec;
use gateway_common::{Counters, DropReason};

use super::umem::{CompletionRing, FillRing, Frame, Pool, Received, RxRing, TxRing, Umem};

/// Frames that are received in one go.
pub const BATCH: usize = 64;
/// Frames that a worker keeps for what it will send.
const STOCK: usize = 64;
/// Calls in a row that send nothing, after which the rest waits.
const MAX_STUCK: u32 = 2;

/// The socket as the rings need it: the kernel, or a test's stand-in.
pub trait Wire {
    /// Tells the kernel to look at the transmit ring. In copy mode it sends at most 32 frames in one call.
    ///
    /// # Errors
    /// `WouldBlock` if there is more, or no room; the ring is as before, or shorter.
    fn kick(&self) -> io::Result<()>;
    /// Whether the driver takes what it was told of when it likes (zero-copy mode).
    fn sends_later(&self) -> bool;
    /// Tells the kernel that there are frames in the fill ring again.
    fn wake(&self);
    /// What the kernel has counted since the socket was made.
    fn statistics(&self) -> Statistics;
}

/// What the kernel counts for one socket (XDP_STATISTICS).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Statistics {
    /// Not received, for any reason but a full ring.
    pub dropped: u64,
    /// Not received, because the receive ring was full.
    pub ring_full: u64,
    /// How often the queue's fill ring was found empty: by any of its sockets, and in zero-copy mode by a driver that
    /// asks for many frames at once.
    pub fill_empty: u64,
    /// What was not sent, because the entry made no sense.
    pub tx_invalid: u64,
}

impl Statistics {
    /// Counts what was dropped since `earlier`.
    fn count_since(&self, earlier: &Self, drops: &mut Counters) {
        let dropped = self.dropped.saturating_sub(earlier.dropped);
        let starved = dropped.min(self.fill_empty.saturating_sub(earlier.fill_empty));
        let counted = [
            (DropReason::XskStarved, starved),
            (DropReason::XskRefused, dropped - starved),
            (DropReason::XskRingFull, self.ring_full.saturating_sub(earlier.ring_full)),
            (DropReason::XskTxInvalid, self.tx_invalid.saturating_sub(earlier.tx_invalid)),
        ];
        for (reason, packets) in counted {
            drops.add(reason, packets);
        }
    }
}

/// What the sockets of one device queue share.
pub struct Queue {
    umem: Arc<Umem>,
    idle: Mutex<Idle>,
}

struct Idle {
    fill: FillRing,
    completion: CompletionRing,
    pool: Pool,
}

impl Queue {
    /// Gives the kernel `offered` frames to receive into; the rest is to send from.
    pub fn new(
        umem: Arc<Umem>,
        mut pool: Pool,
        mut fill: FillRing,
        completion: CompletionRing,
        offered: usize,
    ) -> Self {
        for _ in 0..offered {
            let Some(frame) = pool.take() else { break };
            if let Err(frame) = fill.push(frame) {
                pool.put(frame);
                break;
            }
        }
        fill.submit();
        Self { umem, idle: Mutex::new(Idle { fill, completion, pool }) }
    }

    /// The memory of its frames.
    #[cfg(test)]
    pub fn umem(&self) -> &Arc<Umem> {
        &self.umem
    }

    fn idle(&self) -> MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Frames that nobody uses.
    #[cfg(test)]
    pub fn free(&self) -> usize {
        self.idle().pool.len()
    }
}

/// Frames that were received in one go.
pub struct Batch {
    umem: Arc<Umem>,
    frames: ArrayVec<Received, BATCH>,
}

impl Batch {
    /// How many there are.
    #[inline]
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// Each from its Ethernet header on.
    #[inline]
    pub fn frames(&self) -> impl Iterator<Item = &[u8]> {
        self.frames.iter().map(|received| received.bytes(&self.umem))
    }
}

/// One worker's socket on one queue.
pub struct Port<W> {
    queue: Arc<Queue>,
    rx: RxRing,
    tx: TxRing,
    wire: W,
    /// Where the next batch is put; `None` while one is with the worker.
    batch: Option<Box<Batch>>,
    stock: ArrayVec<Frame, STOCK>,
    reserved: Option<Frame>,
    /// The kernel did not take all that waits in the transmit ring.
    blocked: bool,
    counted: Statistics,
}

impl<W: Wire> Port<W> {
    /// Over the rings of a socket that is bound to the queue.
    pub fn new(queue: Arc<Queue>, rx: RxRing, tx: TxRing, wire: W) -> Self {
        let batch = Box::new(Batch { umem: Arc::clone(&queue.umem), frames: ArrayVec::new() });
        let mut port = Self {
            queue,
            rx,
            tx,
            wire,
            batch: Some(batch),
            stock: ArrayVec::new(),
            reserved: None,
            blocked: false,
            counted: Statistics::default(),
        };
        port.restock();
        port
    }

    /// The socket.
    pub fn wire(&self) -> &W {
        &self.wire
    }

    /// How many frames wait; [`Port::receive`] goes no further.
    #[inline]
    pub fn look(&mut self) -> usize {
        self.rx.look()
    }

    /// The next frames, at most `most` of those that [`Port::look`] saw; `None` if there are none, or the batch before
    /// was not recycled.
    #[inline]
    pub fn receive(&mut self, most: usize) -> Option<Box<Batch>> {
        let mut batch = self.batch.take()?;
        while batch.frames.len() < most.min(BATCH)
            && let Some(received) = self.rx.pop()
        {
            batch.frames.push(received);
        }
        self.rx.release();
        if batch.frames.is_empty() {
            self.batch = Some(batch);
            return None;
        }
        Some(batch)
    }

    /// The batch is done with: its frames go back to the kernel, what was sent to the pool, and the stock is filled up.
    pub fn recycle(&mut self, mut batch: Box<Batch>) {
        let mut idle = self.queue.idle();
        let Idle { fill, completion, pool } = &mut *idle;
        for received in batch.frames.drain(..) {
            if let Err(frame) = fill.push(received.into_frame()) {
                pool.put(frame);
            }
        }
        let wake = fill.submit() && fill.needs_wakeup();
        restock(completion, pool, &mut self.stock);
        drop(idle);
        self.batch = Some(batch);
        if wake {
            self.wire.wake();
        }
    }

    /// A whole frame to write to. A reservation that is not committed is forgotten by the next one. `None` while the
    /// kernel takes nothing: go another way.
    #[inline]
    pub fn reserve(&mut self) -> Option<&mut [u8]> {
        if self.tx.is_full() {
            if !self.blocked {
                self.flush();
            }
            if self.tx.is_full() {
                return None;
            }
        }
        if self.reserved.is_none() {
            if self.stock.is_empty() {
                self.restock();
            }
            self.reserved = Some(self.stock.pop()?);
        }
        self.reserved()
    }

    /// The frame of the last reservation, to finish what is in it.
    #[inline]
    pub fn reserved(&mut self) -> Option<&mut [u8]> {
        self.reserved.as_mut().map(|frame| self.queue.umem.bytes_mut(frame))
    }

    /// Queues `len` bytes of the last reservation, which begin `at` bytes into the frame. False if there is none, or
    /// they are not all in it.
    #[inline]
    pub fn commit(&mut self, at: usize, len: usize) -> bool {
        let Some(frame) = self.reserved.take() else { return false };
        match self.tx.push(frame, at, len) {
            Ok(()) => true,
            Err(frame) => {
                self.reserved = Some(frame);
                false
            }
        }
    }

    /// Sends what was committed, as far as the kernel takes it; the rest stays, in order.
    pub fn flush(&mut self) {
        self.tx.submit();
        let mut waiting = self.tx.waiting();
        self.blocked = false;
        if waiting == 0 || !self.tx.needs_wakeup() {
            return;
        }
        let mut stuck = 0;
        while stuck < MAX_STUCK {
            let kicked = self.wire.kick();
            let left = self.tx.waiting();
            if left == 0 || (kicked.is_ok() && self.wire.sends_later()) {
                return;
            }
            if left < waiting {
                (waiting, stuck) = (left, 0);
                continue;
            }
            stuck += 1;
            if kicked.is_err_and(|e| e.kind() != ErrorKind::WouldBlock) {
                break;
            }
            // Perhaps the completion ring is full.
            self.restock();
        }
        self.blocked = true;
    }

    /// Whether frames wait in the transmit ring that the kernel did not take: [`Port::flush`] again, within a
    /// millisecond or so.
    pub fn is_blocked(&self) -> bool {
        self.blocked
    }

    /// The thread may sleep now: a driver that has fallen asleep since it was looked at is woken. One that has nothing to
    /// receive into would never say that anything arrived.
    pub fn before_sleep(&mut self) {
        // In copy mode nobody sleeps, and what waits to be sent is known.
        if !self.wire.sends_later() {
            return;
        }
        let wake = self.queue.idle().fill.needs_wakeup();
        if wake {
            self.wire.wake();
        }
        if self.tx.waiting() > 0 && self.tx.needs_wakeup() {
            // What is not sent now is asked for again in the next turn.
            self.blocked = self.wire.kick().is_err();
        }
    }

    /// Counts what the kernel has dropped since the last call: a system call's worth of work, for once a second.
    pub fn count_drops(&mut self, drops: &mut Counters) {
        let statistics = self.wire.statistics();
        statistics.count_since(&self.counted, drops);
        self.counted = statistics;
    }

    /// Takes back what was sent, and fills up the stock. [`Port::recycle`] does it, too.
    #[cold]
    pub fn restock(&mut self) {
        let mut idle = self.queue.idle();
        let Idle { completion, pool, .. } = &mut *idle;
        restock(completion, pool, &mut self.stock);
    }
}

impl<W> Drop for Port<W> {
    fn drop(&mut self) {
        let mut idle = self.queue.idle();
        for frame in self.stock.drain(..).chain(self.reserved.take()) {
            idle.pool.put(frame);
        }
    }
}

fn restock(completion: &mut CompletionRing, pool: &mut Pool, stock: &mut ArrayVec<Frame, STOCK>) {
    completion.drain(pool);
    while !stock.is_full()
        && let Some(frame) = pool.take()
    {
        stock.push(frame);
    }
}

#[cfg(test)]
mod tests;
