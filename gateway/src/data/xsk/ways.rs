//! Which datagrams we may send past the socket layer, and with which headers: what workers know of it, and where they
//! ask.
//!
//! ```text
//!   worker: Ways --- asks ---> Board <--- answers --- netlink (control thread)
//!             ^------ epoch ----'
//! ```
//!
//! A worker keeps its own copies and looks at one number per batch; if that has changed, it forgets all of them and
//! asks again. What is not answered yet, or is answered with [`Answer::Slow`], goes through the kernel's sockets, and
//! that is also what makes the kernel find a neighbour.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use gateway_proto::Route;
use rustc_hash::FxHashMap;
use tokio::sync::Notify;

use super::headers::{Hop, Way};

/// The addresses of a datagram; without a source the kernel chooses one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Pair {
    /// Ours.
    pub src: Option<IpAddr>,
    /// Theirs.
    pub dst: IpAddr,
}

/// What is known about a [`Pair`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Through the kernel: it is not known yet, or cannot be done otherwise.
    Slow,
    /// Over this link, from this address.
    Fast(Hop, IpAddr),
}

/// Pairs that are remembered at most. Beyond them, all are forgotten: whoever is in use asks again.
const MOST: usize = 16_384;

/// Where workers ask and are answered.
#[derive(Default)]
pub struct Board {
    /// Counts up with each answer that is not what it was.
    epoch: AtomicU64,
    state: Mutex<State>,
    asked: Notify,
}

#[derive(Default)]
struct State {
    answers: FxHashMap<Pair, Answer>,
    /// Without an answer.
    open: Vec<Pair>,
}

impl Board {
    /// What is known now. A pair that was never asked for is slow, and looked into.
    fn ask(&self, pair: Pair) -> Answer {
        let mut state = self.state();
        if let Some(answer) = state.answers.get(&pair) {
            return *answer;
        }
        if state.answers.len() >= MOST {
            *state = State::default();
            self.epoch.fetch_add(1, Ordering::Release);
        }
        state.answers.insert(pair, Answer::Slow);
        state.open.push(pair);
        drop(state);
        self.asked.notify_one();
        Answer::Slow
    }

    /// Waits until a worker asks.
    pub async fn asked(&self) {
        self.asked.notified().await;
    }

    /// What was asked since the last call.
    pub fn take_open(&self) -> Vec<Pair> {
        std::mem::take(&mut self.state().open)
    }

    /// Says what is known. True if that is news to anybody; pairs that nobody asks for any more are none.
    pub fn publish(&self, answers: impl IntoIterator<Item = (Pair, Answer)>) -> bool {
        let mut state = self.state();
        let mut news = false;
        for (pair, answer) in answers {
            if let Some(old) = state.answers.get_mut(&pair)
                && *old != answer
            {
                *old = answer;
                news = true;
            }
        }
        if news {
            self.epoch.fetch_add(1, Ordering::Release);
        }
        news
    }

    /// Whether anybody has asked for `pair` and may still do.
    pub fn is_known(&self, pair: &Pair) -> bool {
        self.state().answers.contains_key(pair)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The addresses and ports of a route.
type Key = (Option<SocketAddr>, SocketAddr);

/// One worker's ways.
pub struct Ways {
    board: Arc<Board>,
    epoch: u64,
    /// Where in `list` each way is; `None`: through the kernel.
    known: FxHashMap<Key, Option<usize>>,
    list: Vec<Way>,
    /// What was found last: most datagrams follow one of their own route.
    recent: Option<(Key, Option<usize>)>,
    /// Our port in each family, for datagrams without a source.
    port_v4: u16,
    port_v6: u16,
    /// Identification of the first datagram of the next way.
    id: u16,
}

impl Ways {
    /// Nothing is known.
    pub fn new(board: Arc<Board>, port_v4: u16, port_v6: u16) -> Self {
        let epoch = board.epoch.load(Ordering::Acquire);
        let (known, list) = (FxHashMap::default(), Vec::new());
        Self { board, epoch, known, list, recent: None, port_v4, port_v6, id: 0 }
    }

    /// Forgets what is not so any more. Call before each batch.
    #[inline]
    pub fn begin_batch(&mut self) {
        let epoch = self.board.epoch.load(Ordering::Acquire);
        if epoch != self.epoch {
            self.epoch = epoch;
            self.forget();
        }
    }

    fn forget(&mut self) {
        self.known.clear();
        self.list.clear();
        self.recent = None;
    }

    /// The number of the headers for `route`, good for this batch; `None`: through the kernel.
    #[inline]
    pub fn find(&mut self, route: &Route) -> Option<usize> {
        let key = (route.src, route.dst);
        if let Some((recent, way)) = self.recent
            && recent == key
        {
            return way;
        }
        let way = match self.known.get(&key) {
            Some(way) => *way,
            None => self.learn(key),
        };
        self.recent = Some((key, way));
        way
    }

    /// The headers of that number.
    #[inline]
    pub fn way(&mut self, number: usize) -> Option<&mut Way> {
        self.list.get_mut(number)
    }

    #[cold]
    fn learn(&mut self, key: Key) -> Option<usize> {
        let (src, dst) = key;
        let way = match self.board.ask(Pair { src: src.map(|src| src.ip()), dst: dst.ip() }) {
            Answer::Slow => None,
            Answer::Fast(hop, source) => {
                let port = if dst.is_ipv4() { self.port_v4 } else { self.port_v6 };
                let src = src.unwrap_or(SocketAddr::new(source, port));
                // Anywhere but where another way begins.
                self.id = self.id.wrapping_add(0x9e37);
                Way::new(hop, src, dst, self.id)
            }
        };
        if self.known.len() >= MOST {
            self.forget();
        }
        let number = way.map(|way| {
            self.list.push(way);
            self.list.len() - 1
        });
        self.known.insert(key, number);
        number
    }
}

#[cfg(test)]
mod tests {
    use gateway_proto::Ecn;

    use super::*;

    const HOP: Hop = Hop { interface: 1, source: [2; 6], destination: [4; 6], mtu: 1500 };

    fn route(src: Option<&str>, dst: &str) -> Route {
        Route { src: src.map(|src| src.parse().unwrap()), dst: dst.parse().unwrap(), ecn: Ecn::NotEct }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn what_is_not_answered_is_slow_and_asked_once() {
        let board = Arc::new(Board::default());
        let mut ways = [Ways::new(board.clone(), 52_625, 7), Ways::new(board.clone(), 52_625, 7)];
        let (to_a, to_b) = (route(None, "192.0.2.2:1"), route(Some("192.0.2.1:5"), "192.0.2.2:2"));
        for _ in 0..3 {
            for ways in &mut ways {
                ways.begin_batch();
                assert!(ways.find(&to_a).is_none() && ways.find(&to_b).is_none());
            }
        }
        let open = board.take_open();
        let pair = Pair { src: None, dst: ip("192.0.2.2") };
        assert_eq!(open, [pair, Pair { src: Some(ip("192.0.2.1")), ..pair }]);
        assert!(board.take_open().is_empty() && board.is_known(&pair));

        assert!(board.publish([(pair, Answer::Fast(HOP, ip("192.0.2.9")))]));
        assert!(!board.publish([(pair, Answer::Fast(HOP, ip("192.0.2.9")))]), "no news");
        for ways in &mut ways {
            assert!(ways.find(&to_a).is_none(), "not in the middle of a batch");
            ways.begin_batch();
            let found = ways.find(&to_a).unwrap();
            assert_eq!(ways.way(found).unwrap().hop(), &HOP);
            assert!(ways.find(&to_b).is_none());
        }
        assert!(board.publish([(pair, Answer::Slow)]));
        ways[0].begin_batch();
        assert!(ways[0].find(&to_a).is_none());
    }

    #[test]
    fn a_datagram_without_a_source_gets_the_address_of_the_route_and_the_port_of_its_family() {
        let board = Arc::new(Board::default());
        let mut ways = Ways::new(board.clone(), 52_625, 700);
        let table = [
            (None, "192.0.2.2:9", "192.0.2.1", "c0000201", 52_625),
            (None, "[2001:db8::2]:9", "2001:db8::1", "00000001", 700),
            (Some("192.0.2.7:33"), "192.0.2.2:9", "192.0.2.7", "c0000207", 33),
        ];
        for (src, dst, source, last, port) in table {
            let route = route(src, dst);
            ways.find(&route);
            let answers: Vec<_> =
                board.take_open().into_iter().map(|pair| (pair, Answer::Fast(HOP, ip(source)))).collect();
            assert!(board.publish(answers));
            ways.begin_batch();
            let mut frame = [0; 128];
            let found = ways.find(&route).unwrap();
            let start = ways.way(found).unwrap().finish(&mut frame, 8, Ecn::NotEct).unwrap();
            let udp = super::super::headers::PAYLOAD_AT - 8;
            let end_of_source = if dst.starts_with('[') { udp - 16 } else { udp - 4 };
            assert_eq!(hex::encode(&frame[end_of_source - 4..end_of_source]), last, "{dst}");
            assert_eq!(frame[udp..udp + 2], u16::to_be_bytes(port), "{dst}");
            assert!(start < udp);
        }
        // Addresses of two families are no way, whatever the board says.
        let mixed = route(Some("192.0.2.7:33"), "[2001:db8::2]:9");
        ways.find(&mixed);
        let answers: Vec<_> =
            board.take_open().into_iter().map(|pair| (pair, Answer::Fast(HOP, ip("::1")))).collect();
        board.publish(answers);
        ways.begin_batch();
        assert!(ways.find(&mixed).is_none());
    }

    #[test]
    fn what_nobody_asks_for_any_more_makes_room() {
        let board = Arc::new(Board::default());
        let mut ways = Ways::new(board.clone(), 1, 1);
        let to = |i: usize| {
            let [.., a, b] = i.to_be_bytes();
            Route { src: None, dst: SocketAddr::from(([10, 0, a, b], 1)), ecn: Ecn::NotEct }
        };
        for i in 0..MOST {
            ways.find(&to(i));
        }
        let epoch = board.epoch.load(Ordering::Relaxed);
        ways.find(&to(MOST));
        assert_eq!(board.state().answers.len(), 1);
        assert_ne!(board.epoch.load(Ordering::Relaxed), epoch, "all ask again");
        assert!(ways.known.len() <= MOST);
        let gone = Pair { src: None, dst: to(0).dst.ip() };
        assert!(!board.is_known(&gone));
        assert!(!board.publish([(gone, Answer::Fast(HOP, ip("10.0.0.1")))]), "nobody asks for it");
    }
}
