//! Which connection a STUN message between peers is for, in O(1): requests by USERNAME, answers by transaction.
//!
//! Relays come first: what a relay's server address sent never gets here (design.md 2.1). Nothing is verified here,
//! the agent checks integrity.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use is::stun::StunMessage;
use rustc_hash::FxHashMap;
use tracing::dispatcher::{self, Dispatch};

use crate::{ids::ClientId, portal::messages::IceCredentials};

/// How long an answer to one of our checks is expected (connections.md section 3).
const TRANSACTION_LIFE: Duration = Duration::from_secs(10);

type TransactionId = [u8; 12];

/// The two look-up tables.
#[derive(Debug, Default)]
pub(super) struct StunRouter {
    /// By the whole USERNAME of a request, `<local ufrag>:<remote ufrag>`: four characters alone would be shared by
    /// two of a few thousand clients.
    usernames: FxHashMap<String, ClientId>,
    /// Our checks' transactions, each with its end.
    transactions: FxHashMap<TransactionId, (ClientId, Instant)>,
    /// The same in the order of their ends.
    expiring: VecDeque<(Instant, TransactionId)>,
}

impl StunRouter {
    /// Requests with these credentials are the client's from now on.
    pub(super) fn insert(&mut self, local: &IceCredentials, remote: &IceCredentials, client: ClientId) {
        self.usernames.insert(username(local, remote), client);
    }

    /// They are no longer, if they still were.
    pub(super) fn remove(&mut self, local: &IceCredentials, remote: &IceCredentials, client: ClientId) {
        let username = username(local, remote);
        if self.usernames.get(&username) == Some(&client) {
            self.usernames.remove(&username);
        }
    }

    /// How many credentials are known.
    pub(super) fn usernames(&self) -> usize {
        self.usernames.len()
    }

    /// The client's agent sends `message`: if it is a request, its answer shall find back.
    pub(super) fn sent(&mut self, message: &[u8], client: ClientId, now: Instant) {
        let Some(transaction) = request_transaction(message) else { return };
        while let Some((until, expired)) = self.expiring.front() {
            if *until > now {
                break;
            }
            self.transactions.remove(expired);
            self.expiring.pop_front();
        }
        let until = now + TRANSACTION_LIFE;
        self.transactions.insert(transaction, (client, until));
        self.expiring.push_back((until, transaction));
    }

    /// Parses what a peer sent and finds whose it is; `None` for what is malformed, of no use between peers, or for
    /// nobody.
    pub(super) fn route<'a>(&self, message: &'a [u8], now: Instant) -> Option<(ClientId, StunMessage<'a>)> {
        // The parser warns about attributes that anybody on the Internet can send us.
        let stun = quietly(|| StunMessage::parse(message)).ok()?;
        let client = if stun.is_binding_request() {
            // A peer that claims our role would make the agent switch roles, which are fixed by design
            // (connections.md section 6.5).
            if stun.ice_controlled().is_some() {
                return None;
            }
            stun.username().and_then(|username| self.usernames.get(username)).copied()
        } else if stun.is_successful_binding_response() {
            self.transactions
                .get(&transaction(message)?)
                .filter(|(_, until)| *until > now)
                .map(|(client, _)| *client)
        } else {
            None
        };
        client.map(|client| (client, stun))
    }
}

/// Runs `f` without a log: for calls into the ICE library that would write credentials or warnings to it.
pub(super) fn quietly<T>(f: impl FnOnce() -> T) -> T {
    dispatcher::with_default(&Dispatch::none(), f)
}

fn username(local: &IceCredentials, remote: &IceCredentials) -> String {
    format!("{}:{}", local.username, remote.username)
}

/// How the USERNAME of a request with these credentials begins; zeros behind one that is shorter.
pub(super) fn first_four(local: &IceCredentials, remote: &IceCredentials) -> [u8; 4] {
    let mut four = [0; 4];
    for (to, from) in four.iter_mut().zip(username(local, remote).bytes()) {
        *to = from;
    }
    four
}

fn transaction(message: &[u8]) -> Option<TransactionId> {
    message.get(8..20)?.try_into().ok()
}

fn request_transaction(message: &[u8]) -> Option<TransactionId> {
    is_request(message).then(|| transaction(message)).flatten()
}

/// Is it a binding request: method 1, class 0 (RFC 8489 section 5)?
pub(super) fn is_request(message: &[u8]) -> bool {
    message.starts_with(&[0x00, 0x01])
}
