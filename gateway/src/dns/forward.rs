//! One query's way to an answer: whom to ask, how long to wait before asking somebody else too, when to give up.
//!
//! ```text
//! client came over UDP:  every nameserver over UDP, again over UDP, over TCP
//! client came over TCP:  every nameserver over TCP, over UDP
//! ```
//!
//! in the order of `rtt`. The next turn begins when the one before failed, or took too long; what was asked before is
//! still listened to. The first good answer wins. A resolver that answers SERVFAIL or REFUSED may be alone with its
//! opinion, so the others are asked; if none knows better, the first such answer is the client's.

use std::{
    cell::RefCell,
    io,
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use hickory_proto::op::ResponseCode;
use tokio::time::{Instant, sleep_until, timeout};

use super::{
    latency::{Purpose, Verdict},
    limits::{Limits, Over},
    message::{Answer, Query, UDP_MINIMUM},
    nameservers::Set,
    rtt::Transport,
    stats::{Count, Stats},
    upstream::Upstream,
};

/// For everything together (dns.md section 4.3): stub resolvers wait no longer.
pub const OVERALL_LIMIT: Duration = Duration::from_secs(5);
/// Nobody else is asked sooner than this, so that an answer that a resolver must fetch itself is not fetched twice.
const PATIENCE_MIN: Duration = Duration::from_millis(400);
/// And not later than this, so that two dead nameservers leave time for a third.
const PATIENCE_MAX: Duration = Duration::from_millis(1200);
/// For fetching over TCP what was truncated; then the client gets what there is.
const FETCH_LIMIT: Duration = Duration::from_secs(2);

/// What all servers share. One thread has it.
#[derive(Debug)]
pub struct Forwarder {
    /// Counters.
    pub stats: Arc<Stats>,
    upstream: Upstream,
    nameservers: RefCell<Rc<Set>>,
    limits: RefCell<Limits>,
}

/// The right to forward one query; gives it back when dropped.
#[derive(Debug)]
pub struct Permit {
    forwarder: Rc<Forwarder>,
    client: IpAddr,
}

impl Forwarder {
    /// Without nameservers: every answer is SERVFAIL. `mark` is SO_MARK of the sockets towards nameservers.
    pub fn new(mark: Option<u32>, stats: Arc<Stats>) -> Rc<Self> {
        Rc::new(Self {
            stats,
            upstream: Upstream::new(mark),
            nameservers: RefCell::new(Set::new(Vec::new())),
            limits: RefCell::default(),
        })
    }

    /// From now on these are asked. What is known of others, or was, is forgotten.
    pub fn set_nameservers(&self, servers: Vec<SocketAddr>) {
        if self.nameservers.borrow().servers != servers {
            *self.nameservers.borrow_mut() = Set::new(servers);
        }
    }

    /// Whom it asks.
    #[cfg(test)]
    pub fn nameservers(&self) -> Vec<SocketAddr> {
        self.nameservers.borrow().servers.clone()
    }

    /// Whether `client` may ask now.
    ///
    /// # Errors
    /// With the RCODE to answer.
    pub fn admit(self: &Rc<Self>, client: IpAddr) -> Result<Permit, ResponseCode> {
        match self.limits.borrow_mut().admit(client, Instant::now().into_std()) {
            Ok(()) => Ok(Permit { forwarder: Rc::clone(self), client }),
            Err(Over::Client) => {
                self.stats.count(Count::OverClientLimit);
                Err(ResponseCode::Refused)
            }
            Err(Over::All) => {
                self.stats.count(Count::OverLimit);
                Err(ResponseCode::ServFail)
            }
        }
    }

    async fn resolve(&self, query: &Query, came_over: Transport) -> Option<Answer> {
        let set = Rc::clone(&self.nameservers.borrow());
        let deadline = Instant::now() + OVERALL_LIMIT;
        let mut turns = turns(&set, came_over);
        let mut search = Search { set: &set, asked: Vec::new(), poor: None };
        let mut running = FuturesUnordered::new();
        loop {
            let mut next = deadline;
            if let Some(turn) = turns.next() {
                if search.is_settled(turn.server) {
                    continue;
                }
                if !search.asked.is_empty() {
                    self.stats.count(Count::AskedAgain);
                }
                let index = search.begin(turn);
                next = deadline.min(Instant::now() + turn.patience);
                let servers = &set.servers;
                running.push(async move { (index, self.ask(query, turn, servers, came_over).await) });
            } else if running.is_empty() {
                // Everybody has spoken.
                break;
            }
            tokio::select! {
                Some((index, result)) = running.next() => {
                    if let Some(answer) = search.on_result(index, result) {
                        return Some(answer);
                    }
                }
                () = sleep_until(next) => {
                    if next == deadline {
                        break;
                    }
                }
            }
        }
        search.give_up()
    }

    /// One turn. A truncated answer is fetched over TCP if the client can be given more than it has.
    async fn ask(
        &self,
        query: &Query,
        turn: Turn,
        servers: &[SocketAddr],
        came_over: Transport,
    ) -> io::Result<Reply> {
        let (server, asked) = (servers[turn.server], Instant::now());
        if turn.transport == Transport::Tcp {
            let answer = self.upstream.ask_tcp(query, server).await?;
            return Ok(Reply { answer, took: asked.elapsed() });
        }
        let answer = self.upstream.ask_udp(query, server, &self.stats).await?;
        // What follows is the length of the answer's fault, not the nameserver's.
        let took = asked.elapsed();
        // Every nameserver sends 512 bytes uncut: who takes no more, can be given no more.
        if !answer.is_truncated() || (came_over == Transport::Udp && query.udp_limit() == UDP_MINIMUM) {
            return Ok(Reply { answer, took });
        }
        self.stats.count(Count::UpstreamTruncated);
        let answer = match (timeout(FETCH_LIMIT, self.upstream.ask_tcp(query, server)).await, came_over) {
            (Ok(Ok(whole)), _) => whole,
            // The client learns that there is more, and may come over TCP itself.
            (_, Transport::Udp) => answer,
            (Ok(Err(e)), Transport::Tcp) => return Err(e),
            (Err(_), Transport::Tcp) => return Err(io::ErrorKind::TimedOut.into()),
        };
        Ok(Reply { answer, took })
    }
}

impl Permit {
    /// The answer for the client: a nameserver's, or SERVFAIL. Takes 5 s at most.
    pub async fn forward(self, query: &Query, came_over: Transport) -> Vec<u8> {
        let (stats, began) = (&self.forwarder.stats, Instant::now());
        let answer = self.forwarder.resolve(query, came_over).await;
        let verdict = answer.as_ref().map_or(Verdict::Failed, |answer| answer.code().into());
        stats.latencies.note(Purpose::Client, query.kind().into(), verdict, began.elapsed());
        let Some(answer) = answer else {
            stats.count(Count::Failed);
            return query.error(ResponseCode::ServFail);
        };
        stats.count(Count::Answered);
        if came_over == Transport::Tcp {
            return answer.into_bytes();
        }
        let (limit, was_truncated) = (query.udp_limit(), answer.is_truncated());
        let bytes = answer.into_udp(limit);
        // TC is bit 1 of the third byte.
        if !was_truncated && bytes[2] & 2 != 0 {
            stats.count(Count::Truncated);
        }
        bytes
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.forwarder.limits.borrow_mut().on_done(self.client);
    }
}

/// Somebody is asked, and the next one is not asked sooner than after `patience`.
#[derive(Debug, Clone, Copy)]
struct Turn {
    server: usize,
    transport: Transport,
    patience: Duration,
}

fn turns(set: &Set, came_over: Transport) -> impl Iterator<Item = Turn> + use<> {
    use Transport::{Tcp, Udp};
    let rounds: &[Transport] = match came_over {
        Udp => &[Udp, Udp, Tcp],
        Tcp => &[Tcp, Udp],
    };
    let (table, now) = (set.table.borrow(), Instant::now().into_std());
    let mut turns = Vec::with_capacity(rounds.len() * set.servers.len());
    for (round, &transport) in (0..).zip(rounds) {
        for server in table.order(transport, now) {
            let usual = table.expected(server, transport, now) * 3;
            let patience = usual.clamp(PATIENCE_MIN, PATIENCE_MAX) * (1 << round);
            turns.push(Turn { server, transport, patience });
        }
    }
    turns.into_iter()
}

/// What a turn brought.
struct Reply {
    answer: Answer,
    /// Until the nameserver's first answer.
    took: Duration,
}

/// Who was asked for one query, and what came of it.
struct Search<'a> {
    set: &'a Set,
    asked: Vec<Asked>,
    /// The first answer that is no good one.
    poor: Option<Answer>,
}

struct Asked {
    turn: Turn,
    at: Instant,
    outcome: Outcome,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// Still listened to.
    Open,
    /// An answer that others may have a better one than.
    Poor,
    /// No answer, and none to come.
    Failed,
}

impl Search<'_> {
    fn begin(&mut self, turn: Turn) -> usize {
        self.asked.push(Asked { turn, at: Instant::now(), outcome: Outcome::Open });
        self.asked.len() - 1
    }

    /// It gave an answer, if no good one; it would give the same again.
    fn is_settled(&self, server: usize) -> bool {
        self.asked.iter().any(|asked| asked.turn.server == server && asked.outcome == Outcome::Poor)
    }

    /// Returns the answer if it is the one.
    fn on_result(&mut self, index: usize, result: io::Result<Reply>) -> Option<Answer> {
        let now = Instant::now();
        let asked = &mut self.asked[index];
        let Turn { server, transport, .. } = asked.turn;
        let mut table = self.set.table.borrow_mut();
        match result {
            Err(error) => {
                tracing::debug!(server = %self.set.servers[server], ?transport, "A nameserver failed: {error}");
                asked.outcome = Outcome::Failed;
                table.on_failure(server, transport, now - asked.at, now.into_std());
                None
            }
            Ok(Reply { answer, took }) if is_poor(answer.code()) => {
                tracing::debug!(server = %self.set.servers[server], code = %answer.code(), "A nameserver declined");
                asked.outcome = Outcome::Poor;
                table.on_answer(server, transport, took, now.into_std());
                self.poor.get_or_insert(answer);
                None
            }
            Ok(Reply { answer, took }) => {
                table.on_answer(server, transport, took, now.into_std());
                for (other, asked) in self.asked.iter().enumerate() {
                    let (Turn { server, transport, .. }, waited) = (asked.turn, now - asked.at);
                    match asked.outcome {
                        _ if other == index || server == self.asked[index].turn.server => {}
                        Outcome::Open => table.on_overtaken(server, transport, waited, now.into_std()),
                        // There was an answer to be had, and it had none.
                        Outcome::Poor => table.on_failure(server, transport, waited, now.into_std()),
                        Outcome::Failed => {}
                    }
                }
                Some(answer)
            }
        }
    }

    fn give_up(self) -> Option<Answer> {
        let now = Instant::now();
        let mut table = self.set.table.borrow_mut();
        for asked in self.asked.iter().filter(|asked| asked.outcome == Outcome::Open) {
            table.on_failure(asked.turn.server, asked.turn.transport, now - asked.at, now.into_std());
        }
        if self.poor.is_none() {
            let (servers, turns) = (self.set.servers.len(), self.asked.len());
            tracing::debug!(servers, turns, "No nameserver answered a query");
        }
        self.poor
    }
}

/// The RCODEs with which a server speaks of itself, not of the name.
fn is_poor(code: ResponseCode) -> bool {
    matches!(
        code,
        ResponseCode::FormErr | ResponseCode::ServFail | ResponseCode::NotImp | ResponseCode::Refused
    )
}

#[cfg(test)]
pub mod tests;
