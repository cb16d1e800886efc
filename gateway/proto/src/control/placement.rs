//! Which worker holds which client. Knows clients by their ids only; what they do comes in as events.
//!
//! A new client goes to the worker with the fewest active clients; it stays there as long as control knows it, with two
//! exceptions. Where nothing steers packets ([`Workers::by_arrival`]), it follows its direct path to the worker whose
//! socket that reaches. And while one worker has far more active clients than another, one client a second moves.
//!
//! A client that moves is not ordered elsewhere before its new worker says that it has it.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use rustc_hash::FxHashMap;

use super::Workers;
use crate::{
    command::Home,
    ids::{ClientId, WorkerId},
};

/// A client that carried data so recently counts as active; a busy one says so every 5 s.
const ACTIVE_FOR: Duration = Duration::from_secs(10);
/// How often the balance is looked at, and so how often a client moves for its sake. Also the shortest time between two
/// moves of one client, by when every worker has long heard of the first.
const INTERVAL: Duration = Duration::from_secs(1);

/// The homes of all clients.
#[derive(Debug)]
pub(super) struct Placement {
    by_arrival: bool,
    places: FxHashMap<ClientId, Place>,
    /// One for each worker.
    loads: Vec<Load>,
    /// Clients that left, until the workers have been told.
    left: FxHashMap<ClientId, Home>,
    /// When who was active, oldest first; a client's newer entries overrule its older ones.
    activity: VecDeque<(Instant, ClientId)>,
    /// When the balance is looked at next; `None` while nobody is active.
    look_at: Option<Instant>,
    orders: u64,
}

#[derive(Debug)]
struct Place {
    home: Home,
    moved: Option<Instant>,
    /// The last activity; `None` once it is long ago.
    active: Option<Instant>,
    /// Where its direct path arrives, once that has been thought about.
    arrival: Option<WorkerId>,
}

/// Clients of one worker, those on their way to it included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
struct Load {
    active: usize,
    all: usize,
}

impl Placement {
    pub(super) fn new(workers: Workers) -> Self {
        Self {
            by_arrival: workers.by_arrival,
            places: FxHashMap::default(),
            loads: vec![Load::default(); workers.count.max(1)],
            left: FxHashMap::default(),
            activity: VecDeque::new(),
            look_at: None,
            orders: 0,
        }
    }

    /// How many homes are known, those included that clients have left and the workers were not told of.
    pub(super) fn len(&self) -> usize {
        self.places.len() + self.left.len()
    }

    /// Clients of each worker, those on their way to it included.
    pub(super) fn clients(&self) -> impl Iterator<Item = usize> + '_ {
        self.loads.iter().map(|load| load.all)
    }

    /// Control knows the client from now on. One that has a home keeps it.
    pub(super) fn enter(&mut self, id: ClientId) {
        if self.places.contains_key(&id) {
            return;
        }
        let worker = self.least(|load| load);
        let home = Home { worker, from: None, order: self.next_order() };
        self.places.insert(id, Place { home, moved: None, active: None, arrival: None });
        self.loads[worker.get()].all += 1;
        self.left.remove(&id);
    }

    /// Control knows it no longer.
    pub(super) fn leave(&mut self, id: ClientId) {
        let Some(place) = self.places.remove(&id) else { return };
        let load = &mut self.loads[place.home.worker.get()];
        load.all -= 1;
        load.active -= usize::from(place.active.is_some());
        self.left.insert(id, place.home);
    }

    /// Whom the next command about the client names. For one that left: once.
    pub(super) fn tell(&mut self, id: ClientId) -> Home {
        let place = self.places.get(&id).map(|place| place.home);
        let nobody = Home { worker: WorkerId::FIRST, from: None, order: self.orders };
        place.or_else(|| self.left.remove(&id)).unwrap_or(nobody)
    }

    /// The worker that holds the client or is about to.
    pub(super) fn home(&self, id: ClientId) -> Option<WorkerId> {
        self.places.get(&id).map(|place| place.home.worker)
    }

    /// The client has arrived where it was ordered to. True if that is the order of today: all workers are to hear that
    /// nobody need wait for it.
    pub(super) fn on_adopted(&mut self, id: ClientId, order: u64) -> bool {
        let place = self.places.get_mut(&id).filter(|place| place.home.order == order);
        place.is_some_and(|place| place.home.from.take().is_some())
    }

    /// The client carried data.
    pub(super) fn on_activity(&mut self, id: ClientId, at: Instant) {
        if self.loads.len() == 1 {
            return;
        }
        let Some(place) = self.places.get_mut(&id) else { return };
        let before = place.active.replace(at.max(place.active.unwrap_or(at)));
        self.loads[place.home.worker.get()].active += usize::from(before.is_none());
        self.activity.push_back((at, id));
        self.look_at.get_or_insert(at + INTERVAL);
    }

    /// A message of the client's nominated direct path reached `worker`. True if the client is to move there.
    pub(super) fn on_heard(&mut self, id: ClientId, worker: WorkerId, now: Instant) -> bool {
        let Some(place) = self.places.get_mut(&id).filter(|_| self.by_arrival) else { return false };
        if place.arrival == Some(worker) || !place.may_move(now) || worker.get() >= self.loads.len() {
            return false;
        }
        // Thought about once: a client that moved for the balance's sake shall not be called back.
        place.arrival = Some(worker);
        if place.home.worker == worker || self.is_crowded(worker) {
            return false;
        }
        self.order(id, worker, now);
        true
    }

    /// When [`Placement::handle_timeout`] is due.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.look_at
    }

    /// Looks at the balance. The client that is to move, if one is.
    pub(super) fn handle_timeout(&mut self, now: Instant) -> Option<ClientId> {
        self.look_at.take_if(|at| *at <= now)?;
        self.expire(now);
        self.look_at = (!self.activity.is_empty()).then(|| now + INTERVAL);
        let (full, least) = (self.most(), self.least(|load| load.active));
        if self.loads[full.get()].active < 2 * self.loads[least.get()].active + 4 {
            return None;
        }
        let movable =
            |place: &Place| place.active.filter(|_| place.home.worker == full && place.may_move(now));
        // The one that has been quiet for the longest is likely the lightest.
        let (_, id) = self.places.iter().filter_map(|(id, place)| Some((movable(place)?, *id))).min()?;
        self.order(id, least, now);
        Some(id)
    }

    fn order(&mut self, id: ClientId, to: WorkerId, now: Instant) {
        let order = self.next_order();
        let Some(place) = self.places.get_mut(&id) else { return };
        let from = place.home.worker;
        place.home = Home { worker: to, from: Some(from), order };
        place.moved = Some(now);
        let active = usize::from(place.active.is_some());
        for (worker, here) in [(from, false), (to, true)] {
            let Load { all, active: busy } = &mut self.loads[worker.get()];
            *all = if here { *all + 1 } else { *all - 1 };
            *busy = if here { *busy + active } else { *busy - active };
        }
    }

    fn expire(&mut self, now: Instant) {
        while let Some((at, id)) = self.activity.front().copied().filter(|(at, _)| *at + ACTIVE_FOR <= now) {
            self.activity.pop_front();
            if let Some(place) = self.places.get_mut(&id)
                && place.active.take_if(|last| *last <= at).is_some()
            {
                self.loads[place.home.worker.get()].active -= 1;
            }
        }
    }

    /// Clearly fuller than the least loaded one?
    fn is_crowded(&self, worker: WorkerId) -> bool {
        let over = |load: fn(&Load) -> usize| {
            let least = self.loads.iter().map(load).min().unwrap_or(0);
            load(&self.loads[worker.get()]) > 2 * least + 4
        };
        over(|load| load.active) || over(|load| load.all)
    }

    /// The first of those with the lowest load.
    fn least<K: Ord>(&self, by: impl Fn(Load) -> K) -> WorkerId {
        let least = (0..).zip(&self.loads).min_by_key(|(_, load)| by(**load));
        least.and_then(|(n, _)| WorkerId::new(n)).unwrap_or_default()
    }

    fn most(&self) -> WorkerId {
        let most = (0..).zip(&self.loads).max_by_key(|(_, load)| load.active);
        most.and_then(|(n, _)| WorkerId::new(n)).unwrap_or_default()
    }

    fn next_order(&mut self) -> u64 {
        self.orders += 1;
        self.orders
    }
}

impl Place {
    fn may_move(&self, now: Instant) -> bool {
        let rested = |moved| now.saturating_duration_since(moved) >= INTERVAL;
        self.home.from.is_none() && self.moved.is_none_or(rested)
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::control::tests::epoch;

    const SECOND: Duration = Duration::from_secs(1);

    fn id(n: u128) -> ClientId {
        ClientId(Uuid::from_u128(n))
    }

    fn worker(n: usize) -> WorkerId {
        WorkerId::new(n).unwrap()
    }

    fn placement(count: usize, by_arrival: bool) -> Placement {
        Placement::new(Workers { count, by_arrival })
    }

    fn home(placement: &Placement, n: u128) -> usize {
        placement.home(id(n)).unwrap().get()
    }

    /// Runs the clock for `seconds`; who was ordered to move, each of them arriving at once.
    fn moved(placement: &mut Placement, start: Instant, seconds: u64, busy: &[u128]) -> Vec<(u64, u128)> {
        let mut moved = Vec::new();
        for second in 0..seconds {
            let now = start + SECOND * u32::try_from(second).unwrap();
            if second.is_multiple_of(5) {
                busy.iter().for_each(|n| placement.on_activity(id(*n), now));
            }
            while placement.poll_timeout().is_some_and(|at| at <= now) {
                if let Some(who) = placement.handle_timeout(now) {
                    let order = placement.tell(who).order;
                    assert!(placement.on_adopted(who, order));
                    moved.push((second, who.0.as_u128()));
                }
            }
        }
        moved
    }

    #[test]
    fn clients_that_connect_at_once_are_spread_evenly() {
        for count in [1, 2, 3, 64] {
            let mut placement = placement(count, false);
            (0..200).for_each(|n| placement.enter(id(n)));
            let loads: Vec<_> = placement.loads.iter().map(|load| load.all).collect();
            assert!(loads.iter().max().unwrap() - loads.iter().min().unwrap() <= 1, "{loads:?}");
            assert_eq!(home(&placement, 0), 0, "the lowest of equals");
        }
    }

    #[test]
    fn who_is_active_counts_before_who_is_there() {
        let now = epoch();
        let mut placement = placement(2, false);
        (0..4).for_each(|n| placement.enter(id(n)));
        placement.on_activity(id(0), now);
        placement.enter(id(4));
        placement.enter(id(5));
        assert_eq!([home(&placement, 4), home(&placement, 5)], [1, 1]);
        assert_eq!(moved(&mut placement, now, 12, &[]), []);
        assert_eq!(placement.loads, [Load { active: 0, all: 2 }, Load { active: 0, all: 4 }]);
        placement.enter(id(6));
        assert_eq!(home(&placement, 6), 0, "activity is forgotten after 10 s");
        assert_eq!(placement.poll_timeout(), None, "nobody is active: nothing to look at");
    }

    #[test]
    fn a_home_is_kept_until_the_client_is_forgotten_and_told_once_more_then() {
        let mut placement = placement(3, false);
        (0..3).for_each(|n| placement.enter(id(n)));
        let before = placement.tell(id(1));
        placement.enter(id(1));
        assert_eq!(placement.tell(id(1)), before);
        placement.leave(id(1));
        assert_eq!(placement.home(id(1)), None);
        assert_eq!(placement.tell(id(1)), before);
        assert!(placement.left.is_empty());
        placement.enter(id(1));
        assert!(placement.tell(id(1)).order > before.order, "another life");
    }

    #[test]
    fn an_imbalance_of_active_clients_is_evened_out_one_a_second() {
        let start = epoch();
        let mut placement = placement(2, false);
        (0..20).for_each(|n| placement.enter(id(n)));
        // The clients of worker 1 leave, but for one.
        (3..20).step_by(2).for_each(|n| placement.leave(id(n)));
        let busy: Vec<u128> = (0..20).step_by(2).chain([1]).collect();
        let moved = moved(&mut placement, start, 30, &busy);
        assert!(moved.windows(2).all(|pair| pair[0].0 < pair[1].0), "one at a time: {moved:?}");
        assert_eq!(moved.len(), 2, "10 and 1 become 8 and 3: {moved:?}");
        assert_eq!(placement.loads.iter().map(|load| load.active).collect::<Vec<_>>(), [8, 3]);
    }

    #[test]
    fn who_is_on_the_way_is_not_ordered_elsewhere() {
        let start = epoch();
        let mut placement = placement(2, true);
        placement.enter(id(0));
        assert!(placement.on_heard(id(0), worker(1), start));
        let order = placement.tell(id(0));
        assert_eq!((order.worker, order.from), (worker(1), Some(worker(0))));
        assert!(!placement.on_heard(id(0), worker(0), start + 5 * SECOND));
        assert!(!placement.on_adopted(id(0), order.order - 1));
        assert_eq!(placement.tell(id(0)), order, "that was an earlier one");
        assert!(placement.on_adopted(id(0), order.order) && !placement.on_adopted(id(0), order.order));
        assert_eq!(placement.tell(id(0)), Home { from: None, ..order });
        assert!(placement.on_heard(id(0), worker(0), start + 5 * SECOND));
    }

    #[test]
    fn a_path_that_flaps_moves_its_client_once_a_second_at_most() {
        let start = epoch();
        let mut placement = placement(2, true);
        placement.enter(id(0));
        let mut moves = 0;
        for tick in 0..1000 {
            if placement.on_heard(
                id(0),
                worker(1 - tick % 2),
                start + SECOND / 100 * u32::try_from(tick).unwrap(),
            ) {
                moves += 1;
                let order = placement.tell(id(0)).order;
                placement.on_adopted(id(0), order);
            }
        }
        assert!((5..=10).contains(&moves), "{moves}");
    }

    #[test]
    fn a_path_leads_its_client_home_unless_that_worker_is_crowded() {
        let start = epoch();
        let mut steered = placement(2, false);
        steered.enter(id(0));
        assert!(!steered.on_heard(id(0), worker(1), start), "packets are steered");

        let mut placement = placement(2, true);
        (0..20).for_each(|n| placement.enter(id(n)));
        let mut followed = 0;
        for n in 0..20 {
            if placement.on_heard(id(n), worker(1), start) {
                followed += 1;
                let order = placement.tell(id(n)).order;
                placement.on_adopted(id(n), order);
            }
        }
        let all: Vec<_> = placement.loads.iter().map(|load| load.all).collect();
        assert_eq!((followed, all), (5, vec![5, 15]), "15 > 2 * 5 + 4");
        // Nor is one called back that left for the balance's sake.
        let busy: Vec<u128> = (0..20).filter(|n| home(&placement, *n) == 1).collect();
        let moved = moved(&mut placement, start + 2 * SECOND, 30, &busy);
        assert!(!moved.is_empty());
        for (_, n) in moved {
            assert!(!placement.on_heard(id(n), worker(1), start + 60 * SECOND), "{n}");
            assert_eq!(home(&placement, n), 0);
        }
    }

    #[test]
    fn loads_add_up_whatever_happens() {
        use rand::{Rng, SeedableRng, rngs::SmallRng};
        let mut random = SmallRng::seed_from_u64(5);
        let mut placement = placement(4, true);
        let mut now = epoch();
        for _ in 0..20_000 {
            let n = id(random.random_range(0..40));
            match random.random_range(0..6) {
                0 => placement.enter(n),
                1 if random.random_ratio(1, 3) => placement.leave(n),
                2 => placement.on_activity(n, now),
                3 => {
                    placement.on_heard(n, worker(random.random_range(0..4)), now);
                }
                4 => {
                    let order = placement.tell(n).order;
                    placement.on_adopted(n, order);
                }
                _ => {
                    now += SECOND / 4;
                    placement.handle_timeout(now);
                }
            }
            let mut loads = vec![Load::default(); 4];
            for place in placement.places.values() {
                let load = &mut loads[place.home.worker.get()];
                load.all += 1;
                load.active += usize::from(place.active.is_some());
            }
            assert_eq!(loads, placement.loads);
        }
        assert!(placement.activity.len() < 20_000 / 6, "what is over is forgotten");
    }
}
