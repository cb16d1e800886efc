//! Look-ups at nameservers on loopback that do as they are told.

use std::{cell::RefCell, net::UdpSocket as StdUdpSocket, rc::Rc};

use hickory_proto::{
    op::{Message, MessageType},
    rr::{
        Record,
        rdata::{A, AAAA, CNAME},
    },
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, UdpSocket},
    task::{LocalSet, spawn_local},
};

use super::*;

/// What the nameservers know: a name, and what is said of it: addresses, `=name` for an alias, or a word.
/// `!` before a word is for AAAA questions only.
const ZONE: &[(&str, &str)] = &[
    ("both.test", "192.0.2.2 192.0.2.1 2001:db8::1"),
    ("four.test", "192.0.2.4"),
    ("six.test", "2001:db8::6"),
    ("alias.test", "=chain.test"),
    ("chain.test", "=both.test"),
    ("dangling.test", "=gone.test"),
    ("loop.test", "=loop.test"),
    ("empty.test", ""),
    ("servfail.test", "servfail"),
    ("refused.test", "refused"),
    ("silent.test", "silent"),
    ("half.test", "192.0.2.7 !silent"),
    ("poor.test", "192.0.2.8 !servfail"),
    ("long.test", "192.0.2.9 2001:db8::9 cut"),
    ("web.corp.test", "192.0.2.10"),
    ("a.web.corp.test", "192.0.2.11"),
    ("web.deep.test", "2001:db8::c"),
    ("servfail.test.corp.test", "192.0.2.12"),
    ("local", "192.0.2.13"),
];

fn script(name: &str) -> Option<&'static str> {
    ZONE.iter().find(|(own, _)| *own == name).map(|(_, said)| *said)
}

/// The answer to `question`; `None` is silence.
fn answer(question: &[u8], is_tcp: bool) -> Option<Vec<u8>> {
    let question = Message::from_vec(question).unwrap();
    let query = question.queries[0].clone();
    let mut reply = Message::response(question.metadata.id, question.metadata.op_code);
    reply.metadata.message_type = MessageType::Response;
    reply.metadata.recursion_available = true;
    reply.add_query(query.clone());
    let mut owner = query.name().clone();
    // A recursive nameserver follows aliases; an end is an end.
    for _ in 0..3 {
        let text = owner.to_lowercase().to_string();
        let Some(said) = script(text.trim_end_matches('.')) else {
            reply.metadata.response_code = ResponseCode::NXDomain;
            break;
        };
        let mut next = None;
        for word in said.split_whitespace() {
            let word = match word.strip_prefix('!') {
                Some(word) if query.query_type() == RecordType::AAAA => word,
                Some(_) => continue,
                None => word,
            };
            let data = match word {
                "silent" => return None,
                "servfail" => {
                    reply.metadata.response_code = ResponseCode::ServFail;
                    continue;
                }
                "refused" => {
                    reply.metadata.response_code = ResponseCode::Refused;
                    continue;
                }
                "cut" => {
                    if !is_tcp {
                        reply.metadata.truncation = true;
                        reply.answers.clear();
                    }
                    continue;
                }
                word => match (word.strip_prefix('='), word.parse()) {
                    (Some(alias), _) => {
                        let alias = Name::from_ascii(format!("{alias}.")).unwrap();
                        next = Some(alias.clone());
                        RData::CNAME(CNAME(alias))
                    }
                    (None, Ok(IpAddr::V4(ip))) if query.query_type() == RecordType::A => RData::A(A(ip)),
                    (None, Ok(IpAddr::V6(ip))) if query.query_type() == RecordType::AAAA => {
                        RData::AAAA(AAAA(ip))
                    }
                    _ => continue,
                },
            };
            reply.add_answer(Record::from_rdata(owner.clone(), 60, data));
        }
        match next {
            Some(name) => owner = name,
            None => break,
        }
    }
    Some(reply.to_vec().unwrap())
}

/// A nameserver that knows [`ZONE`]; what it was asked, in lower case, `A` or `AAAA` behind it.
#[derive(Clone, Default)]
struct Asked(Rc<RefCell<Vec<String>>>);

impl Asked {
    fn take(&self) -> Vec<String> {
        let mut asked = self.0.take();
        asked.sort();
        asked
    }
}

/// Answers with `knows`; no answer at all to what is `None`.
async fn nameserver(knows: fn(&[u8], bool) -> Option<Vec<u8>>) -> (SocketAddr, Asked) {
    let (udp, tcp, address) = loop {
        let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = udp.local_addr().unwrap();
        // The same port may be taken over TCP.
        if let Ok(tcp) = TcpListener::bind(address).await {
            break (udp, tcp, address);
        }
    };
    let asked = Asked::default();
    let log = asked.clone();
    spawn_local(async move {
        let mut buffer = [0; 1500];
        loop {
            let (length, from) = udp.recv_from(&mut buffer).await.unwrap();
            let message = Message::from_vec(&buffer[..length]).unwrap();
            let query = &message.queries[0];
            log.0.borrow_mut().push(format!("{} {}", query.name(), query.query_type()));
            if let Some(answer) = knows(&buffer[..length], false) {
                udp.send_to(&answer, from).await.unwrap();
            }
        }
    });
    spawn_local(async move {
        loop {
            let (mut stream, _) = tcp.accept().await.unwrap();
            spawn_local(async move {
                while let Ok(length) = stream.read_u16().await {
                    let mut message = vec![0; length.into()];
                    stream.read_exact(&mut message).await.unwrap();
                    let answer = knows(&message, true).unwrap();
                    stream.write_all(&crate::dns::upstream::framed(&answer)).await.unwrap();
                }
            });
        }
    });
    (address, asked)
}

fn resolver(text: &str, servers: &[SocketAddr], limit: Duration) -> Resolver {
    let resolver = Resolver::new(None, limit);
    resolver.set_conf(ResolvConf { nameservers: servers.to_vec(), ..conf(text) });
    resolver
}

/// Whatever this machine is called.
fn conf(text: &str) -> ResolvConf {
    ResolvConf::parse(&format!("search\n{text}"))
}

fn name(text: &str) -> DomainName {
    DomainName::parse(text).unwrap()
}

/// One line: what of each family; `-` for nothing, `failed`, `late`.
async fn look_up(resolver: &Resolver, text: &str) -> String {
    fn brief<A: ToString>(found: &Lookup<A>) -> String {
        match found {
            Lookup::Answer(ips) if ips.is_empty() => "-".into(),
            Lookup::Answer(ips) => ips.iter().map(A::to_string).collect::<Vec<_>>().join(","),
            Lookup::Failed => "failed".into(),
            Lookup::TimedOut => "late".into(),
        }
    }
    let Resolved { v4, v6 } = resolver.look_up(&name(text)).await;
    format!("{} {}", brief(&v4), brief(&v6))
}

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test]
async fn names_become_addresses() {
    LocalSet::new()
        .run_until(async {
            let (server, _) = nameserver(answer).await;
            let resolver = resolver("", &[server], SECOND);
            for (text, expect) in [
                ("both.test", "192.0.2.1,192.0.2.2 2001:db8::1"),
                ("BOTH.test", "192.0.2.1,192.0.2.2 2001:db8::1"),
                ("four.test", "192.0.2.4 -"),
                ("six.test", "- 2001:db8::6"),
                ("alias.test", "192.0.2.1,192.0.2.2 2001:db8::1"),
                ("dangling.test", "- -"),
                ("gone.test", "- -"),
                ("empty.test", "- -"),
                ("servfail.test", "failed failed"),
                ("refused.test", "failed failed"),
                ("silent.test", "late late"),
                ("half.test", "192.0.2.7 late"),
                ("poor.test", "192.0.2.8 failed"),
                ("long.test", "192.0.2.9 2001:db8::9"),
                // No question leaves the machine for these (RFC 6761).
                ("localhost", "127.0.0.1 ::1"),
                ("x.invalid", "- -"),
                // Numbers are no names, and no such name is known.
                ("192.0.2.1", "- -"),
            ] {
                assert_eq!(look_up(&resolver, text).await, expect, "{text}");
            }
            let looping = look_up(&resolver, "loop.test").await;
            assert!(["- -", "failed failed"].contains(&&*looping), "it ends: {looping}");
        })
        .await;
}

#[tokio::test]
async fn the_search_list_is_gone_through_as_the_system_does() {
    LocalSet::new()
        .run_until(async {
            let (server, asked) = nameserver(answer).await;
            let search = "search corp.test deep.test\noptions timeout:1 attempts:1\n";
            let more_dots = "search corp.test\noptions ndots:2\n";
            for (text, name, expect, questions) in [
                ("", "web", "- -", "web."),
                // As it is first, if it has a dot.
                (search, "both.test", "192.0.2.1,192.0.2.2 2001:db8::1", "both.test."),
                (search, "a.web", "192.0.2.11 -", "a.web. a.web.corp.test."),
                (search, "web", "192.0.2.10 -", "web.corp.test."),
                // The first with an address of either family is it.
                ("search deep.test corp.test\n", "web", "- 2001:db8::c", "web.deep.test."),
                (search, "local", "192.0.2.13 -", "local. local.corp.test. local.deep.test."),
                (search, "gone.test", "- -", "gone.test. gone.test.corp.test. gone.test.deep.test."),
                (search, "servfail.test", "192.0.2.12 -", "servfail.test. servfail.test.corp.test."),
                // Nobody said that there is no such name.
                (
                    search,
                    "refused.test",
                    "failed failed",
                    "refused.test. refused.test.corp.test. refused.test.deep.test.",
                ),
                (more_dots, "a.web", "192.0.2.11 -", "a.web.corp.test."),
                (more_dots, "four.test", "192.0.2.4 -", "four.test. four.test.corp.test."),
                ("options ndots:0\nsearch corp.test\n", "local", "192.0.2.13 -", "local."),
            ] {
                let resolver = resolver(text, &[server], 5 * SECOND);
                assert_eq!(look_up(&resolver, name).await, expect, "{text}{name}");
                let mut expect: Vec<String> = questions
                    .split_whitespace()
                    .flat_map(|name| [format!("{name} A"), format!("{name} AAAA")])
                    .collect();
                expect.sort();
                assert_eq!(asked.take(), expect, "{text}{name}");
            }
        })
        .await;
}

#[tokio::test]
async fn the_hosts_file_comes_first_by_family() {
    LocalSet::new()
        .run_until(async {
            let (server, asked) = nameserver(answer).await;
            let resolver = resolver("search corp.test\n", &[server], SECOND);
            resolver
                .set_hosts(Hosts::parse("10.0.0.1 both.test web\n10.0.0.1 all.test\n2001:db8::f all.test"));
            for (text, expect, questions) in [
                ("both.test", "10.0.0.1 2001:db8::1", "both.test. AAAA"),
                ("all.test", "10.0.0.1 2001:db8::f", ""),
                ("four.test", "192.0.2.4 -", "four.test. A,four.test. AAAA"),
                // By the name as it was said.
                ("web", "10.0.0.1 -", "web. AAAA,web.corp.test. AAAA"),
            ] {
                assert_eq!(look_up(&resolver, text).await, expect, "{text}");
                assert_eq!(asked.take().join(","), questions, "{text}");
            }
            resolver.set_hosts(Hosts::default());
            assert_eq!(look_up(&resolver, "all.test").await, "- -");
        })
        .await;
}

#[tokio::test]
async fn who_knows_is_found_and_what_was_answered_is_kept() {
    fn declines(question: &[u8], _: bool) -> Option<Vec<u8>> {
        let mut reply = Message::from_vec(question).unwrap();
        reply.metadata.message_type = MessageType::Response;
        reply.metadata.response_code = ResponseCode::Refused;
        Some(reply.to_vec().unwrap())
    }
    fn is_silent(_: &[u8], _: bool) -> Option<Vec<u8>> {
        None
    }
    const BOTH: &str = "192.0.2.1,192.0.2.2 2001:db8::1";
    LocalSet::new()
        .run_until(async {
            let (good, asked) = nameserver(answer).await;
            let (bad, _) = nameserver(declines).await;
            let (silent, _) = nameserver(is_silent).await;
            // Nobody listens there.
            let closed = StdUdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
            for (what, servers) in [
                ("declines", vec![bad, good]),
                ("is silent", vec![silent, good]),
                ("is closed", vec![closed, good]),
                ("three decline", vec![bad, bad, bad, good]),
                ("two are silent, one is closed", vec![silent, silent, closed, good]),
            ] {
                let resolver = resolver("options timeout:1\n", &servers, LIMIT);
                assert_eq!(look_up(&resolver, "both.test").await, BOTH, "{what}");
                asked.take();
                assert_eq!(look_up(&resolver, "both.test").await, BOTH, "{what}, again");
            }
            let resolver = resolver("", &[good], LIMIT);
            look_up(&resolver, "both.test").await;
            assert_eq!(asked.take().len(), 2);
            assert_eq!(look_up(&resolver, "both.test").await, BOTH);
            assert_eq!(asked.take().len(), 0, "it was kept");
            resolver.set_conf(ResolvConf { nameservers: vec![good], ..conf("options edns0\n") });
            look_up(&resolver, "both.test").await;
            assert_eq!(asked.take().len(), 2, "what another configuration found does not count");
            let everybody_declines = super::tests::resolver("", &[bad, bad], LIMIT);
            assert_eq!(look_up(&everybody_declines, "both.test").await, "failed failed");
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn silence_takes_ten_seconds_at_most_and_one_look_up_does_not_end_another() {
    LocalSet::new()
        .run_until(async {
            let silent = StdUdpSocket::bind("127.0.0.1:0").unwrap();
            let server = silent.local_addr().unwrap();
            for (text, expect) in [
                ("options timeout:30 attempts:5\nsearch a.test b.test c.test\n", LIMIT),
                // Three seconds, twice.
                ("options timeout:30 attempts:5\n", 6 * SECOND),
                ("options timeout:1 attempts:1\n", SECOND),
            ] {
                let resolver = resolver(text, &[server], LIMIT);
                let began = Instant::now();
                let asking = look_up(&resolver, "x.test");
                let meanwhile = async {
                    // A file changes: who is asking goes on.
                    tokio::time::sleep(SECOND / 2).await;
                    resolver.set_conf(conf("nameserver 192.0.2.1\n"));
                    resolver.set_hosts(Hosts::parse("10.0.0.1 x.test\n2001:db8::1 x.test"));
                    look_up(&resolver, "x.test").await
                };
                let (first, second) = tokio::join!(asking, meanwhile);
                assert_eq!((&*first, &*second), ("late late", "10.0.0.1 2001:db8::1"), "{text}");
                let took = began.elapsed();
                assert!(took >= expect && took < expect + SECOND, "{text}: {took:?}");
            }
            // Who finds no place is late, too.
            let resolver = resolver("", &[server], LIMIT);
            let places = u32::try_from(resolver.places.available_permits()).unwrap();
            let _all = resolver.places.acquire_many(places).await.unwrap();
            let began = Instant::now();
            assert_eq!(look_up(&resolver, "x.test").await, "late late");
            assert_eq!(began.elapsed().as_secs(), LIMIT.as_secs());
        })
        .await;
}
