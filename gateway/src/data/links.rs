//! The links between workers: a ring of packets for each ordered pair, a mailbox of moved clients for each worker.
//!
//! Nothing here blocks: a full ring refuses, and the worker counts it. A client that was put into a mailbox is seen
//! before every packet that is passed on after it: the reader looks how far the rings are, then empties the mailbox, then
//! reads the rings that far; the writer publishes its packets after it has put the client into the mailbox.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use gateway_proto::{Handover, WorkerId, worker::Moved};

use super::{
    ring::{Consumer, Producer, ring},
    wake::Wake,
};

/// Bytes of a ring, so that 64 workers' rings are 1 GiB of address space. A worker comes to its rings at least every few
/// milliseconds; 1 MiB is what 700 000 full packets a second write in one.
fn capacity(workers: usize) -> usize {
    if workers <= 8 { 1 << 20 } else { 256 << 10 }
}

/// The ends of all links, by worker. `wakes[n]` is worker n's.
pub fn links(wakes: &[Arc<Wake>]) -> Vec<(Inbox, Outbox)> {
    let count = wakes.len();
    let doors: Arc<[Door]> = wakes
        .iter()
        .map(|wake| Door { mail: Mutex::default(), any: AtomicBool::new(false), wake: Arc::clone(wake) })
        .collect();
    let mut ends: Vec<(Inbox, Outbox)> = (0..count)
        .map(|me| {
            let inbox = Inbox { me, rings: Vec::with_capacity(count - 1), doors: Arc::clone(&doors) };
            let rings = std::iter::repeat_with(|| None).take(count).collect();
            (inbox, Outbox { rings, doors: Arc::clone(&doors), news: 0 })
        })
        .collect();
    for from in 0..count {
        for to in (0..count).filter(|to| *to != from) {
            let (producer, consumer) = ring(capacity(count));
            ends[from].1.rings[to] = Some(producer);
            ends[to].0.rings.push(consumer);
        }
    }
    ends
}

/// Where others reach a worker.
struct Door {
    mail: Mutex<Vec<Moved>>,
    /// Whether there is mail.
    any: AtomicBool,
    wake: Arc<Wake>,
}

/// What other workers pass to this one.
pub struct Inbox {
    me: usize,
    /// One for each other worker.
    rings: Vec<Consumer>,
    doors: Arc<[Door]>,
}

impl Inbox {
    /// How many workers may pass something.
    pub fn rings(&self) -> usize {
        self.rings.len()
    }

    /// Looks how far the rings are and returns the clients that were given before that.
    pub fn look(&mut self) -> Vec<Moved> {
        for ring in &mut self.rings {
            ring.look();
        }
        // Whoever published what was just seen had set this before.
        let door = &self.doors[self.me];
        if !door.any.load(Ordering::Acquire) {
            return Vec::new();
        }
        let mut mail = door.mail.lock().unwrap_or_else(PoisonError::into_inner);
        door.any.store(false, Ordering::Relaxed);
        std::mem::take(&mut *mail)
    }

    /// The next packets of one ring, at most `most` and no further than [`Inbox::look`] saw.
    pub fn records(&mut self, ring: usize, most: usize) -> impl Iterator<Item = Handover<'_>> {
        self.rings[ring].records(most)
    }

    /// Gives the room of a ring's records that were seen back to their writer.
    pub fn release(&mut self, ring: usize) {
        self.rings[ring].release();
    }

    /// Whether [`Inbox::look`] saw more on a ring than was read since.
    pub fn holds(&self, ring: usize) -> bool {
        self.rings[ring].holds()
    }

    /// Announces sleep; true if there is something to do instead.
    pub fn fall_asleep(&self) -> bool {
        let door = &self.doors[self.me];
        // Alone, there is nobody to announce it to.
        !self.rings.is_empty()
            && door.wake.fall_asleep(|| {
                door.any.load(Ordering::Relaxed) || self.rings.iter().any(Consumer::is_waiting)
            })
    }

    /// Sleep is over.
    pub fn wake_up(&self) {
        if !self.rings.is_empty() {
            self.doors[self.me].wake.wake_up();
        }
    }
}

/// What this worker passes to others.
pub struct Outbox {
    /// By worker; none for itself.
    rings: Vec<Option<Producer>>,
    doors: Arc<[Door]>,
    /// One bit for each worker that something was passed to since the last [`Outbox::publish`].
    news: u64,
}

const _: () = assert!(gateway_common::maps::MAX_WORKERS <= u64::BITS as usize);

impl Outbox {
    /// Passes `handover` to worker `to`, who sees it after [`Outbox::publish`]. False if the ring is full.
    pub fn hand_over(&mut self, to: WorkerId, handover: &Handover<'_>) -> bool {
        let to = to.get();
        let Some(Some(ring)) = self.rings.get_mut(to) else { return false };
        self.news |= 1 << to;
        ring.push(handover)
    }

    /// Gives a client to worker `to`, ahead of all that is passed to it from now on.
    pub fn give(&mut self, to: WorkerId, moved: Moved) {
        let Some(door) = self.doors.get(to.get()) else { return };
        let mut mail = door.mail.lock().unwrap_or_else(PoisonError::into_inner);
        mail.push(moved);
        door.any.store(true, Ordering::Release);
        drop(mail);
        self.news |= 1 << to.get();
    }

    /// Lets others see what was passed to them.
    pub fn publish(&mut self) {
        while self.news != 0 {
            let to = self.news.trailing_zeros() as usize;
            self.news &= self.news - 1;
            if let Some(Some(ring)) = self.rings.get_mut(to) {
                ring.publish();
            }
            self.doors[to].wake.ring_if_asleep();
        }
    }
}
