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
    ring::{Consumer, Level, Producer, ring},
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
            (inbox, Outbox { rings, doors: Arc::clone(&doors), news: 0, handed_over: 0, given: 0 })
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

    /// How many rings hold something that was not read.
    pub fn rings_waiting(&self) -> usize {
        self.rings.iter().filter(|ring| ring.is_waiting()).count()
    }

    /// Clients that others have given and nobody took in yet.
    pub fn mail_waiting(&self) -> usize {
        self.doors[self.me].mail.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// The most bytes that ever waited on one of the rings.
    pub fn ring_bytes_most(&self) -> usize {
        self.rings.iter().map(Consumer::most).max().unwrap_or(0)
    }

    /// For others to see how full the rings are.
    pub fn levels(&self) -> Vec<Level> {
        self.rings.iter().map(Consumer::level).collect()
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
    handed_over: u64,
    given: u64,
}

const _: () = assert!(gateway_common::maps::MAX_WORKERS <= u64::BITS as usize);

impl Outbox {
    /// Passes `handover` to worker `to`, who sees it after [`Outbox::publish`]. False if the ring is full.
    pub fn hand_over(&mut self, to: WorkerId, handover: &Handover<'_>) -> bool {
        let to = to.get();
        let Some(Some(ring)) = self.rings.get_mut(to) else { return false };
        self.news |= 1 << to;
        let is_room = ring.push(handover);
        self.handed_over += u64::from(is_room);
        is_room
    }

    /// Packets and clients that were passed to others so far.
    pub fn passed(&self) -> (u64, u64) {
        (self.handed_over, self.given)
    }

    /// Gives a client to worker `to`, ahead of all that is passed to it from now on.
    pub fn give(&mut self, to: WorkerId, moved: Moved) {
        let Some(door) = self.doors.get(to.get()) else { return };
        let mut mail = door.mail.lock().unwrap_or_else(PoisonError::into_inner);
        mail.push(moved);
        door.any.store(true, Ordering::Release);
        drop(mail);
        self.given += 1;
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

#[cfg(test)]
mod tests {
    use std::{
        sync::Barrier,
        thread,
        time::{Duration, Instant},
    };

    use gateway_proto::{
        ClientId, Command, Passed, Route, Sink,
        addr::TunnelAddrs,
        command::{ClientState, Connection, Home},
        worker::{Config, Worker},
    };
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use x25519_dalek::StaticSecret;

    use super::*;

    const ROUNDS: u64 = 20_000;

    /// Three writers give a client each and pass a packet after it, again and again, while the reader sleeps whenever it
    /// may.
    #[test]
    fn client_is_seen_before_what_is_passed_after_it_and_no_wake_is_lost() {
        let wakes: Vec<_> = (0..4).map(|_| Arc::new(Wake::new().unwrap())).collect();
        let mut ends = links(&wakes);
        let (mut inbox, _) = ends.remove(0);
        let levels = inbox.levels();
        let start = Arc::new(Barrier::new(4));
        let writers: Vec<_> = (1..)
            .zip(ends)
            .map(|(number, (_, outbox))| {
                let start = Arc::clone(&start);
                thread::spawn(move || {
                    start.wait();
                    give_and_pass(number, outbox);
                })
            })
            .collect();
        start.wait();
        let (mut given, mut passed, mut slept) = (0u64, [0u64; 3], 0);
        let deadline = Instant::now() + Duration::from_secs(200);
        while passed.iter().sum::<u64>() < 3 * ROUNDS {
            assert!(Instant::now() < deadline, "a wake was lost: {given} given, {passed:?} passed");
            if !inbox.fall_asleep() {
                slept += 1;
                let patience = Timespec { tv_sec: 10, tv_nsec: 0 };
                let woken = poll(&mut [PollFd::new(&*wakes[0], PollFlags::IN)], Some(&patience)).unwrap();
                assert_eq!(woken, 1, "asleep for 10 s: {given} given, {passed:?} passed");
            }
            inbox.wake_up();
            wakes[0].clear();
            given += inbox.look().len() as u64;
            for (ring, passed) in passed.iter_mut().enumerate() {
                for Handover { what, .. } in inbox.records(ring, 50) {
                    let Passed::Packet(bytes) = what else { panic!("packets only") };
                    assert_eq!(bytes, passed.to_ne_bytes());
                    *passed += 1;
                }
                inbox.release(ring);
            }
            assert!(given >= passed.iter().sum(), "{given} given, but {passed:?} passed behind them");
        }
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        assert_eq!(given + inbox.look().len() as u64, 3 * ROUNDS);
        assert!(levels.iter().all(|level| level.bytes() == 0), "everything was read");
        println!("slept {slept} times");
    }

    fn give_and_pass(number: usize, mut outbox: Outbox) {
        let mut core = Worker::new(Config {
            private_key: StaticSecret::from([7; 32]),
            allow_own_ip: false,
            seed: 1,
            now: Instant::now(),
            id: WorkerId::new(number).unwrap(),
            workers: 4,
        });
        let tunnel = TunnelAddrs { v4: [100, 64, 0, 7].into(), v6: "fd00:2021:1111::7".parse().unwrap() };
        let state = Arc::new(ClientState::new(tunnel, Connection::Absent, Arc::new([])));
        for order in 0..ROUNDS {
            let home = Home { worker: WorkerId::FIRST, from: WorkerId::new(number), order: order + 1 };
            let desired = Some(Arc::clone(&state));
            let command = Command::Client { id: ClientId(uuid::Uuid::nil()), home, desired };
            core.handle_command(command, Instant::now(), &mut Gives(&mut outbox));
            let packet = order.to_ne_bytes();
            while !outbox.hand_over(WorkerId::FIRST, &Handover { hops: 1, what: Passed::Packet(&packet) }) {
                outbox.publish();
                thread::yield_now();
            }
            if order % 3 == 0 {
                outbox.publish();
            }
            if order % 1000 == 0 {
                // Long enough for the reader to fall asleep.
                thread::sleep(Duration::from_millis(2));
            }
        }
        outbox.publish();
        assert_eq!(outbox.passed(), (ROUNDS, ROUNDS));
    }

    struct Gives<'a>(&'a mut Outbox);

    impl Sink for Gives<'_> {
        fn reserve_packet(&mut self, _: usize) -> Option<&mut [u8]> {
            None
        }
        fn commit_packet(&mut self, _: usize) {}
        fn reserve_datagram(&mut self, _: &Route, _: usize) -> Option<&mut [u8]> {
            None
        }
        fn commit_datagram(&mut self, _: usize) {}
        fn hand_over(&mut self, to: WorkerId, handover: &Handover<'_>) -> bool {
            self.0.hand_over(to, handover)
        }
        fn give(&mut self, to: WorkerId, moved: Moved) {
            self.0.give(to, moved);
        }
    }
}
