//! A TURN server in memory, written from relay-dialect.md sections 2 and 3: the twin that tests talk to.
//!
//! It is no network: whoever owns it carries [`Packet`]s to it if [`Twin::owns`] their destination, and away from
//! it, with whatever loss and delay the test is about. It notes what no client may do in [`Twin::sins`].

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::OnceLock,
    time::{Duration, Instant},
};

use rand::{Rng, SeedableRng, rngs::StdRng};
use stun_types::{
    AddressFamily,
    attribute::{
        AttributeStaticType, AttributeType, AttributeWrite, ErrorCode, MessageIntegrity, Nonce, RawAttribute,
        Realm, Software, Username, XorMappedAddress,
    },
    message::{
        BINDING, IntegrityAlgorithm, IntegrityKey, LongTermKeyCredentials, Message, MessageClass,
        MessageType, MessageWriteExt, MessageWriteVec,
    },
};
use turn_types::{
    attribute::{
        AdditionalAddressFamily, ChannelNumber, Lifetime, RequestedTransport, XorPeerAddress,
        XorRelayedAddress,
    },
    message::{ALLOCATE, CHANNEL_BIND, DATA, REFRESH},
};
use zeroize::Zeroizing;

use super::codec::{REALM, family, sign};
use crate::{
    ids::RelayId,
    portal::messages::{self, Secret},
};

/// The beginning of fake time. Only differences from it mean anything.
#[expect(
    clippy::disallowed_methods,
    reason = "an `Instant` cannot be made from nothing; nothing waits for it"
)]
pub(crate) fn start() -> Instant {
    static START: OnceLock<Instant> = OnceLock::new();
    *START.get_or_init(Instant::now)
}

/// One datagram on the simulated network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Packet {
    pub(crate) src: SocketAddr,
    pub(crate) dst: SocketAddr,
    pub(crate) payload: Vec<u8>,
}

/// Whose habits it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flavor {
    /// Errors carry MESSAGE-INTEGRITY; channels have a cool-down of 300 s.
    Firezone,
    /// 401 and 438 are not authenticated, and 400 answers a signed request without nonce; FINGERPRINT and unknown attributes everywhere; permissions live 300 s;
    /// a peer with a permission but no channel arrives as DATA indication.
    Coturn,
}

/// The server.
#[derive(Debug)]
pub(crate) struct Twin {
    flavor: Flavor,
    listen: Vec<SocketAddr>,
    username: String,
    password: String,
    /// Names and passwords that it takes, too.
    older: Vec<(String, String)>,
    nonces: HashMap<SocketAddr, String>,
    allocations: HashMap<SocketAddr, Granted>,
    rng: StdRng,
    /// The next allocation's.
    port: Option<u16>,
    /// What it grants.
    pub(crate) lifetime: Duration,
    /// Answers nothing at all.
    pub(crate) deaf: bool,
    /// Answers every authenticated request of this method with this error.
    pub(crate) refuse: Option<(u16, u16)>,
    /// What the client did that it must not do.
    pub(crate) sins: Vec<String>,
}

#[derive(Debug)]
struct Granted {
    server: SocketAddr,
    relayed: Vec<SocketAddr>,
    until: Instant,
    channels: HashMap<u16, (SocketAddr, Instant)>,
}

const CHANNEL_LIFETIME: Duration = Duration::from_secs(600);
const COOL_DOWN: Duration = Duration::from_secs(300);
const PERMISSION: Duration = Duration::from_secs(300);

impl Twin {
    pub(crate) fn new(flavor: Flavor, listen: &[SocketAddr], seed: u64) -> Self {
        Self {
            flavor,
            listen: listen.to_vec(),
            username: "2145916800:twin".into(),
            password: "the twin's first password".into(),
            older: Vec::new(),
            nonces: HashMap::new(),
            allocations: HashMap::new(),
            rng: StdRng::seed_from_u64(seed),
            port: None,
            lifetime: CHANNEL_LIFETIME,
            deaf: false,
            refuse: None,
            sins: Vec::new(),
        }
    }

    /// As the portal lists it: one entry for each address.
    pub(crate) fn entries(&self, id: RelayId) -> Vec<messages::Relay> {
        let password = || Secret(Zeroizing::new(self.password.clone()));
        let entry =
            |addr| messages::Relay { id, addr, username: self.username.clone(), password: password() };
        self.listen.iter().copied().map(entry).collect()
    }

    /// Forgets everything but its credentials.
    pub(crate) fn restart(&mut self) {
        self.nonces.clear();
        self.allocations.clear();
    }

    /// Forgets allocations but not nonces, so that the next request gets 437.
    pub(crate) fn drop_allocations(&mut self) {
        self.allocations.clear();
    }

    pub(crate) fn drop_nonces(&mut self) {
        self.nonces.clear();
    }

    pub(crate) fn set_password(&mut self, password: &str) {
        self.password = password.into();
    }

    pub(crate) fn set_credentials(&mut self, username: &str, password: &str) {
        (self.username, self.password) = (username.into(), password.into());
    }

    /// From now on the portal names these; those of before are good until [`Twin::expire_credentials`].
    pub(crate) fn add_credentials(&mut self, username: &str, password: &str) {
        let before = (self.username.clone(), self.password.clone());
        self.older.push(before);
        self.set_credentials(username, password);
    }

    /// Only the latest are good.
    pub(crate) fn expire_credentials(&mut self) {
        self.older.clear();
    }

    /// The next allocation gets this port.
    pub(crate) fn grant_port(&mut self, port: u16) {
        self.port = Some(port);
    }

    /// Is it one of its server addresses or of the addresses it granted?
    pub(crate) fn owns(&self, addr: SocketAddr) -> bool {
        self.listen.contains(&addr) || self.allocations.values().any(|g| g.relayed.contains(&addr))
    }

    /// How many allocations live.
    pub(crate) fn allocations(&self) -> usize {
        self.allocations.len()
    }

    /// Takes in one datagram; what it sends because of it.
    pub(crate) fn handle(&mut self, packet: &Packet, now: Instant) -> Vec<Packet> {
        if self.deaf {
            return Vec::new();
        }
        self.allocations.retain(|_, granted| granted.until > now);
        if !self.listen.contains(&packet.dst) {
            return self.relay_to_client(packet, now).into_iter().collect();
        }
        if let Some(data) = gateway_common::channel_data::parse(&packet.payload) {
            return self.relay_to_peer(packet.src, data.number, data.payload, now).into_iter().collect();
        }
        let Ok(message) = Message::from_bytes(&packet.payload) else { return Vec::new() };
        if message.class() != MessageClass::Request {
            return Vec::new();
        }
        let answer = if message.method() == BINDING {
            let mut answer = self.answer(&message, MessageClass::Success);
            put(&mut answer, &XorMappedAddress::new(packet.src, message.transaction_id()));
            Some(answer.finish_plain(self.flavor))
        } else {
            self.authenticated(&message, packet.src, packet.dst, now)
        };
        answer.map(|payload| Packet { src: packet.dst, dst: packet.src, payload }).into_iter().collect()
    }

    fn relay_to_peer(&self, client: SocketAddr, number: u16, payload: &[u8], now: Instant) -> Option<Packet> {
        let granted = self.allocations.get(&client)?;
        let (peer, bound) = *granted.channels.get(&number)?;
        let life = self.permission_life();
        let src = *granted.relayed.iter().find(|addr| family(**addr) == family(peer))?;
        (now < bound + life).then(|| Packet { src, dst: peer, payload: payload.to_vec() })
    }

    fn relay_to_client(&self, packet: &Packet, now: Instant) -> Option<Packet> {
        let (client, granted) = self.allocations.iter().find(|(_, g)| g.relayed.contains(&packet.dst))?;
        let channel = granted.channels.iter().find(|(_, (peer, _))| *peer == packet.src);
        let life = self.permission_life();
        let payload = match channel {
            Some((number, (_, bound))) if now < *bound + life => {
                let header = gateway_common::channel_data::header(*number, packet.payload.len())?;
                [&header, packet.payload.as_slice()].concat()
            }
            None if self.flavor == Flavor::Coturn
                && granted
                    .channels
                    .values()
                    .any(|(peer, bound)| peer.ip() == packet.src.ip() && now < *bound + PERMISSION) =>
            {
                let kind = MessageType::from_class_method(MessageClass::Indication, DATA);
                let mut message = Message::builder(kind, 1.into(), MessageWriteVec::new());
                put(&mut message, &XorPeerAddress::new(packet.src, 1.into()));
                message.finish_plain(self.flavor)
            }
            _ => return None,
        };
        Some(Packet { src: granted.server, dst: *client, payload })
    }

    /// How long data flows after a bind.
    fn permission_life(&self) -> Duration {
        if self.flavor == Flavor::Coturn { PERMISSION } else { CHANNEL_LIFETIME }
    }

    /// The checks of relay-dialect.md section 2 in their order, then the method.
    fn authenticated(
        &mut self,
        message: &Message<'_>,
        client: SocketAddr,
        server: SocketAddr,
        now: Instant,
    ) -> Option<Vec<u8>> {
        let name = message.attribute::<Username>().map(|name| name.username().to_owned()).unwrap_or_default();
        let older = self.older.iter().find(|(older, _)| *older == name).cloned();
        let (username, password) = older.unwrap_or_else(|| (self.username.clone(), self.password.clone()));
        let named = name == username;
        let key =
            LongTermKeyCredentials::new(username, password, REALM.into()).make_key(IntegrityAlgorithm::Sha1);
        let known = self.nonces.get(&client).cloned();
        let nonce = message.attribute::<Nonce>().ok().map(|nonce| nonce.nonce().to_owned());
        let signed = message.has_attribute(MessageIntegrity::TYPE);
        // What coturn 4.6 looks at before the credentials.
        let first = message.method() == ALLOCATE && nonce.is_none();
        if self.flavor == Flavor::Coturn && first && self.allocations.contains_key(&client) {
            return Some(self.error(message, 437).finish_plain(self.flavor));
        }
        let challenge = match &nonce {
            None if signed && self.flavor == Flavor::Coturn => {
                return Some(self.error(message, 400).finish_plain(self.flavor));
            }
            None => Some(401),
            Some(nonce) if Some(nonce) != known.as_ref() => Some(438),
            Some(_) if !named || message.validate_integrity_with_key(&key).is_err() => Some(401),
            Some(_) => None,
        };
        if self.flavor == Flavor::Firezone && (!signed || message.attribute::<Username>().is_err()) {
            self.sins.push("an unauthenticated request".into());
        }
        if let Some(code) = challenge {
            let fresh = uuid::Uuid::from_u128(self.rng.random()).to_string();
            let nonce = self.nonces.entry(client).or_insert(fresh).clone();
            let mut answer = self.error(message, code);
            put(&mut answer, &Realm::new(REALM).unwrap());
            put(&mut answer, &Nonce::new(&nonce).unwrap());
            let signed = (self.flavor == Flavor::Firezone).then_some(&key);
            return Some(answer.finish_signed(signed, self.flavor));
        }
        let answer = match self.refuse {
            Some((method, code)) if method == message.method().value() => Err(code),
            _ => self.perform(message, client, server, now),
        };
        let answer = answer.unwrap_or_else(|code| self.error(message, code));
        Some(answer.finish_signed(Some(&key), self.flavor))
    }

    fn perform(
        &mut self,
        message: &Message<'_>,
        client: SocketAddr,
        server: SocketAddr,
        now: Instant,
    ) -> Result<MessageWriteVec, u16> {
        match message.method() {
            ALLOCATE => self.allocate(message, client, server, now),
            REFRESH => self.refresh(message, client, now),
            CHANNEL_BIND => self.bind(message, client, now),
            other => {
                self.sins.push(format!("method {}", other.value()));
                Err(400)
            }
        }
    }

    fn allocate(
        &mut self,
        message: &Message<'_>,
        client: SocketAddr,
        server: SocketAddr,
        now: Instant,
    ) -> Result<MessageWriteVec, u16> {
        if self.allocations.contains_key(&client) {
            return Err(437);
        }
        if message.attribute::<RequestedTransport>().map(|t| t.protocol()) != Ok(17) {
            self.sins.push("REQUESTED-TRANSPORT is not UDP".into());
            return Err(400);
        }
        let both =
            message.attribute::<AdditionalAddressFamily>().is_ok_and(|f| f.family() == AddressFamily::IPV6);
        let port = loop {
            let port = self.port.take().unwrap_or_else(|| self.rng.random_range(49_152..=65_535));
            if !self.allocations.values().any(|g| g.relayed.iter().any(|addr| addr.port() == port)) {
                break port;
            }
        };
        let first = family(self.listen.iter().copied().min_by_key(|a| family(*a)).ok_or(508_u16)?);
        let families = self.listen.iter().filter(|addr| both || family(**addr) == first);
        let mut relayed: Vec<_> = families.map(|addr| SocketAddr::new(addr.ip(), port)).collect();
        relayed.sort_unstable();
        let mut answer = self.answer(message, MessageClass::Success);
        for addr in &relayed {
            put(&mut answer, &XorRelayedAddress::new(*addr, message.transaction_id()));
        }
        put(&mut answer, &XorMappedAddress::new(client, message.transaction_id()));
        put(&mut answer, &self.lifetime_attribute());
        let granted = Granted { server, relayed, until: now + self.lifetime, channels: HashMap::new() };
        self.allocations.insert(client, granted);
        Ok(answer)
    }

    fn refresh(
        &mut self,
        message: &Message<'_>,
        client: SocketAddr,
        now: Instant,
    ) -> Result<MessageWriteVec, u16> {
        if self.flavor == Flavor::Coturn && message.has_attribute(RequestedTransport::TYPE) {
            return Err(420);
        }
        let until = now + self.lifetime;
        let granted = self.allocations.get_mut(&client).ok_or(437_u16)?;
        granted.until = until;
        let mut answer = self.answer(message, MessageClass::Success);
        if message.attribute::<Lifetime>().is_ok_and(|lifetime| lifetime.seconds() == 0) {
            self.allocations.remove(&client);
            put(&mut answer, &Lifetime::new(0));
        } else {
            put(&mut answer, &self.lifetime_attribute());
        }
        Ok(answer)
    }

    fn bind(
        &mut self,
        message: &Message<'_>,
        client: SocketAddr,
        now: Instant,
    ) -> Result<MessageWriteVec, u16> {
        let id = message.transaction_id();
        let peer = message.attribute::<XorPeerAddress>().map_err(|_| 400_u16)?.addr(id);
        let number = message.attribute::<ChannelNumber>().map_err(|_| 400_u16)?.channel();
        let granted = self.allocations.get_mut(&client).ok_or(437_u16)?;
        if !granted.relayed.iter().any(|addr| family(*addr) == family(peer)) {
            self.sins.push(format!("a bind to {peer} without such a family"));
            return Err(443);
        }
        if !(0x4000..=0x4FFF).contains(&number) {
            self.sins.push(format!("channel number {number:#x}"));
            return Err(400);
        }
        granted.channels.retain(|_, (_, bound)| now < *bound + CHANNEL_LIFETIME + COOL_DOWN);
        let other = granted.channels.iter().find(|(n, (p, _))| (**n == number) != (*p == peer));
        if let Some((held, (by, _))) = other {
            self.sins.push(format!("{number:#x} for {peer} while {held:#x} is {by}'s"));
            return Err(400);
        }
        granted.channels.insert(number, (peer, now));
        Ok(self.answer(message, MessageClass::Success))
    }

    fn lifetime_attribute(&self) -> Lifetime {
        Lifetime::new(u32::try_from(self.lifetime.as_secs()).unwrap())
    }

    fn answer(&self, message: &Message<'_>, class: MessageClass) -> MessageWriteVec {
        let kind = MessageType::from_class_method(class, message.method());
        let mut answer = Message::builder(kind, message.transaction_id(), MessageWriteVec::new());
        put(&mut answer, &Software::new("firezone-relay; rev=twin").unwrap());
        answer
    }

    fn error(&self, message: &Message<'_>, code: u16) -> MessageWriteVec {
        let mut answer = self.answer(message, MessageClass::Error);
        put(&mut answer, &ErrorCode::builder(code).build().unwrap());
        answer
    }
}

trait Finish {
    fn finish_plain(self, flavor: Flavor) -> Vec<u8>;
    fn finish_signed(self, key: Option<&IntegrityKey>, flavor: Flavor) -> Vec<u8>;
}

impl Finish for MessageWriteVec {
    fn finish_plain(self, flavor: Flavor) -> Vec<u8> {
        self.finish_signed(None, flavor)
    }

    fn finish_signed(mut self, key: Option<&IntegrityKey>, flavor: Flavor) -> Vec<u8> {
        if flavor == Flavor::Coturn {
            put(&mut self, &RawAttribute::new(AttributeType::new(0xC057), b"extra"));
        }
        if let Some(key) = key {
            sign(&mut self, key);
        }
        if flavor == Flavor::Coturn {
            self.add_fingerprint().unwrap();
        }
        stun_types::message::MessageWrite::finish(self)
    }
}

fn put(message: &mut MessageWriteVec, attribute: &dyn AttributeWrite) {
    message.add_attribute(attribute).unwrap();
}
