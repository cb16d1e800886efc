//! TURN messages as bytes: our requests in the spec's attribute order, a server's answers read tolerantly
//! (connections.md section 8.1, relay-dialect.md sections 1 to 3).
//!
//! It knows no state. MESSAGE-INTEGRITY is written by hand because the library's own writer records its key in a
//! TRACE span, and a message is walked once before the library sees it because it asserts what a hostile sender
//! can break (two MESSAGE-INTEGRITY attributes).

use std::{fmt, net::SocketAddr, time::Duration};

use gateway_common::{PayloadKind, classify};
use stun_types::{
    attribute::{
        AttributeFromRaw, AttributeStaticType, AttributeType, AttributeWrite, ErrorCode, Fingerprint,
        MessageIntegrity, MessageIntegritySha256, Nonce, Realm, Software, Username, XorMappedAddress,
    },
    message::{
        BINDING, IntegrityAlgorithm, IntegrityKey, LongTermKeyCredentials, Message, MessageClass,
        MessageType, MessageWrite, MessageWriteExt, MessageWriteVec, Method, TransactionId,
    },
};
use turn_types::{
    AddressFamily,
    attribute::{
        AdditionalAddressFamily, ChannelNumber, Lifetime, RequestedTransport, XorPeerAddress,
        XorRelayedAddress,
    },
    message::{ALLOCATE, CHANNEL_BIND, REFRESH},
};

/// The realm of every relay (connections.md section 4.1).
pub(super) const REALM: &str = "firezone";
/// SOFTWARE of every request (connections.md section 8.1).
const SOFTWARE: &str = "snownet";
/// A lifetime above this is taken as this: it only guards the arithmetic of deadlines.
const MAX_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// Long-term credentials for one server; neither name nor key is ever printed.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Credentials {
    username: Username,
    key: IntegrityKey,
}

impl Credentials {
    /// `None` if the name is empty or longer than USERNAME may be (513 bytes, RFC 8489 section 14.3).
    pub(super) fn new(username: &str, password: &str) -> Option<Self> {
        let key = LongTermKeyCredentials::new(username.to_owned(), password.to_owned(), REALM.to_owned())
            .make_key(IntegrityAlgorithm::Sha1);
        let username = Username::new(username).ok().filter(|_| !username.is_empty())?;
        Some(Self { username, key })
    }

    /// Are they for another name than `other`, not only with another password?
    pub(super) fn has_another_name_than(&self, other: &Self) -> bool {
        self.username != other.username
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(..)")
    }
}

/// What is asked of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// Unauthenticated.
    Binding,
    Allocate,
    /// REFRESH for another lifetime.
    Refresh,
    /// REFRESH with lifetime 0.
    Deallocate,
    Bind {
        number: u16,
        peer: SocketAddr,
    },
}

impl Request {
    pub(super) fn method(self) -> Method {
        match self {
            Self::Binding => BINDING,
            Self::Allocate => ALLOCATE,
            Self::Refresh | Self::Deallocate => REFRESH,
            Self::Bind { .. } => CHANNEL_BIND,
        }
    }
}

/// What a REFRESH carries besides LIFETIME and credentials.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum RefreshForm {
    /// REQUESTED-TRANSPORT and ADDITIONAL-ADDRESS-FAMILY too, as upstream's gateway does (connections.md section 8.5).
    #[default]
    LikeAllocate,
    /// Neither: RFC 8656 knows both in ALLOCATE only, and coturn answers the first with 420.
    Plain,
}

/// The bytes of `request`; without `credentials` it is not authenticated. A BINDING never is.
pub(super) fn encode(
    request: Request,
    id: TransactionId,
    credentials: Option<&Credentials>,
    nonce: Option<&Nonce>,
    refresh: RefreshForm,
) -> Vec<u8> {
    let kind = MessageType::from_class_method(MessageClass::Request, request.method());
    let mut message = Message::builder(kind, id, MessageWriteVec::with_capacity(256));
    match request {
        Request::Binding => {}
        Request::Refresh | Request::Deallocate if refresh == RefreshForm::Plain => {}
        Request::Allocate | Request::Refresh | Request::Deallocate => {
            put(&mut message, &RequestedTransport::new(RequestedTransport::UDP));
            put(&mut message, &AdditionalAddressFamily::new(AddressFamily::IPV6));
        }
        Request::Bind { number, peer } => {
            put(&mut message, &XorPeerAddress::new(peer, id));
            put(&mut message, &ChannelNumber::new(number));
        }
    }
    put(&mut message, &Software::new(SOFTWARE).expect("the constant fits SOFTWARE"));
    if request == Request::Deallocate {
        put(&mut message, &Lifetime::new(0));
    }
    if let Some(credentials) = credentials.filter(|_| request != Request::Binding) {
        put(&mut message, &credentials.username);
        put(&mut message, &Realm::new(REALM).expect("the constant fits REALM"));
        if let Some(nonce) = nonce {
            put(&mut message, nonce);
        }
        sign(&mut message, &credentials.key);
    }
    message.finish()
}

fn put(message: &mut MessageWriteVec, attribute: &dyn AttributeWrite) {
    message.add_attribute(attribute).expect("no attribute follows the integrity, and a vector has no limit");
}

/// Appends MESSAGE-INTEGRITY (RFC 8489 section 14.5): the HMAC covers all before it, under a length that counts it.
pub(super) fn sign(message: &mut MessageWriteVec, key: &IntegrityKey) {
    message.push_attribute_unchecked(&MessageIntegrity::new([0; 20]));
    let bytes = message.mut_data();
    let covered = bytes.len() - 24;
    let hmac = MessageIntegrity::compute(&[&bytes[..covered]], key).expect("SHA-1 takes any length");
    bytes[covered + 4..].copy_from_slice(&hmac);
}

/// A datagram that is no valid STUN message.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Malformed;

/// A server's answer. Nothing in it is authenticated until [`Answer::integrity`] says so.
#[derive(Debug)]
pub(super) struct Answer<'a> {
    pub(super) id: TransactionId,
    pub(super) method: Method,
    pub(super) body: Body,
    message: Message<'a>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Body {
    Success(Success),
    Error(Refusal),
}

/// What a success may carry; absent and unusable values are `None`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Success {
    pub(super) mapped: Option<SocketAddr>,
    /// The first address of each family: IPv4, IPv6.
    pub(super) relayed: [Option<SocketAddr>; 2],
    pub(super) lifetime: Option<Duration>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) code: u16,
    /// REALM and NONCE, if both are there.
    pub(super) challenge: Option<Challenge>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Challenge {
    /// Is the realm ours?
    pub(super) our_realm: bool,
    pub(super) nonce: Nonce,
}

/// MESSAGE-INTEGRITY of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Integrity {
    Valid,
    Invalid,
    Absent,
}

/// Reads a whole datagram. `Ok(None)`: a request or an indication, which we never expect.
pub(super) fn decode(datagram: &[u8]) -> Result<Option<Answer<'_>>, Malformed> {
    well_formed(datagram)?;
    let message = Message::from_bytes(datagram).map_err(|_| Malformed)?;
    let body = match message.class() {
        MessageClass::Request | MessageClass::Indication => return Ok(None),
        MessageClass::Success => Body::Success(read_success(&message)),
        MessageClass::Error => Body::Error(read_refusal(&message).ok_or(Malformed)?),
    };
    Ok(Some(Answer { id: message.transaction_id(), method: message.method(), body, message }))
}

impl Answer<'_> {
    pub(super) fn integrity(&self, credentials: &Credentials) -> Integrity {
        if !self.message.has_attribute(MessageIntegrity::TYPE) {
            return Integrity::Absent;
        }
        match self.message.validate_integrity_with_key(&credentials.key) {
            Ok(_) => Integrity::Valid,
            Err(_) => Integrity::Invalid,
        }
    }
}

fn read_success(message: &Message<'_>) -> Success {
    let id = message.transaction_id();
    let mut success = Success {
        mapped: attribute::<XorMappedAddress>(message).map(|a| a.addr(id)).filter(usable),
        relayed: [None, None],
        lifetime: attribute::<Lifetime>(message)
            .map(|l| Duration::from_secs(l.seconds().into()).min(MAX_LIFETIME)),
    };
    for (_, raw) in message.iter_attributes().filter(|(_, raw)| raw_type(raw) == XorRelayedAddress::TYPE) {
        let address = XorRelayedAddress::from_raw_ref(&raw).ok().map(|a| a.addr(id)).filter(usable);
        if let Some(address) = address {
            success.relayed[family(address)].get_or_insert(address);
        }
    }
    success
}

fn read_refusal(message: &Message<'_>) -> Option<Refusal> {
    let code = attribute::<ErrorCode>(message)?.code();
    let challenge = attribute::<Realm>(message)
        .zip(attribute::<Nonce>(message))
        .map(|(realm, nonce)| Challenge { our_realm: realm.realm() == REALM, nonce });
    Some(Refusal { code, challenge })
}

fn attribute<'a, A: AttributeFromRaw<'a> + AttributeStaticType>(message: &'a Message<'a>) -> Option<A> {
    message.attribute::<A>().ok()
}

fn raw_type(raw: &impl stun_types::attribute::Attribute) -> AttributeType {
    raw.get_type()
}

/// The place of an address in a pair of (IPv4, IPv6).
pub(super) fn family(address: SocketAddr) -> usize {
    usize::from(address.is_ipv6())
}

/// Can a datagram be sent to it?
pub(super) fn usable(address: &SocketAddr) -> bool {
    address.port() != 0 && !address.ip().is_unspecified() && !address.ip().is_multicast()
}

/// Cookie, exact length, attributes that end where the message ends, each integrity attribute once, and after one
/// of them nothing but another of them (RFC 8489 section 14.5 lets a receiver ignore what follows; no server we
/// know sends such).
fn well_formed(datagram: &[u8]) -> Result<(), Malformed> {
    const ENDING: [AttributeType; 3] =
        [MessageIntegrity::TYPE, MessageIntegritySha256::TYPE, Fingerprint::TYPE];
    if classify(datagram) != PayloadKind::Stun {
        return Err(Malformed);
    }
    let mut seen = [false; 3];
    let mut rest = &datagram[20..];
    while let Some((header, after)) = rest.split_first_chunk::<4>() {
        let kind = AttributeType::new(u16::from_be_bytes([header[0], header[1]]));
        let length = usize::from(u16::from_be_bytes([header[2], header[3]])).next_multiple_of(4);
        match ENDING.iter().position(|ending| *ending == kind) {
            Some(at) if seen[at] => return Err(Malformed),
            Some(at) => seen[at] = true,
            None if seen.contains(&true) => return Err(Malformed),
            None => {}
        }
        rest = after.get(length..).ok_or(Malformed)?;
    }
    if rest.is_empty() { Ok(()) } else { Err(Malformed) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::fixtures;

    fn credentials() -> Credentials {
        Credentials::new(fixtures::USERNAME, fixtures::PASSWORD).unwrap()
    }

    fn id_of(datagram: &[u8]) -> TransactionId {
        u128::from_be_bytes(datagram[4..20].try_into().unwrap()).into()
    }

    #[test]
    fn requests_equal_the_recorded_bytes() {
        let nonce = |n: &str| Nonce::new(n).unwrap();
        let direct = nonce(fixtures::DIRECT_NONCE);
        let relayed = nonce(fixtures::RELAYED_NONCE);
        let bind =
            |number, peer: &str| Request::Bind { number, peer: peer.parse().expect("a literal address") };
        let table = [
            ("direct 1", fixtures::DIRECT_BINDING, Request::Binding, None),
            ("direct 3", fixtures::DIRECT_ALLOCATE, Request::Allocate, None),
            ("direct 5", fixtures::DIRECT_ALLOCATE_NONCE, Request::Allocate, Some(&direct)),
            ("direct 7", fixtures::DIRECT_BIND_4000, bind(0x4000, fixtures::DIRECT_PEER_4000), Some(&direct)),
            ("direct 9", fixtures::DIRECT_BIND_4001, bind(0x4001, fixtures::DIRECT_PEER_4001), Some(&direct)),
            ("relayed 5", fixtures::RELAYED_ALLOCATE_NONCE, Request::Allocate, Some(&relayed)),
            (
                "relayed 7",
                fixtures::RELAYED_BIND_4000,
                bind(0x4000, fixtures::RELAYED_PEER_4000),
                Some(&relayed),
            ),
        ];
        for (name, recorded, request, nonce) in table {
            let recorded = hex::decode(recorded).unwrap();
            let ours = encode(
                request,
                id_of(&recorded),
                Some(&credentials_of(name)),
                nonce,
                RefreshForm::LikeAllocate,
            );
            assert_eq!(hex::encode(ours), hex::encode(recorded), "{name}");
        }
    }

    fn credentials_of(name: &str) -> Credentials {
        if name.starts_with("relayed") {
            Credentials::new(fixtures::RELAYED_USERNAME, fixtures::RELAYED_PASSWORD).unwrap()
        } else {
            credentials()
        }
    }

    #[test]
    fn a_deallocating_refresh_has_its_attributes_in_order() {
        let bytes = encode(
            Request::Deallocate,
            7.into(),
            Some(&credentials()),
            Some(&Nonce::new("n").unwrap()),
            RefreshForm::LikeAllocate,
        );
        let message = Message::from_bytes(&bytes).unwrap();
        let kinds: Vec<u16> = message.iter_attributes().map(|(_, raw)| raw_type(&raw).value()).collect();
        assert_eq!(kinds, [0x0019, 0x8000, 0x8022, 0x000D, 0x0006, 0x0014, 0x0015, 0x0008]);
        let refresh =
            encode(Request::Refresh, 7.into(), Some(&credentials()), None, RefreshForm::LikeAllocate);
        let message = Message::from_bytes(&refresh).unwrap();
        let kinds: Vec<u16> = message.iter_attributes().map(|(_, raw)| raw_type(&raw).value()).collect();
        assert_eq!(kinds, [0x0019, 0x8000, 0x8022, 0x0006, 0x0014, 0x0008]);
    }

    #[test]
    fn recorded_answers_are_read_and_authentic() {
        let binding = hex::decode(fixtures::DIRECT_BINDING_SUCCESS).unwrap();
        let answer = decode(&binding).unwrap().unwrap();
        assert_eq!(answer.integrity(&credentials()), Integrity::Absent);
        let mapped = Some("198.51.100.2:52625".parse().unwrap());
        assert_eq!(answer.body, Body::Success(Success { mapped, ..Success::default() }));

        let challenge = hex::decode(fixtures::DIRECT_CHALLENGE).unwrap();
        let answer = decode(&challenge).unwrap().unwrap();
        assert_eq!(answer.integrity(&credentials()), Integrity::Valid);
        let nonce = Nonce::new(fixtures::DIRECT_NONCE).unwrap();
        let expected = Refusal { code: 401, challenge: Some(Challenge { our_realm: true, nonce }) };
        assert_eq!(answer.body, Body::Error(expected));

        let allocated = hex::decode(fixtures::DIRECT_ALLOCATE_SUCCESS).unwrap();
        let answer = decode(&allocated).unwrap().unwrap();
        assert_eq!(answer.integrity(&credentials()), Integrity::Valid);
        let other = Credentials::new(fixtures::USERNAME, "another password").unwrap();
        assert_eq!(answer.integrity(&other), Integrity::Invalid);
        assert_eq!(
            answer.body,
            Body::Success(Success {
                mapped,
                relayed: [Some("203.0.113.2:64276".parse().unwrap()), None],
                lifetime: Some(Duration::from_secs(600)),
            })
        );
        for (recorded, credentials) in [
            (fixtures::DIRECT_BIND_SUCCESS, credentials()),
            (
                fixtures::NOV25_BIND_SUCCESS,
                Credentials::new(fixtures::NOV25_USERNAME, fixtures::NOV25_PASSWORD).unwrap(),
            ),
        ] {
            let bound = hex::decode(recorded).unwrap();
            let answer = decode(&bound).unwrap().unwrap();
            assert_eq!((answer.method, answer.integrity(&credentials)), (CHANNEL_BIND, Integrity::Valid));
        }
    }

    #[test]
    fn hostile_shapes_are_malformed_and_never_panic() {
        let good = hex::decode(fixtures::DIRECT_ALLOCATE_SUCCESS).unwrap();
        let with = |extra: &[u8]| {
            let mut bytes = [&good, extra].concat();
            let length = u16::try_from(bytes.len() - 20).unwrap().to_be_bytes();
            bytes[2..4].copy_from_slice(&length);
            bytes
        };
        let second_integrity = good[good.len() - 24..].to_vec();
        let mut other_integrity = second_integrity.clone();
        other_integrity[4] ^= 1;
        let table: [(&str, Vec<u8>); 6] = [
            ("trailing byte", [good.as_slice(), &[0]].concat()),
            ("two equal integrities", with(&second_integrity)),
            ("two different integrities", with(&other_integrity)),
            ("an attribute after the integrity", with(&[0, 0x0D, 0, 4, 0, 0, 0, 0])),
            ("an attribute beyond the end", with(&[0, 0x0D, 0, 8, 0, 0, 0, 0])),
            ("half an attribute header", good[..22].to_vec()),
        ];
        for (name, bytes) in table {
            assert!(decode(&bytes).is_err(), "{name}");
        }
        // An answer that is not in need of a challenge, a mapped address or a lifetime is still read.
        let bare_error = encode_bare(0x0113, &[0, 9, 0, 4, 0, 0, 4, 37]);
        let answer = decode(&bare_error).unwrap().unwrap();
        assert_eq!(answer.body, Body::Error(Refusal { code: 437, challenge: None }));
        assert!(decode(&encode_bare(0x0113, &[])).is_err(), "an error without a code");
        assert!(decode(&encode_bare(0x0017, &[])).unwrap().is_none(), "a DATA indication");
    }

    fn encode_bare(kind: u16, attributes: &[u8]) -> Vec<u8> {
        let length = u16::try_from(attributes.len()).unwrap();
        let mut bytes = [kind.to_be_bytes(), length.to_be_bytes()].concat();
        bytes.extend_from_slice(&gateway_common::classify::STUN_MAGIC);
        bytes.extend_from_slice(&[7; 12]);
        bytes.extend_from_slice(attributes);
        bytes
    }

    #[test]
    fn names_that_do_not_fit_are_refused_and_secrets_are_not_printed() {
        assert!(Credentials::new("", "x").is_none());
        assert!(Credentials::new(&"x".repeat(514), "x").is_none());
        let shown = format!("{:?}", credentials());
        assert!(!shown.contains(fixtures::USERNAME) && !shown.contains("53") && !shown.contains("83"));
    }
}
