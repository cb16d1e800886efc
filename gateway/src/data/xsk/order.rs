//! In which order rings and sockets are read, so that switching between them at run time costs no packet.
//!
//! WireGuard drops what is more than 1024 packets behind the newest it has seen, so nothing that was sent later may be
//! read far before what was sent earlier. One rule is enough while nothing changes, and when the fast path is switched
//! off: everything that is in the rings is read first, before what other workers have passed and before each batch from
//! a socket. Switched on, it is the other way round:
//!
//! ```text
//!   control                      workers
//!   set(Hold)      ------------> each empties its rings once more and leaves them alone
//!   is_seen()      <------------ all have
//!   the kernel's flag is set
//!   set(Catch)     ------------> each reads its sockets until they are empty, and passes on what is others'
//!                                when all have: each takes what was passed to it, then reads its rings again
//!   is_settled()   <------------ all do; not before may the flag be cleared again
//! ```

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// What workers are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Read rings first, then sockets.
    Steady,
    /// Empty the rings once more, then read sockets only. Nothing arrives in the rings then.
    Hold,
    /// Read sockets until they are empty, then go on as in [`Stage::Steady`].
    Catch,
}

/// What control says to all workers, and hears from each.
pub struct Switch {
    /// A number that counts up, and the stage in its low two bits.
    order: AtomicU32,
    /// The last order that each worker leaves its rings alone for.
    seen: Box<[AtomicU32]>,
    /// The last order that each worker has emptied its sockets for.
    caught: Box<[AtomicU32]>,
    /// The last order of [`Stage::Catch`] that each worker is done with.
    settled: Box<[AtomicU32]>,
    /// Datagrams may leave by the rings.
    sends: AtomicBool,
}

impl Switch {
    /// For so many workers.
    pub fn new(workers: usize) -> Self {
        let none = || (0..workers).map(|_| AtomicU32::new(0)).collect();
        Self {
            order: AtomicU32::new(0),
            seen: none(),
            caught: none(),
            settled: none(),
            sends: AtomicBool::new(true),
        }
    }

    /// Whether datagrams may leave by the rings, from the next batch on.
    pub fn send(&self, sends: bool) {
        self.sends.store(sends, Ordering::Relaxed);
    }

    /// See [`Switch::send`].
    #[inline]
    pub fn sends(&self) -> bool {
        self.sends.load(Ordering::Relaxed)
    }

    /// Orders a stage. Workers that sleep must be woken.
    pub fn set(&self, stage: Stage) {
        let number = (self.order.load(Ordering::Relaxed) >> 2).wrapping_add(1);
        let stage = match stage {
            Stage::Steady => 0,
            Stage::Hold => 1,
            Stage::Catch => 2,
        };
        self.order.store(number << 2 | stage, Ordering::Release);
    }

    /// Whether every worker does what [`Stage::Hold`] asks for.
    pub fn is_seen(&self) -> bool {
        self.by_all(&self.seen)
    }

    /// Whether every worker has done what [`Stage::Catch`] asks for and reads rings again.
    pub fn is_settled(&self) -> bool {
        self.by_all(&self.settled)
    }

    fn by_all(&self, said: &[AtomicU32]) -> bool {
        let order = self.order.load(Ordering::Acquire);
        said.iter().all(|said| said.load(Ordering::Acquire) == order)
    }
}

/// One worker's view.
pub struct Order {
    worker: usize,
    order: u32,
    stage: Stage,
    /// In [`Stage::Catch`]: all sockets were empty; what others have passed is the last that is older than the rings.
    all_caught: bool,
    /// Which of its sockets were seen empty since the order.
    empty: [bool; 2],
    told: bool,
}

impl Order {
    /// For the worker of this number.
    pub fn new(worker: usize) -> Self {
        Self { worker, order: 0, stage: Stage::Steady, all_caught: false, empty: [false; 2], told: false }
    }

    /// Looks what is ordered. Call at the beginning of a turn.
    #[inline]
    pub fn begin_turn(&mut self, switch: &Switch) {
        let order = switch.order.load(Ordering::Acquire);
        if order != self.order {
            self.order = order;
            self.stage = match order & 3 {
                0 => Stage::Steady,
                1 => Stage::Hold,
                _ => Stage::Catch,
            };
            (self.empty, self.told, self.all_caught) = ([false; 2], false, false);
        } else if self.stage == Stage::Catch && self.told && switch.by_all(&switch.caught) {
            self.all_caught = true;
        }
    }

    /// A share of what others have passed was taken; `left` says whether there is more.
    #[inline]
    pub fn on_passed(&mut self, left: bool, switch: &Switch) {
        if self.all_caught && !left {
            (self.stage, self.all_caught) = (Stage::Steady, false);
            switch.settled[self.worker].store(self.order, Ordering::Release);
        }
    }

    /// Whether rings may be read now.
    #[inline]
    pub fn reads_rings(&self) -> bool {
        match self.stage {
            Stage::Steady => true,
            Stage::Hold => !self.told,
            Stage::Catch => false,
        }
    }

    /// A socket (IPv4 or IPv6) is not there, or holds nothing now.
    #[inline]
    pub fn on_empty(&mut self, v6: bool) {
        self.empty[usize::from(v6)] = true;
    }

    /// What was read is dealt with, and what is others' is on its way.
    #[inline]
    pub fn end_turn(&mut self, switch: &Switch) {
        let (done, said) = match self.stage {
            Stage::Steady => return,
            Stage::Hold => (true, &switch.seen),
            Stage::Catch => (self.empty == [true; 2], &switch.caught),
        };
        if done && !self.told {
            self.told = true;
            said[self.worker].store(self.order, Ordering::Release);
        }
    }

    /// Whether another turn is needed soon, though nothing may arrive: others are not done yet.
    pub fn is_waiting(&self) -> bool {
        self.stage == Stage::Catch
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};

    use super::*;

    #[test]
    fn rings_are_read_again_when_all_have_emptied_their_sockets() {
        let switch = Switch::new(2);
        let mut orders = [Order::new(0), Order::new(1)];
        fn turn(switch: &Switch, order: &mut Order, empty: [bool; 2]) -> bool {
            order.begin_turn(switch);
            order.on_passed(false, switch);
            for v6 in [false, true] {
                if empty[usize::from(v6)] {
                    order.on_empty(v6);
                }
            }
            let reads = order.reads_rings();
            order.end_turn(switch);
            reads
        }
        let both = [true, true];
        assert!(switch.is_seen() && turn(&switch, &mut orders[0], both));
        switch.set(Stage::Hold);
        assert!(turn(&switch, &mut orders[0], both), "once more");
        assert!(!switch.is_seen(), "the other one does not know");
        assert!(turn(&switch, &mut orders[1], both));
        assert!(switch.is_seen());
        assert!(!turn(&switch, &mut orders[0], both), "however empty they are");
        switch.set(Stage::Catch);
        assert!(!turn(&switch, &mut orders[0], both));
        assert!(orders[0].is_waiting());
        assert!(!turn(&switch, &mut orders[0], both), "the other one has not looked");
        assert!(!turn(&switch, &mut orders[1], [true, false]));
        assert!(!turn(&switch, &mut orders[1], [false, false]), "one is not empty");
        assert!(!turn(&switch, &mut orders[0], both));
        assert!(!turn(&switch, &mut orders[1], [false, true]));
        assert!(turn(&switch, &mut orders[0], [false, false]), "in the turn after all were empty");
        assert!(!switch.is_settled());
        assert!(turn(&switch, &mut orders[1], [false, false]) && !orders[1].is_waiting());
        assert!(switch.is_settled());
        // Ordered again before it was done.
        switch.set(Stage::Catch);
        turn(&switch, &mut orders[0], both);
        switch.set(Stage::Hold);
        switch.set(Stage::Catch);
        assert!(!turn(&switch, &mut orders[1], both) && !turn(&switch, &mut orders[1], both));
        assert!(!turn(&switch, &mut orders[0], both), "what was said about an earlier order does not count");
        assert!(turn(&switch, &mut orders[0], both) && turn(&switch, &mut orders[1], both));
    }

    /// WireGuard's replay window, in packets.
    const WINDOW: u64 = 1024;
    const BUDGET: usize = 1024;
    const RING: usize = 1024;

    /// One client's packets, numbered, and the workers that read them. The first one owns the client.
    struct Model {
        rng: SmallRng,
        switch: Switch,
        workers: Vec<Reader>,
        /// Whose socket the client's address hashes to.
        hash: usize,
        flag: bool,
        sent: u64,
        newest: u64,
        read: u64,
        late: u64,
    }

    struct Reader {
        order: Order,
        ring: VecDeque<u64>,
        socket: VecDeque<u64>,
        passed: VecDeque<u64>,
    }

    impl Model {
        fn new(seed: u64) -> Self {
            let mut rng = SmallRng::seed_from_u64(seed);
            let count = rng.random_range(1..4);
            let reader = |worker| Reader {
                order: Order::new(worker),
                ring: VecDeque::new(),
                socket: VecDeque::new(),
                passed: VecDeque::new(),
            };
            let workers = (0..count).map(reader).collect();
            let hash = rng.random_range(0..count);
            Self {
                rng,
                switch: Switch::new(count),
                workers,
                hash,
                flag: false,
                sent: 0,
                newest: 0,
                read: 0,
                late: 0,
            }
        }

        /// Up to `most` packets arrive.
        fn arrive(&mut self, most: usize) {
            for _ in 0..self.rng.random_range(0..=most) {
                self.sent += 1;
                if !self.flag {
                    self.workers[self.hash].socket.push_back(self.sent);
                } else if self.workers[0].ring.len() < RING {
                    self.workers[0].ring.push_back(self.sent);
                }
            }
        }

        fn open(&mut self, number: u64) {
            self.newest = self.newest.max(number);
            self.late += u64::from(number + WINDOW <= self.newest);
            self.read += 1;
        }

        fn read_rings(&mut self, worker: usize) {
            for _ in 0..self.workers[worker].ring.len() {
                let number = self.workers[worker].ring.pop_front().unwrap();
                self.open(number);
            }
        }

        /// As in `turn.rs`. With `ordered` off, rings are read whatever was ordered.
        fn turn(&mut self, worker: usize, ordered: bool) {
            self.workers[worker].order.begin_turn(&self.switch);
            if self.workers[worker].order.reads_rings() {
                self.read_rings(worker);
            }
            for _ in 0..BUDGET {
                let Some(number) = self.workers[worker].passed.pop_front() else { break };
                self.open(number);
            }
            let left = !self.workers[worker].passed.is_empty();
            self.workers[worker].order.on_passed(left, &self.switch);
            let mut taken = 0;
            loop {
                if self.workers[worker].order.reads_rings() || !ordered {
                    self.read_rings(worker);
                }
                if taken >= BUDGET {
                    break;
                }
                let batch = self.rng.random_range(1..64);
                for _ in 0..batch {
                    let Some(number) = self.workers[worker].socket.pop_front() else { break };
                    taken += 1;
                    match worker {
                        0 => self.open(number),
                        _ => self.workers[0].passed.push_back(number),
                    }
                }
                if self.workers[worker].socket.is_empty() {
                    self.workers[worker].order.on_empty(false);
                    self.workers[worker].order.on_empty(true);
                    break;
                }
                // Time passes.
                self.arrive(20);
            }
            self.workers[worker].order.end_turn(&self.switch);
        }

        /// One switch after the other while packets arrive; how many came too late.
        fn run(mut self, ordered: bool) -> (u64, u64) {
            let mut stage = Stage::Steady;
            for _ in 0..400 {
                match (stage, self.flag) {
                    (Stage::Steady, false) if self.rng.random_bool(0.1) => {
                        stage = Stage::Hold;
                        self.switch.set(stage);
                    }
                    (Stage::Hold, _) if self.switch.is_seen() => {
                        self.flag = true;
                        stage = Stage::Steady;
                        self.switch.set(Stage::Catch);
                    }
                    (Stage::Steady, true) if self.switch.is_settled() && self.rng.random_bool(0.1) => {
                        self.flag = false
                    }
                    _ => {}
                }
                // Sometimes far more than is read, so that sockets fill.
                let most = if self.rng.random_bool(0.2) { 3000 } else { 300 };
                self.arrive(most);
                for _ in 0..3 {
                    let worker = self.rng.random_range(0..self.workers.len());
                    self.turn(worker, ordered);
                }
            }
            (self.late, self.read)
        }
    }

    #[test]
    fn no_packet_comes_too_late_however_often_the_fast_path_is_switched() {
        let mut without = 0;
        for seed in 0..60 {
            let (late, read) = Model::new(seed).run(true);
            assert!(read > 10_000, "seed {seed}: {read}");
            assert_eq!(late, 0, "seed {seed}: of {read}");
            without += Model::new(seed).run(false).0;
        }
        assert!(without > 0, "the order makes no difference");
    }
}
