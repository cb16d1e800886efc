//! Conversations over an in-memory pipe with a clock that jumps, and servers on loopback.

use std::sync::Arc;

use hickory_proto::op::{Message, ResponseCode};
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};
use tokio::{
    io::{DuplexStream, ReadHalf, WriteHalf, duplex, split},
    task::LocalSet,
};

use super::*;
use crate::dns::{connections::PER_CLIENT, forward};

#[tokio::test(start_paused = true)]
async fn a_connection_ends_when_its_time_is_over() {
    let query = framed(&forward::tests::query(None).with_id(1));
    let (half, almost) = (&query[..10], &query[..query.len() - 1]);
    // What the client sends, each after a pause in seconds; how it ends, and after how many seconds in all.
    type Sends<'a> = &'a [(u64, &'a [u8])];
    let table: &[(&str, Sends<'_>, End, u64)] = &[
        ("it says nothing", &[], End::Idle, 20),
        ("it asks once", &[(3, &query)], End::Idle, 23),
        ("it asks now and then", &[(0, &query), (19, &query), (19, &query)], End::Idle, 58),
        ("half a message", &[(2, half)], End::SlowQuery, 7),
        ("half a length", &[(2, &query[..1])], End::SlowQuery, 7),
        ("it dribbles", &[(0, &query[..1]), (2, &query[1..2]), (2, &query[2..9])], End::SlowQuery, 5),
        ("slow, but not too slow", &[(0, almost), (4, &query[query.len() - 1..])], End::Idle, 24),
        ("a message of no bytes", &[(1, &[0, 0])], End::NoQuery, 1),
        ("a response", &[(1, &[0, 3, 1, 2, 0x80])], End::NoQuery, 1),
        ("garbage with an ID", &[(1, &[0, 3, 1, 2, 0])], End::Idle, 21),
    ];
    for (name, sends, expect, seconds) in table {
        let started = Instant::now();
        let ((_reader, mut writer), conversation) = converse(4096);
        let client = async {
            for (pause, bytes) in *sends {
                tokio::time::sleep(Duration::from_secs(*pause)).await;
                writer.write_all(bytes).await.unwrap();
            }
            std::future::pending::<()>().await;
        };
        let end = tokio::select! { end = conversation => end, () = client => unreachable!() };
        assert_eq!(end, *expect, "{name}");
        assert_eq!(started.elapsed().as_secs(), *seconds, "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_read_is_left() {
    let query = framed(&forward::tests::query(None).with_id(1));
    let ((_reader, mut writer), conversation) = converse(64);
    let client = async {
        // The answers fill the pipe long before the client's limit is reached.
        while writer.write_all(&query).await.is_ok() {}
        std::future::pending::<()>().await;
    };
    let end = tokio::select! { end = conversation => end, () = client => unreachable!() };
    assert_eq!(end, End::SlowReader);
}

/// However the stream is cut: every query has its answer, also when the client says that it has no more.
#[tokio::test(start_paused = true)]
async fn all_queries_of_a_stream_are_answered() {
    let mut random = SmallRng::seed_from_u64(1035);
    for round in 0..100_u32 {
        let count = random.random_range(1..100_u16);
        let stream: Vec<u8> =
            (0..count).flat_map(|id| framed(&forward::tests::query(None).with_id(id))).collect();
        let ((mut reader, mut writer), conversation) = converse(random.random_range(1..5000));
        let chunk = random.random_range(1..stream.len() + 1);
        let send = async {
            for piece in stream.chunks(chunk) {
                writer.write_all(piece).await.unwrap();
            }
            writer.shutdown().await.unwrap();
        };
        let receive = async {
            let mut ids = Vec::new();
            for _ in 0..count {
                let mut answer = vec![0; reader.read_u16().await.unwrap().into()];
                reader.read_exact(&mut answer).await.unwrap();
                let answer = Message::from_vec(&answer).unwrap();
                // There is no nameserver.
                assert_eq!(answer.metadata.response_code, ResponseCode::ServFail, "{round}");
                ids.push(answer.metadata.id);
            }
            ids.sort_unstable();
            ids
        };
        let ((), ids, end) = tokio::join!(send, receive, conversation);
        assert_eq!(ids, (0..count).collect::<Vec<_>>(), "{round}");
        assert_eq!(end, End::Closed, "{round}");
    }
}

#[tokio::test]
async fn the_longest_idle_connection_makes_room() {
    LocalSet::new()
        .run_until(async {
            let forwarder = Forwarder::new(None, Arc::default());
            let open: Open = Rc::new(RefCell::new(Connections::new()));
            let server = bind("127.0.0.1:0".parse().unwrap(), Rc::clone(&forwarder), open).unwrap();
            let query = framed(&forward::tests::query(None).with_id(1));
            let mut streams = Vec::new();
            for _ in 0..=PER_CLIENT {
                let mut stream = TcpStream::connect(server.local()).await.unwrap();
                assert!(is_served(&mut stream, &query).await);
                streams.push(stream);
            }
            assert!(!is_served(&mut streams[0], &query).await, "the first was the longest idle");
            assert!(is_served(&mut streams[1], &query).await);
            assert_eq!(forwarder.stats.get(Count::ConnectionsDropped), 1);
            let address = server.local();
            server.close().await;
            assert!(!is_served(&mut streams[1], &query).await, "the server is gone");
            assert!(TcpStream::connect(address).await.is_err());
        })
        .await;
}

async fn is_served(stream: &mut TcpStream, query: &[u8]) -> bool {
    if stream.write_all(query).await.is_err() {
        return false;
    }
    let Ok(length) = stream.read_u16().await else { return false };
    let mut answer = vec![0; length.into()];
    stream.read_exact(&mut answer).await.is_ok()
}

/// A client's end of a pipe that holds `space` bytes each way, and the server's side of it.
fn converse(space: usize) -> ((ReadHalf<DuplexStream>, WriteHalf<DuplexStream>), impl Future<Output = End>) {
    let (client, server) = duplex(space);
    let forwarder = Forwarder::new(None, Arc::default());
    let open = Rc::new(RefCell::new(Connections::new()));
    let address = "100.64.0.1:1".parse().unwrap();
    let conversation = async move {
        let connection = Connection::admit(address, &forwarder, &open).unwrap();
        let (reader, writer) = split(server);
        connection.converse(reader, writer).await
    };
    (split(client), conversation)
}
