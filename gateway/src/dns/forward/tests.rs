//! Queries against nameservers that behave in all the ways that nameservers do, on loopback.

use std::sync::Arc;

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query as Question},
    rr::{Name, RData, Record, RecordType, rdata::TXT},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, UdpSocket},
    task::{LocalSet, spawn_local},
};

use super::{
    Transport::{Tcp, Udp},
    *,
};
use crate::dns::upstream::framed;

/// What a nameserver does with a question; the same over both transports, where nothing else is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Habit {
    /// This many TXT records of 100 bytes; over UDP none but TC, if they do not fit into 1232 bytes.
    Answers(usize),
    /// The same, not over TCP: nothing listens there.
    UdpOnly(usize),
    /// Nothing comes back.
    Silent,
    /// Silent over UDP, one record over TCP.
    TcpOnly,
    /// An answer without records.
    Says(ResponseCode),
    /// Another ID, another question, noise; then one record.
    StraysFirst,
    /// Nothing listens.
    Closed,
    /// TC without any reason, and one record over TCP.
    CutsShort,
    /// Another's answer, or an end in the middle, over TCP; silent over UDP.
    Broken,
}
use Habit::*;

#[tokio::test]
async fn whoever_knows_the_answer_is_found() {
    const NXDOMAIN: ResponseCode = ResponseCode::NXDomain;
    const REFUSED: ResponseCode = ResponseCode::Refused;
    const SERVFAIL: ResponseCode = ResponseCode::ServFail;
    /// Nobody has to be waited for.
    const AT_ONCE: u64 = 350;
    /// One has.
    const ONE_SILENT: u64 = 390;
    struct Case {
        name: &'static str,
        servers: &'static [Habit],
        over: Transport,
        edns: Option<u16>,
        /// RCODE, TC, records.
        expect: (ResponseCode, bool, usize),
        /// Milliseconds.
        took: std::ops::Range<u64>,
    }
    let case = |name, servers, over, edns, expect, took| Case { name, servers, over, edns, expect, took };
    let (good, cut) = ((ResponseCode::NoError, false, 1), (ResponseCode::NoError, true, 0));
    let table = [
        case("nobody is configured", &[], Udp, None, (SERVFAIL, false, 0), 0..AT_ONCE),
        case("one, UDP", &[Answers(1)], Udp, None, good, 0..AT_ONCE),
        case("one, TCP", &[Answers(1)], Tcp, None, good, 0..AT_ONCE),
        case("no such name", &[Says(NXDOMAIN), Answers(1)], Udp, None, (NXDOMAIN, false, 0), 0..AT_ONCE),
        case("the first is silent", &[Silent, Answers(1)], Udp, None, good, ONE_SILENT..2000),
        case("the first is silent, TCP", &[Silent, Answers(1)], Tcp, None, good, ONE_SILENT..2000),
        case("two are silent", &[Silent, Silent, Answers(1)], Udp, None, good, 2 * ONE_SILENT..4000),
        case("the first is closed", &[Closed, Answers(1)], Udp, None, good, 0..AT_ONCE),
        case("the first is closed, TCP", &[Closed, Answers(1)], Tcp, None, good, 0..AT_ONCE),
        case("the first refuses", &[Says(REFUSED), Answers(1)], Udp, None, good, 0..AT_ONCE),
        case("the first fails, TCP", &[Says(SERVFAIL), Answers(1)], Tcp, None, good, 0..AT_ONCE),
        case("all decline", &[Says(REFUSED), Says(SERVFAIL)], Udp, None, (REFUSED, false, 0), 0..AT_ONCE),
        case("all are closed", &[Closed, Closed], Udp, None, (SERVFAIL, false, 0), 0..AT_ONCE),
        case(
            "one declines, one is closed",
            &[Closed, Says(REFUSED)],
            Tcp,
            None,
            (REFUSED, false, 0),
            0..AT_ONCE,
        ),
        case("all are silent", &[Silent, Silent], Udp, None, (SERVFAIL, false, 0), 4900..8000),
        case("strays", &[StraysFirst], Udp, None, good, 0..AT_ONCE),
        case("UDP does not pass", &[TcpOnly], Udp, None, good, 1000..4900),
        case("TCP does not pass", &[UdpOnly(1)], Tcp, None, good, 0..AT_ONCE),
        case("TCP is broken", &[Broken, Answers(1)], Tcp, None, good, 0..AT_ONCE),
        case("long, small client", &[Answers(9)], Udp, None, cut, 0..AT_ONCE),
        case("long, medium client", &[Answers(9)], Udp, Some(1100), (good.0, false, 9), 0..AT_ONCE),
        case("too long for UDP", &[Answers(40)], Udp, Some(4096), cut, 0..AT_ONCE),
        case("long, TCP", &[Answers(400)], Tcp, None, (good.0, false, 400), 0..AT_ONCE),
        case("long, no TCP", &[UdpOnly(40)], Udp, Some(1232), cut, 0..AT_ONCE),
        case("long, no TCP, client over TCP", &[UdpOnly(40)], Tcp, None, (SERVFAIL, false, 0), 0..AT_ONCE),
        case("cut for nothing", &[CutsShort], Udp, Some(1232), good, 0..AT_ONCE),
        case("cut for nothing, no EDNS", &[CutsShort], Udp, None, cut, 0..AT_ONCE),
    ];
    LocalSet::new()
        .run_until(async {
            for Case { name, servers, over, edns, expect, took } in table {
                let mut late = Vec::new();
                // A machine that is busy may be late; late three times is a fault.
                while late.len() < 3 {
                    let forwarder = forwarder(servers).await;
                    let permit = forwarder.admit(IpAddr::from([100, 64, 0, 1])).unwrap();
                    let asked = std::time::Instant::now();
                    let answer = Message::from_vec(&permit.forward(&query(edns), over).await).unwrap();
                    let needed = u64::try_from(asked.elapsed().as_millis()).unwrap();
                    let metadata = answer.metadata;
                    let got = (metadata.response_code, metadata.truncation, answer.answers.len());
                    assert_eq!(got, expect, "{name}");
                    assert_eq!((metadata.id, answer.queries.len()), (0x1234, 1), "{name}");
                    assert!(needed >= took.start, "{name}: {needed} ms");
                    if needed < took.end {
                        if servers == [StraysFirst] {
                            assert_eq!(forwarder.stats.get(Count::Strays), 3);
                        }
                        break;
                    }
                    late.push(needed);
                }
                assert!(late.len() < 3, "{name}: {late:?} ms");
            }
        })
        .await;
}

/// And is found again when it is back, which takes minutes: see `rtt`.
#[tokio::test]
async fn the_second_query_does_not_wait_for_the_dead() {
    LocalSet::new()
        .run_until(async {
            for habit in [Silent, Closed, Says(ResponseCode::ServFail)] {
                let forwarder = forwarder(&[habit, Answers(1)]).await;
                for over in [Udp, Tcp] {
                    let mut again = Vec::new();
                    for _ in 0..10 {
                        let before = forwarder.stats.get(Count::AskedAgain);
                        let permit = forwarder.admit(IpAddr::from([100, 64, 0, 1])).unwrap();
                        permit.forward(&query(None), over).await;
                        again.push(forwarder.stats.get(Count::AskedAgain) - before);
                    }
                    // A machine that is busy may make the good one look slow once or twice.
                    assert!(
                        again[0] == 1 && again[1..].iter().sum::<u64>() <= 2,
                        "{habit:?} {over:?} {again:?}"
                    );
                }
            }
        })
        .await;
}

#[tokio::test]
async fn a_client_over_its_limit_is_refused_until_answers_come() {
    use crate::dns::limits::{IN_FLIGHT, IN_FLIGHT_PER_CLIENT};
    let forwarder = Forwarder::new(None, Arc::default());
    let client = |last: u16| IpAddr::from([100, 64, last.to_be_bytes()[0], last.to_be_bytes()[1]]);
    let mut permits: Vec<Permit> =
        (0..IN_FLIGHT_PER_CLIENT).map(|_| forwarder.admit(client(1)).unwrap()).collect();
    assert_eq!(forwarder.admit(client(1)).unwrap_err(), ResponseCode::Refused);
    permits.pop();
    permits.push(forwarder.admit(client(1)).unwrap());
    for other in 2.. {
        if permits.len() == IN_FLIGHT {
            break;
        }
        permits.push(forwarder.admit(client(other)).unwrap());
    }
    assert_eq!(forwarder.admit(client(5000)).unwrap_err(), ResponseCode::ServFail);
    drop(permits);
    let permit = forwarder.admit(client(5000)).unwrap();
    let answer = permit.forward(&query(None), Udp).await;
    assert_eq!(Message::from_vec(&answer).unwrap().metadata.response_code, ResponseCode::ServFail);
}

/// A hundred queries at once with two sockets: each waits for its turn, none fails.
#[tokio::test]
async fn sockets_are_not_taken_from_the_rest_of_the_process() {
    LocalSet::new()
        .run_until(async {
            let forwarder = forwarder(&[Answers(1)]).await;
            let sockets = &forwarder.upstream.sockets;
            sockets.forget_permits(sockets.available_permits() - 2);
            let asked: FuturesUnordered<_> = (0..100_u8)
                .map(|last| {
                    let permit = forwarder.admit(IpAddr::from([100, 64, 0, last])).unwrap();
                    async move { permit.forward(&query(None), if last % 2 == 0 { Udp } else { Tcp }).await }
                })
                .collect();
            let answers: Vec<Vec<u8>> = asked.collect().await;
            assert!(answers.iter().all(|answer| answer[3] & 0xf == 0));
            assert_eq!((answers.len(), forwarder.upstream.sockets.available_permits()), (100, 2));
        })
        .await;
}

/// `_note.lan.test` TXT with ID 0x1234.
pub fn query(edns: Option<u16>) -> Query {
    let mut message = Message::new(0x1234, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Question::query(Name::from_ascii("_note.lan.test.").unwrap(), RecordType::TXT));
    if let Some(size) = edns {
        let mut edns = Edns::new();
        edns.set_max_payload(size);
        message.set_edns(edns);
    }
    Query::read(&message.to_vec().unwrap()).unwrap()
}

async fn forwarder(servers: &[Habit]) -> Rc<Forwarder> {
    let forwarder = Forwarder::new(None, Arc::default());
    let mut addresses = Vec::new();
    for habit in servers {
        addresses.push(nameserver(*habit).await);
    }
    forwarder.set_nameservers(addresses);
    forwarder
}

/// Its sockets live as long as the test's `LocalSet`.
async fn nameserver(habit: Habit) -> SocketAddr {
    let (udp, tcp) = loop {
        let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        // Another test may have the port for TCP.
        if let Ok(tcp) = TcpListener::bind(udp.local_addr().unwrap()).await {
            break (udp, tcp);
        }
    };
    let address = udp.local_addr().unwrap();
    if habit == Closed {
        return address;
    }
    spawn_local(async move {
        let mut buffer = [0; 2000];
        loop {
            let (length, client) = udp.recv_from(&mut buffer).await.unwrap();
            for answer in over_udp(habit, &Message::from_vec(&buffer[..length]).unwrap()) {
                udp.send_to(&answer, client).await.unwrap();
            }
        }
    });
    if !matches!(habit, UdpOnly(_)) {
        spawn_local(async move {
            let mut silent = Vec::new();
            loop {
                let (mut stream, _) = tcp.accept().await.unwrap();
                let mut question = vec![0; stream.read_u16().await.unwrap().into()];
                stream.read_exact(&mut question).await.unwrap();
                match over_tcp(habit, &Message::from_vec(&question).unwrap()) {
                    Some(answer) => stream.write_all(&answer).await.unwrap(),
                    None => silent.push(stream),
                }
            }
        });
    }
    address
}

fn over_udp(habit: Habit, question: &Message) -> Vec<Vec<u8>> {
    let right = answer(question, 1);
    let encode = |message: &Message| message.to_vec().unwrap();
    match habit {
        Silent | TcpOnly | Closed | Broken => vec![],
        Says(code) => {
            let mut said = answer(question, 0);
            said.metadata.response_code = code;
            vec![encode(&said)]
        }
        StraysFirst => {
            let (mut id, mut name) = (right.clone(), right.clone());
            id.metadata.id ^= 1;
            name.queries[0].set_name(Name::from_ascii("other.lan.test.").unwrap());
            vec![encode(&id), encode(&name), b"noise".to_vec(), encode(&right)]
        }
        CutsShort => vec![encode(&answer(question, 0).truncate())],
        Answers(records) | UdpOnly(records) => {
            let whole = answer(question, records);
            let limit = question.edns.as_ref().map_or(512, |edns| usize::from(edns.max_payload().min(1232)));
            let bytes = encode(&whole);
            vec![if bytes.len() <= limit { bytes } else { encode(&whole.truncate()) }]
        }
    }
}

fn over_tcp(habit: Habit, question: &Message) -> Option<Vec<u8>> {
    let encode = |message: &Message| framed(&message.to_vec().unwrap());
    match habit {
        Silent => None,
        Answers(records) => Some(encode(&answer(question, records))),
        Says(code) => {
            let mut said = answer(question, 0);
            said.metadata.response_code = code;
            Some(encode(&said))
        }
        Broken => Some(encode(&answer(question, 1))[..20].to_vec()),
        TcpOnly | StraysFirst | CutsShort | UdpOnly(_) | Closed => Some(encode(&answer(question, 1))),
    }
}

fn answer(question: &Message, records: usize) -> Message {
    let mut answer = Message::response(question.metadata.id, OpCode::Query);
    answer.add_queries(question.queries.iter().cloned());
    for _ in 0..records {
        let text = TXT::new(vec!["x".repeat(85)]);
        answer.add_answer(Record::from_rdata(question.queries[0].name().clone(), 60, RData::TXT(text)));
    }
    answer
}
