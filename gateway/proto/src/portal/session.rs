//! One WebSocket's life: join, heartbeats, rejoin, what is queued until then (portal-protocol.md section 5).
//!
//! Sans-IO: text frames in by [`Session::handle_text`], out by [`Session::poll_transmit`]; it must not know sockets,
//! back-off or what the messages mean. After any call drain `poll_event`, then `poll_transmit` as fast as the socket
//! takes them, and only then ask `poll_timeout`.
//!
//! ```text
//!  new --> Joining --ok {}--> Joined --"unmatched topic"--> Joining (same socket)
//!             |  5 s: JoinTimeout, error: JoinRefused
//!  v1: `no_relays` refused, no relays named for 5 s, socket 30 s old --> Ended: the next join brings an `init`
//!  any state: 4 heartbeats unanswered, phx_close, disconnect --> Ended (once, last event)
//! ```

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use rustc_hash::FxHashSet;
use serde_json::{Value, json};

use super::{
    egress,
    endpoint::Generation,
    failure::Failure,
    messages::{Egress, Ingress},
    parse::{Parsed, parse_ingress},
    phoenix::{self, Frame, Status, TOPIC_GATEWAY, TOPIC_PHOENIX},
};

/// Section 5.1.
const JOIN_TIMEOUT: Duration = Duration::from_secs(5);
/// Section 5.2; the portal closes after 37 s without inbound data.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(10);
/// More unanswered heartbeats than this end the connection.
const MAX_OUTSTANDING: usize = 3;
/// A channel that is lost this often on one socket is not worth keeping the socket for.
const MAX_REJOINS: u32 = 5;
/// Section 12, "Out of relays": a Nov-2025 portal does not know `no_relays`. It names new relays by itself as they come
/// (section 8.7), so it gets this long, and no socket is given up for it more often than that.
const RELAYS_TIMEOUT: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(30));
/// How many sent messages are remembered, to send them again if they met a lost channel.
const MAX_IN_FLIGHT: usize = 256;
/// Far above what a gateway with thousands of clients queues while one join is open (5 s).
const MAX_QUEUED: usize = 65_536;

/// What the session has to tell.
#[derive(Debug, Clone, PartialEq)]
pub enum SessionEvent {
    /// The first join of this socket was acknowledged.
    Joined,
    /// A push other than Phoenix's own.
    Push {
        /// Its event name.
        event: String,
        /// What it says.
        parsed: Parsed,
    },
    /// Close the socket; nothing follows.
    Ended(Failure),
}

/// The state machine of one WebSocket.
#[derive(Debug)]
pub struct Session {
    generation: Generation,
    state: State,
    next_reference: u64,
    opened: Instant,
    heartbeat_at: Instant,
    /// The portal does not know what `no_relays` means: without relays until then we join anew.
    relays_due: Option<Instant>,
    outstanding: VecDeque<u64>,
    /// Joins and heartbeats: sent in any state, before anything else.
    urgent: VecDeque<String>,
    queue: VecDeque<Egress>,
    queued: FxHashSet<Egress>,
    in_flight: VecDeque<(u64, Egress)>,
    /// How many at the front of the queue met a lost channel.
    returned: usize,
    rejoins: u32,
    was_joined: bool,
    events: VecDeque<SessionEvent>,
}

#[derive(Debug)]
enum State {
    Joining { reference: u64, deadline: Instant },
    Joined,
    Ended,
}

impl Session {
    /// For a socket that was opened `now` on an endpoint of `generation`. Queues the join.
    #[must_use]
    pub fn new(generation: Generation, now: Instant) -> Self {
        let mut session = Self {
            generation,
            state: State::Ended,
            next_reference: 0,
            opened: now,
            heartbeat_at: now + HEARTBEAT_INTERVAL,
            relays_due: None,
            outstanding: VecDeque::new(),
            urgent: VecDeque::new(),
            queue: VecDeque::new(),
            queued: FxHashSet::default(),
            in_flight: VecDeque::new(),
            returned: 0,
            rejoins: 0,
            was_joined: false,
            events: VecDeque::new(),
        };
        session.join(now);
        session
    }

    /// Queues a message for after the join. One that equals a queued one is not queued twice. Returns false if it was
    /// dropped because the queue is full.
    pub fn send(&mut self, message: Egress) -> bool {
        if self.queued.contains(&message) {
            return true;
        }
        if self.queue.len() >= MAX_QUEUED || matches!(self.state, State::Ended) {
            return false;
        }
        self.queued.insert(message.clone());
        self.queue.push_back(message);
        true
    }

    /// A text frame arrived.
    pub fn handle_text(&mut self, text: &str, now: Instant) {
        if matches!(self.state, State::Ended) {
            return;
        }
        match phoenix::decode(text) {
            Ok(Frame::Reply { reference: Some(reference), status }) => {
                self.handle_reply(reference, status, now)
            }
            Ok(Frame::Reply { reference: None, .. }) => tracing::debug!("Dropped a reply without reference"),
            Ok(Frame::Push { topic, event, payload }) => self.handle_push(&topic, event, &payload),
            Err(error) => tracing::warn!(%error, bytes = text.len(), "Ignored a frame from the portal"),
        }
    }

    /// The deadline of [`Session::poll_timeout`] has come.
    pub fn handle_timeout(&mut self, now: Instant) {
        match self.state {
            State::Ended => return,
            State::Joining { deadline, .. } if now >= deadline => return self.end(Failure::JoinTimeout),
            State::Joining { .. } | State::Joined => {}
        }
        if self.relays_due.is_some_and(|due| due <= now) {
            return self.end(Failure::NoRelays);
        }
        if now < self.heartbeat_at {
            return;
        }
        // Regardless of other traffic; a late wake-up is not made up for.
        self.heartbeat_at = (self.heartbeat_at + HEARTBEAT_INTERVAL).max(now + HEARTBEAT_INTERVAL / 2);
        let reference = self.reference();
        self.outstanding.push_back(reference);
        if self.outstanding.len() > MAX_OUTSTANDING {
            return self.end(Failure::HeartbeatsLost);
        }
        self.urgent.push_back(phoenix::encode(TOPIC_PHOENIX, "heartbeat", &json!({}), reference));
    }

    /// The next text frame to send.
    pub fn poll_transmit(&mut self) -> Option<String> {
        if let Some(text) = self.urgent.pop_front() {
            return Some(text);
        }
        // Section 5.1: "Until the join is acknowledged no other message (except heartbeats) is sent".
        if !matches!(self.state, State::Joined) {
            return None;
        }
        let message = self.queue.pop_front()?;
        self.queued.remove(&message);
        self.returned = self.returned.saturating_sub(1);
        let reference = self.reference();
        let (event, payload) = egress::encode(&message, self.generation);
        if self.in_flight.len() == MAX_IN_FLIGHT {
            self.in_flight.pop_front();
        }
        self.in_flight.push_back((reference, message));
        Some(phoenix::encode(TOPIC_GATEWAY, event, &payload, reference))
    }

    /// Would [`Session::poll_transmit`] give something?
    #[must_use]
    pub fn has_transmit(&self) -> bool {
        !self.urgent.is_empty() || (matches!(self.state, State::Joined) && !self.queue.is_empty())
    }

    /// What happened since the last call.
    pub fn poll_event(&mut self) -> Option<SessionEvent> {
        self.events.pop_front()
    }

    /// When to call [`Session::handle_timeout`].
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        match self.state {
            State::Joining { deadline, .. } => Some(deadline.min(self.heartbeat_at)),
            State::Joined => {
                Some(self.relays_due.map_or(self.heartbeat_at, |due| due.min(self.heartbeat_at)))
            }
            State::Ended => None,
        }
    }

    fn handle_reply(&mut self, reference: u64, status: Status, now: Instant) {
        if let State::Joining { reference: join, .. } = self.state
            && join == reference
        {
            return match status {
                Status::Ok => self.on_joined(),
                Status::OkWith => tracing::debug!("Ignored a join reply with a response"),
                Status::Error(reason) => self.end(Failure::JoinRefused(reason)),
            };
        }
        if self.outstanding.contains(&reference) {
            if status == Status::Ok {
                // Replies come in order on one stream: what is older and unanswered was lost for good, and four such
                // losses over days are no dead connection (section 14 item 7).
                self.outstanding.retain(|outstanding| *outstanding > reference);
            }
            return;
        }
        let sent = self.in_flight.iter().position(|(sent, _)| *sent == reference);
        let sent = sent.and_then(|at| self.in_flight.remove(at)).map(|(_, message)| message);
        let Status::Error(reason) = status else { return };
        if reason != "unmatched topic" {
            tracing::debug!(reference, reason, "The portal did not accept a message");
            if self.generation == Generation::V1 && sent == Some(Egress::NoRelays) {
                let (patience, life) = RELAYS_TIMEOUT;
                self.relays_due.get_or_insert((now + patience).max(self.opened + life));
            }
            return;
        }
        // The channel is gone, the socket is not. What met the lost channel goes out again after the join, in the
        // order it had: a client drops candidates that come before the authorization they belong to.
        if let Some(message) = sent
            && self.queued.insert(message.clone())
        {
            self.queue.insert(self.returned, message);
            self.returned += 1;
        }
        if matches!(self.state, State::Joined) {
            self.rejoins += 1;
            if self.rejoins > MAX_REJOINS {
                return self.end(Failure::ChannelUnstable);
            }
            tracing::debug!("The portal lost the channel, joining again");
            self.join(now);
        }
    }

    fn handle_push(&mut self, topic: &str, event: String, payload: &Value) {
        if topic != TOPIC_GATEWAY {
            tracing::debug!(event, "Ignored a push on another topic");
            return;
        }
        match event.as_str() {
            // Section 5.4: an abnormal channel exit also drains the socket, which is noticed by itself.
            "phx_error" => tracing::debug!("The portal reports a crashed channel"),
            "phx_close" => self.end(Failure::ChannelClosed),
            "disconnect" => match payload.get("reason").and_then(Value::as_str) {
                Some("token_expired") => self.end(Failure::TokenExpired),
                _ => tracing::debug!("Ignored a `disconnect` with an unknown reason"),
            },
            _ => {
                let parsed = parse_ingress(&event, payload);
                if brings_relays(&parsed) {
                    self.relays_due = None;
                }
                self.events.push_back(SessionEvent::Push { event, parsed });
            }
        }
    }

    fn on_joined(&mut self) {
        self.state = State::Joined;
        if !self.was_joined {
            self.was_joined = true;
            self.events.push_back(SessionEvent::Joined);
        }
    }

    fn join(&mut self, now: Instant) {
        let reference = self.reference();
        self.state = State::Joining { reference, deadline: now + JOIN_TIMEOUT };
        self.urgent.push_back(phoenix::encode(TOPIC_GATEWAY, "phx_join", &Value::Null, reference));
    }

    fn end(&mut self, failure: Failure) {
        self.state = State::Ended;
        self.urgent.clear();
        self.events.push_back(SessionEvent::Ended(failure));
    }

    fn reference(&mut self) -> u64 {
        let reference = self.next_reference;
        self.next_reference += 1;
        reference
    }
}

fn brings_relays(parsed: &Parsed) -> bool {
    match parsed {
        Parsed::Message { ingress: Ingress::Init(init), .. } => !init.relays.is_empty(),
        Parsed::Message { ingress: Ingress::RelaysPresence { connected, .. }, .. } => !connected.is_empty(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::ClientId;

    #[test]
    fn a_portal_that_does_not_know_no_relays_is_joined_anew_unless_it_names_some() {
        let presence = |relays: &str| {
            format!(
                r#"{{"event":"relays_presence","payload":{{"disconnected_ids":[],"connected":[{relays}]}},"ref":null,"topic":"gateway"}}"#
            )
        };
        let relay = r#"{"id":"c2a4d7c0-0b0e-4c9e-9a51-5a2f4b7d9c11","type":"turn","addr":"203.0.113.2:3478","username":"2145916800:x","password":"p","expires_at":2145916800}"#;
        // Endpoint, the reply to `no_relays`, when after the join, what the portal says then, when it ends.
        let table = [
            (Generation::V1, error(1, "unknown_message"), 1, None, Some(30)),
            (Generation::V1, error(1, "unknown_message"), 100, None, Some(105)),
            (Generation::V1, error(1, "unknown_message"), 1, Some(presence("")), Some(30)),
            (Generation::V1, error(1, "unknown_message"), 1, Some(presence(relay)), None),
            (Generation::V1, ok(1), 1, None, None),
            (Generation::V2, error(1, "unknown_message"), 1, None, None),
        ];
        for (generation, reply, at, then, ends) in table {
            let (_, now) = session();
            let mut session = Session::new(generation, now);
            sent(&mut session);
            session.handle_text(&ok(0), now);
            assert_eq!(session.poll_event(), Some(SessionEvent::Joined));
            session.send(Egress::NoRelays);
            assert_eq!(sent(&mut session), [("no_relays".to_owned(), 1)]);
            session.handle_text(&reply, now + secs(at));
            then.iter().for_each(|text| session.handle_text(text, now + secs(at)));
            while session.poll_event().is_some() {}
            let mut ended = None;
            while let Some(due) = session.poll_timeout().filter(|due| *due < now + secs(200)) {
                session.handle_timeout(due);
                for (_, reference) in sent(&mut session) {
                    session.handle_text(&ok(reference), due);
                }
                if let Some(event) = session.poll_event() {
                    assert_eq!(event, SessionEvent::Ended(Failure::NoRelays));
                    ended = Some((due - now).as_secs());
                }
            }
            assert_eq!(ended, ends, "{generation} {at} {reply}");
        }
    }

    #[test]
    fn the_first_frame_is_the_join_and_nothing_else_leaves_before_its_reply() {
        let (mut session, now) = session();
        assert_eq!(sent(&mut session), [("phx_join".to_owned(), 0)]);
        assert!(session.send(Egress::NoRelays));
        assert_eq!(sent(&mut session), []);
        session.handle_text(&ok(0), now);
        assert_eq!(session.poll_event(), Some(SessionEvent::Joined));
        assert_eq!(sent(&mut session), [("no_relays".to_owned(), 1)]);
        assert_eq!(session.poll_timeout(), Some(now + secs(10)));
    }

    #[test]
    fn a_join_reply_other_than_an_empty_object_leaves_it_pending_until_five_seconds() {
        for response in ["null", r#"{"a":1}"#] {
            let (mut session, now) = session();
            let reply = format!(
                r#"{{"event":"phx_reply","payload":{{"response":{response},"status":"ok"}},"ref":0,"topic":"gateway"}}"#
            );
            session.handle_text(&reply, now);
            assert_eq!(session.poll_event(), None);
            assert_eq!(session.poll_timeout(), Some(now + secs(5)));
            session.handle_timeout(now + secs(5));
            assert_eq!(session.poll_event(), Some(SessionEvent::Ended(Failure::JoinTimeout)));
            assert_eq!(session.poll_timeout(), None);
        }
    }

    #[test]
    fn a_refused_join_ends_the_session_with_its_reason() {
        let (mut session, now) = session();
        session.handle_text(&error(0, "unauthorized"), now);
        assert_eq!(
            session.poll_event(),
            Some(SessionEvent::Ended(Failure::JoinRefused("unauthorized".into())))
        );
        session.handle_text(&ok(0), now);
        assert_eq!(session.poll_event(), None);
    }

    #[test]
    fn heartbeats_go_every_ten_seconds_and_the_fourth_unanswered_one_is_the_end() {
        let (mut session, now) = joined();
        for n in 1..=3 {
            session.handle_timeout(now + secs(10 * n));
            assert_eq!(sent(&mut session), [("heartbeat".to_owned(), n)]);
            assert_eq!(session.poll_timeout(), Some(now + secs(10 * n + 10)));
        }
        session.handle_timeout(now + secs(40));
        assert_eq!(session.poll_event(), Some(SessionEvent::Ended(Failure::HeartbeatsLost)));
        assert_eq!(sent(&mut session), []);
    }

    #[test]
    fn answered_heartbeats_keep_the_session_and_forget_older_losses() {
        let (mut session, now) = joined();
        for n in 1..=40 {
            session.handle_timeout(now + secs(10 * n));
            let (_, reference) = sent(&mut session)[0];
            if n % 3 == 0 {
                session.handle_text(&ok(reference), now + secs(10 * n));
            }
            assert_eq!(session.poll_event(), None, "heartbeat {n}");
        }
    }

    #[test]
    fn a_lost_channel_is_joined_again_and_what_met_it_is_sent_again() {
        let (mut session, now) = joined();
        let ack = Egress::Authorized { reference: "a".into() };
        session.send(ack.clone());
        session.send(Egress::NoRelays);
        assert_eq!(sent(&mut session).len(), 2);
        session.handle_text(&error(1, "unmatched topic"), now);
        session.handle_text(&error(2, "unmatched topic"), now);
        assert_eq!(
            sent(&mut session),
            [("phx_join".to_owned(), 3)],
            "one join, and nothing else until it is answered"
        );
        session.handle_text(&ok(3), now);
        assert_eq!(session.poll_event(), None, "the socket was connected all along");
        let again = [("authorization_created".to_owned(), 4), ("no_relays".to_owned(), 5)];
        assert_eq!(sent(&mut session), again, "in the order they had");
    }

    #[test]
    fn a_channel_that_is_always_lost_ends_the_session() {
        let (mut session, now) = joined();
        session.send(Egress::NoRelays);
        for _ in 0..20 {
            for (event, reference) in sent(&mut session) {
                let reply =
                    if event == "phx_join" { ok(reference) } else { error(reference, "unmatched topic") };
                session.handle_text(&reply, now);
            }
        }
        assert_eq!(session.poll_event(), Some(SessionEvent::Ended(Failure::ChannelUnstable)));
    }

    #[test]
    fn other_errors_and_stray_replies_change_nothing() {
        let (mut session, now) = joined();
        session.send(Egress::NoRelays);
        sent(&mut session);
        for text in [
            error(1, "unknown_message"),
            ok(99),
            r#"{"event":"phx_reply","payload":{"response":{},"status":"ok"},"ref":null,"topic":"gateway"}"#
                .to_owned(),
            r#"{"event":"phx_error","payload":{},"ref":null,"topic":"gateway"}"#.to_owned(),
            r#"{"event":"disconnect","payload":{"reason":"maintenance"},"ref":null,"topic":"gateway"}"#
                .to_owned(),
            r#"{"event":"phx_close","payload":{},"ref":null,"topic":"elsewhere"}"#.to_owned(),
            "nonsense".to_owned(),
        ] {
            session.handle_text(&text, now);
            assert_eq!(session.poll_event(), None, "{text}");
        }
        assert_eq!(sent(&mut session), []);
        assert!(session.poll_timeout().is_some());
    }

    #[test]
    fn phx_close_and_an_expired_token_end_the_session() {
        for (event, payload, failure) in [
            ("phx_close", "{}", Failure::ChannelClosed),
            ("disconnect", r#"{"reason":"token_expired"}"#, Failure::TokenExpired),
        ] {
            let (mut session, now) = joined();
            let text = format!(r#"{{"event":"{event}","payload":{payload},"ref":null,"topic":"gateway"}}"#);
            session.handle_text(&text, now);
            assert_eq!(session.poll_event(), Some(SessionEvent::Ended(failure)));
            assert!(!session.send(Egress::NoRelays));
        }
    }

    #[test]
    fn an_equal_message_is_not_queued_twice_but_may_follow_a_sent_one() {
        let (mut session, _) = joined();
        let message = Egress::BroadcastIceCandidates(ClientId(uuid::Uuid::nil()), vec!["candidate:1".into()]);
        session.send(message.clone());
        session.send(message.clone());
        assert_eq!(sent(&mut session).len(), 1);
        session.send(message);
        assert_eq!(sent(&mut session).len(), 1);
    }

    #[test]
    fn a_push_is_parsed_and_handed_on() {
        let (mut session, now) = joined();
        session.handle_text(r#"{"event":"allow_access","payload":{},"ref":null,"topic":"gateway"}"#, now);
        assert_eq!(
            session.poll_event(),
            Some(SessionEvent::Push { event: "allow_access".into(), parsed: Parsed::NotOurs })
        );
    }

    fn session() -> (Session, Instant) {
        #[expect(clippy::disallowed_methods, reason = "a test needs some instant to start from")]
        let now = Instant::now();
        (Session::new(Generation::V2, now), now)
    }

    fn joined() -> (Session, Instant) {
        let (mut session, now) = session();
        sent(&mut session);
        session.handle_text(&ok(0), now);
        assert_eq!(session.poll_event(), Some(SessionEvent::Joined));
        (session, now)
    }

    fn sent(session: &mut Session) -> Vec<(String, u64)> {
        std::iter::from_fn(|| session.poll_transmit())
            .map(|text| {
                let value: Value = serde_json::from_str(&text).unwrap();
                (value["event"].as_str().unwrap().to_owned(), value["ref"].as_u64().unwrap())
            })
            .collect()
    }

    fn ok(reference: u64) -> String {
        format!(
            r#"{{"event":"phx_reply","payload":{{"response":{{}},"status":"ok"}},"ref":{reference},"topic":"gateway"}}"#
        )
    }

    fn error(reference: u64, reason: &str) -> String {
        format!(
            r#"{{"event":"phx_reply","payload":{{"response":{{"reason":"{reason}"}},"status":"error"}},"ref":{reference},"topic":"gateway"}}"#
        )
    }

    fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }
}
