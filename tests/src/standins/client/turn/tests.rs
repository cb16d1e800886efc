//! Tests of the stand-in's TURN client, against recorded bytes and hostile ones.

use stun_types::attribute::Username;
use stun_types::message::{IntegrityAlgorithm, MessageWrite as _, MessageWriteExt as _, MessageWriteVec};
use turn_types::attribute::{ChannelNumber, RequestedTransport};
use turn_types::message::CHANNEL_BIND;

use super::*;

const USERNAME: &str = "2145916800:QiROe5zpklma29jrJ0UbH/Waw1A2hHE+E8TxcaUVhTs";
const PASSWORD: &str = "6R5yNta4JPyRcwvnF0atj8mPgLzY1vEUlOwzfZszH5c";
/// test-vectors.md section 4.2, frame 3 of head-direct.
const ALLOCATE_REQUEST: &str = "0003007c2112a442059f379e85b90f94addd4eee001900041100000080000004\
    0200000080220007736e6f776e65740000060036323134353931363830303a51\
    69524f65357a706b6c6d6132396a724a305562482f5761773141326848452b45\
    38547863615556685473000000140008666972657a6f6e650008001460dfc767\
    834f31aae4f323b1e5e82040a650ec89";
/// The same, frame 6: the success that answers a later request.
const ALLOCATE_SUCCESS: &str = "010300542112a44286e0285c55e62eecd0061dfe80220018666972657a6f6e65\
    2d72656c61793b207265763d78787878001600080001da06ea12d54000200008\
    0001ec83e721c040000d00040000025800080014d87f5daa1d1d9d99b93f492c\
    36128b8007353a24";

fn server() -> SocketAddr {
    "203.0.113.2:3478".parse().unwrap()
}

fn host() -> SocketAddr {
    "198.51.100.2:52625".parse().unwrap()
}

/// A relay whose BINDING was answered, with the open ALLOCATE's id replaced by the recorded one.
fn allocating(now: Instant) -> Turn {
    let mut turn = Turn::new(vec![server()], USERNAME, PASSWORD, "snownet", now);
    let (to, bytes) = turn.poll_transmit().unwrap();
    assert_eq!((to, bytes.len()), (server(), 32), "BINDING with SOFTWARE only, as recorded");
    let request = Message::from_bytes(&bytes).unwrap();
    let mut answer = Message::builder_success(&request, MessageWriteVec::new());
    answer.add_attribute(&XorMappedAddress::new(host(), request.transaction_id())).unwrap();
    assert_eq!(turn.handle(host(), &answer.finish(), now), Received::Control);
    assert_eq!(turn.poll_event(), Some(TurnEvent::Mapped { host: host(), reflexive: host() }));
    turn
}

fn id_of(hex_text: &str) -> TransactionId {
    Message::from_bytes(&hex::decode(hex_text).unwrap()).unwrap().transaction_id()
}

#[test]
fn allocate_is_the_recorded_one_to_the_byte() {
    let turn = Turn::new(vec![], USERNAME, PASSWORD, "snownet", Instant::now());
    let bytes = turn.credentials.encode(What::Allocate, id_of(ALLOCATE_REQUEST));
    assert_eq!(hex::encode(bytes), ALLOCATE_REQUEST);
}

#[test]
fn the_recorded_success_is_an_allocation() {
    let now = Instant::now();
    let mut turn = allocating(now);
    assert_eq!(turn.requests.len(), 1);
    turn.requests[0].id = id_of(ALLOCATE_SUCCESS);
    turn.handle(host(), &hex::decode(ALLOCATE_SUCCESS).unwrap(), now);
    let relayed: SocketAddr = "203.0.113.2:64276".parse().unwrap();
    assert_eq!(turn.poll_event(), Some(TurnEvent::Allocated { relayed, local: host() }));
    assert_eq!(turn.relayed(), [relayed]);
    assert_eq!(turn.poll_timeout(), Some(now + KEEP_ALIVE));
}

#[test]
fn a_success_with_another_password_is_ignored() {
    let now = Instant::now();
    let mut turn = allocating(now);
    turn.requests[0].id = id_of(ALLOCATE_SUCCESS);
    let mut bytes = hex::decode(ALLOCATE_SUCCESS).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    turn.handle(host(), &bytes, now);
    assert!(turn.relayed().is_empty());
}

#[test]
fn a_401_brings_a_nonce_and_a_second_one_ends_it() {
    let now = Instant::now();
    let mut turn = allocating(now);
    let unauthorized = |request: &[u8]| {
        let request = Message::from_bytes(request).unwrap();
        let mut answer = Message::builder_error(&request, MessageWriteVec::new());
        answer.add_attribute(&ErrorCode::new(401, "Unauthorized").unwrap()).unwrap();
        answer.add_attribute(&Realm::new(REALM).unwrap()).unwrap();
        answer.add_attribute(&Nonce::new("0f9b3c1a-1111-4222-8333-444455556666").unwrap()).unwrap();
        answer.finish()
    };
    let (_, first) = turn.poll_transmit().unwrap();
    assert_eq!(first.len(), 144);
    turn.handle(host(), &unauthorized(&first), now);
    let (_, second) = turn.poll_transmit().unwrap();
    assert_eq!(second.len(), 184, "the same with a 36-byte nonce, as recorded");
    turn.handle(host(), &unauthorized(&second), now);
    assert_eq!(turn.poll_transmit(), None);
    assert!(turn.requests.is_empty());
}

#[test]
fn a_400_without_nonce_is_answered_without_credentials() {
    let now = Instant::now();
    let mut turn = allocating(now);
    let (_, first) = turn.poll_transmit().unwrap();
    let mut answer = Message::builder_error(&Message::from_bytes(&first).unwrap(), MessageWriteVec::new());
    answer.add_attribute(&ErrorCode::new(400, "Bad Request").unwrap()).unwrap();
    turn.handle(host(), &answer.finish(), now);
    let (_, second) = turn.poll_transmit().unwrap();
    let second = Message::from_bytes(&second).unwrap();
    assert!(!second.has_attribute(Username::TYPE) && !second.has_attribute(MessageIntegrity::TYPE));
    assert!(second.has_attribute(RequestedTransport::TYPE));
}

#[test]
fn channels_are_usable_while_their_first_bind_is_open_and_received_on_after_it() {
    let now = Instant::now();
    let mut turn = allocating(now);
    turn.requests[0].id = id_of(ALLOCATE_SUCCESS);
    turn.handle(host(), &hex::decode(ALLOCATE_SUCCESS).unwrap(), now);
    while turn.poll_transmit().is_some() {}
    let peer: SocketAddr = "192.0.2.2:52625".parse().unwrap();
    turn.bind(peer, now);
    turn.bind(peer, now);
    let (_, bind) = turn.poll_transmit().unwrap();
    assert_eq!(turn.poll_transmit(), None, "one request per peer");
    assert_eq!(turn.channel(peer), Some((server(), 0x4000)));
    let data = [0x40, 0, 0, 2, 7, 8];
    assert_eq!(turn.handle(host(), &data, now), Received::Dropped, "not confirmed yet");
    let request = Message::from_bytes(&bind).unwrap();
    assert_eq!(request.attribute::<ChannelNumber>().unwrap().channel(), 0x4000);
    let mut answer = Message::builder_success(&request, MessageWriteVec::new());
    answer.add_message_integrity_with_key(&turn.credentials.key, IntegrityAlgorithm::Sha1).unwrap();
    turn.handle(host(), &answer.finish(), now);
    let relayed = turn.relayed()[0];
    assert_eq!(turn.handle(host(), &data, now), Received::Data { peer, relayed, payload: &[7, 8] });
    turn.handle_timeout(now + CHANNEL_REFRESH);
    let kinds: Vec<_> = std::iter::from_fn(|| turn.poll_transmit())
        .map(|(_, bytes)| Message::from_bytes(&bytes).unwrap().method())
        .collect();
    assert!(kinds.contains(&CHANNEL_BIND), "a channel that was heard on is renewed: {kinds:?}");
}

#[test]
fn requests_are_sent_at_0_1_and_2_5_and_4_75_seconds_and_given_up_at_8_125() {
    let start = Instant::now();
    let mut turn = allocating(start);
    let mut sent = Vec::new();
    for ms in (0..8125).step_by(125) {
        turn.handle_timeout(start + Duration::from_millis(ms));
        while turn.poll_transmit().is_some() {
            sent.push(ms);
        }
    }
    assert_eq!(sent, [0, 1000, 2500, 4750]);
    turn.handle_timeout(start + Duration::from_millis(8125));
    assert_eq!(turn.poll_transmit().map(|(_, bytes)| bytes.len()), Some(32), "starts over with BINDING");
}

#[test]
fn hostile_bytes_are_dropped() {
    let now = Instant::now();
    let mut turn = allocating(now);
    for bytes in [&[][..], &[0x40], &[0x40, 0, 0, 9, 1], &[0, 1, 0, 0], &[0xFF; 64], &[0x4F, 0xFF, 0, 0]] {
        assert!(matches!(turn.handle(host(), bytes, now), Received::Dropped));
    }
}
