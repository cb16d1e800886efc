//! What a server's answer does (connections.md sections 8.2 to 8.4, table of errors).
//!
//! Who may do what: BINDING answers are never authenticated. Every other answer needs a valid MESSAGE-INTEGRITY;
//! the exceptions are what coturn sends without any. A 401 or 438 may supply a nonce, and it may end an attempt to
//! get an allocation, but it cannot end an allocation that works. A 400 to the first request makes us ask again
//! without credentials, which every TURN server answers with a nonce. A 437 to an ALLOCATE without nonce tells of an
//! allocation that we no longer know of; as none of ours works then, nothing is lost by believing it.

use std::{net::SocketAddr, time::Instant};

use gateway_common::DropReason;

use super::{
    Active, Allocation, Granted, KEEP_ALIVE, MAX_CHALLENGES, MAX_MISMATCHES, MIN_REFRESH, Mapping, Out,
    RETRY, State,
};
use crate::relay::{
    codec::{Answer, Body, Integrity, RefreshForm, Refusal, Request, Success, family},
    event::RelayEvent,
    requests::{Key, LADDER, Pending, Sent},
};

impl Allocation {
    /// An answer that came from `from`, one of this relay's servers, to our address `local`.
    pub(in crate::relay) fn handle_answer(
        &mut self,
        answer: &Answer<'_>,
        from: SocketAddr,
        local: SocketAddr,
        now: Instant,
        out: &mut Out,
    ) {
        let ours = self.requests.find(answer.id);
        let Some((key, copy, pending)) =
            ours.filter(|(_, _, p)| p.dst == from && p.request.method() == answer.method)
        else {
            return out.counters.count(DropReason::RelayUnexpected);
        };
        let (request, first_sent, newest) = (pending.request, pending.first_sent, pending.newest_nonce());
        let pending_is_bare = pending.bare;
        if request == Request::Binding {
            self.rtt.sample(now.saturating_duration_since(first_sent));
            self.requests.remove(key);
            return self.on_binding_answer(&answer.body, from, local, now, out);
        }
        let integrity = match self.servers.iter().flatten().find(|server| server.addr == from) {
            Some(server) => answer.integrity(&server.credentials),
            None => Integrity::Invalid,
        };
        match (&answer.body, integrity) {
            (_, Integrity::Invalid) => out.counters.count(DropReason::RelayUnauthenticated),
            (Body::Error(refusal @ Refusal { code: 401 | 438, .. }), integrity) => {
                self.rtt.sample(now.saturating_duration_since(first_sent));
                self.requests.forget_copy(key, answer.id);
                // A later copy already carries a newer nonce: its own answer decides.
                if copy.nonce >= newest {
                    let authentic = integrity == Integrity::Valid;
                    self.on_challenge(key, copy, refusal, authentic, now, out);
                }
            }
            // coturn has no challenge for a request that is signed but has no nonce; it has one for a bare request.
            (Body::Error(Refusal { code: 400, .. }), Integrity::Absent)
                if matches!(request, Request::Allocate | Request::Deallocate)
                    && copy.nonce == 0
                    && newest == 0
                    && !pending_is_bare =>
            {
                self.rtt.sample(now.saturating_duration_since(first_sent));
                self.requests.forget_copy(key, answer.id);
                self.requests.restart(key, true, now);
                self.transmit(key, now, out);
            }
            (Body::Error(Refusal { code: 437, .. }), Integrity::Absent)
                if request == Request::Allocate && copy.nonce == 0 =>
            {
                self.rtt.sample(now.saturating_duration_since(first_sent));
                self.requests.remove(key);
                self.on_mismatch(request, now, out);
            }
            (_, Integrity::Absent) => out.counters.count(DropReason::RelayUnauthenticated),
            (body, Integrity::Valid) => {
                self.rtt.sample(now.saturating_duration_since(first_sent));
                let Some(pending) = self.requests.remove(key) else { return };
                if pending.is_bind() {
                    self.pace.on_answered();
                }
                match body {
                    Body::Success(success) => {
                        self.on_heard(now);
                        self.on_success(&pending, success, now, out);
                    }
                    Body::Error(refusal) => self.on_refusal(&pending, refusal.code, now, out),
                }
                self.send_binds(now, out);
            }
        }
    }

    fn on_binding_answer(
        &mut self,
        body: &Body,
        from: SocketAddr,
        local: SocketAddr,
        now: Instant,
        out: &mut Out,
    ) {
        let Body::Success(Success { mapped: Some(reflexive), .. }) = body else {
            tracing::debug!(relay = %self.id, "Relay refused a BINDING or told no mapped address");
            return;
        };
        self.learn(Mapping { host: local, reflexive: *reflexive }, out);
        match &mut self.state {
            State::Searching => {
                self.state = State::Unallocated { active: Active { server: from, local }, retry_at: None };
                self.request(Request::Allocate, from, LADDER, now, out);
            }
            State::Unallocated { active, .. } | State::Allocated { active, .. } if active.server == from => {
                active.local = local;
            }
            _ => {}
        }
    }

    /// Host and reflexive candidates: of the local address's family, the newest mapping only. What was known
    /// before is never withdrawn (connections.md section 6.4).
    fn learn(&mut self, mapping: Mapping, out: &mut Out) {
        if family(mapping.host) != family(mapping.reflexive) {
            return;
        }
        let known = self.mappings[family(mapping.host)].replace(mapping);
        for candidate in mapping.candidates() {
            if known.is_none_or(|known| !known.candidates().contains(&candidate)) {
                out.events.push_back(RelayEvent::Added(candidate, self.id));
            }
        }
    }

    /// 401 and 438: another nonce, or the end.
    fn on_challenge(
        &mut self,
        key: Key,
        copy: Sent,
        refusal: &Refusal,
        authentic: bool,
        now: Instant,
        out: &mut Out,
    ) {
        let works = matches!(self.state, State::Allocated { .. });
        let rejected = refusal.code == 401 && copy.nonce != 0;
        if rejected && authentic {
            return self.on_rejected(now, out);
        }
        let Some(pending) = self.requests.get_mut(key) else { return };
        let repeat = pending.challenges < MAX_CHALLENGES && (!rejected || pending.rejections == 0);
        pending.challenges = pending.challenges.saturating_add(1);
        pending.rejections = pending.rejections.saturating_add(u8::from(rejected));
        match &refusal.challenge {
            Some(challenge) if repeat && (challenge.our_realm || authentic || !works) => {
                // The server's view of the nonce moved on for all requests, so others in flight repeat with it too.
                self.nonce = Some(challenge.nonce.clone());
                self.nonce_number += 1;
                if challenge.our_realm {
                    self.requests.restart(key, false, now);
                    return self.transmit(key, now, out);
                }
                tracing::debug!(relay = %self.id, "Relay is of another realm");
            }
            _ => {}
        }
        // It leads nowhere. Unauthenticated it must not hurt an allocation: the ladder goes on.
        if works && !authentic {
            return out.counters.count(DropReason::RelayUnauthenticated);
        }
        if rejected {
            return self.on_rejected(now, out);
        }
        if let Some(pending) = self.requests.remove(key) {
            self.on_other_error(&pending, refusal.code, now, out);
        }
    }

    /// The relay takes our credentials no more.
    fn on_rejected(&mut self, now: Instant, out: &mut Out) {
        if !self.has_successor() {
            tracing::warn!(relay = %self.id, "Relay refuses our credentials; waiting for the portal to send others");
        }
        self.give_up(now, out);
    }

    fn on_success(&mut self, pending: &Pending, success: &Success, now: Instant, out: &mut Out) {
        match pending.request {
            Request::Binding => {}
            Request::Allocate => self.on_allocated(pending, success, now, out),
            Request::Refresh | Request::Deallocate => self.on_refreshed(pending, success, now, out),
            Request::Bind { number, .. } => {
                let server = pending.dst;
                if let Some((peer, opens)) = self.channels.on_bound(number, now) {
                    tracing::debug!(relay = %self.id, number, %peer, "Channel bound");
                    if opens {
                        let relay = self.id;
                        out.events.push_back(RelayEvent::ChannelOpened { relay, server, number, peer });
                    }
                    out.events.push_back(RelayEvent::ChannelBound { relay: self.id, server, number, peer });
                }
            }
        }
    }

    fn on_allocated(&mut self, pending: &Pending, success: &Success, now: Instant, out: &mut Out) {
        let State::Unallocated { active, .. } = &self.state else { return };
        let active = *active;
        let lifetime = success.lifetime.filter(|lifetime| !lifetime.is_zero());
        let (Some(lifetime), [Some(_), _] | [_, Some(_)]) = (lifetime, success.relayed) else {
            out.counters.count(DropReason::MalformedStun);
            return self.on_other_error(pending, 0, now, out);
        };
        let granted = Granted {
            relayed: success.relayed,
            deadline: now + lifetime,
            refresh_at: Some(now + (lifetime / 2).max(MIN_REFRESH)),
            keep_alive_at: now + KEEP_ALIVE,
            proven: now,
        };
        tracing::debug!(relay = %self.id, server = %active.server, ?lifetime, "Allocated");
        // A new allocation is a new question.
        self.checked = None;
        self.state = State::Allocated { active, granted };
        for addr in success.relayed.into_iter().flatten() {
            out.events.push_back(RelayEvent::Added(self.candidate(addr, active), self.id));
        }
        self.bind_buffered(now, out);
    }

    fn on_refreshed(&mut self, pending: &Pending, success: &Success, now: Instant, out: &mut Out) {
        match (&mut self.state, success.lifetime) {
            // The relay has none of ours any more: ask for a new one.
            (State::Unallocated { .. }, _) => self.allocate_again(Request::Allocate, now, out),
            (State::Allocated { .. }, Some(lifetime)) if lifetime.is_zero() => {
                self.allocate_again(Request::Allocate, now, out);
            }
            (State::Allocated { granted, .. }, Some(lifetime)) => {
                granted.deadline = now + lifetime;
                granted.refresh_at = Some(now + (lifetime / 2).max(MIN_REFRESH));
            }
            (State::Allocated { .. }, None) => {
                out.counters.count(DropReason::MalformedStun);
                self.on_other_error(pending, 0, now, out);
            }
            (State::Searching | State::Failed, _) => {}
        }
    }

    /// Authenticated errors other than 401 and 438.
    fn on_refusal(&mut self, pending: &Pending, code: u16, now: Instant, out: &mut Out) {
        match (code, pending.request) {
            (437, request) => self.on_mismatch(request, now, out),
            (420, request @ (Request::Refresh | Request::Deallocate))
                if self.refresh_form != RefreshForm::Plain =>
            {
                tracing::debug!(relay = %self.id, "Relay wants REFRESH without the attributes of ALLOCATE");
                self.refresh_form = RefreshForm::Plain;
                self.request(request, pending.dst, LADDER, now, out);
            }
            (420, _) => {
                tracing::warn!(relay = %self.id, "Relay does not know an attribute that every TURN server must know");
                self.give_up(now, out);
            }
            _ => self.on_other_error(pending, code, now, out),
        }
    }

    /// 437: what we and the server believe of the allocation differs.
    fn on_mismatch(&mut self, request: Request, now: Instant, out: &mut Out) {
        let waiting = match request {
            Request::Bind { number, .. } => self.channels.peer(number),
            _ => None,
        };
        self.invalidate(now, out);
        let (count, since) = match self.mismatches {
            (count, Some(since)) if now < since + RETRY => (count.saturating_add(1), since),
            _ => (1, now),
        };
        self.mismatches = (count, Some(since));
        tracing::debug!(relay = %self.id, ?request, count, "Allocation mismatch");
        if count > MAX_MISMATCHES {
            return self.suspend(now);
        }
        if let Some((peer, why)) = waiting {
            self.buffer(peer, why);
        }
        let next = if request == Request::Allocate { Request::Deallocate } else { Request::Allocate };
        self.allocate_again(next, now, out);
    }

    fn on_other_error(&mut self, pending: &Pending, code: u16, now: Instant, out: &mut Out) {
        tracing::debug!(relay = %self.id, request = ?pending.request.method(), code, "Relay refused a request");
        match pending.request {
            Request::Binding => {}
            Request::Allocate | Request::Deallocate => self.suspend(now),
            Request::Refresh => {
                if let State::Allocated { granted, .. } = &mut self.state {
                    let left = granted.deadline.saturating_duration_since(now);
                    granted.refresh_at = Some(now + (left / 2).max(MIN_REFRESH));
                }
            }
            Request::Bind { number, .. } => {
                let closed = self.channels.on_refused(number, now);
                self.on_closed(number, closed, pending.dst, out);
                // What coturn says when it has no allocation of ours.
                if code == 400 {
                    self.check(now, out);
                }
            }
        }
    }
}
