//! All servers together, on loopback.

use std::net::UdpSocket;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::{upstream::framed, *};

/// 127.0.53.`last`, on a port that nobody else has there.
fn address(last: u8, port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 53, last], port))
}

fn free_port() -> u16 {
    UdpSocket::bind((std::net::Ipv4Addr::from([127, 0, 53, 99]), 0)).unwrap().local_addr().unwrap().port()
}

async fn asks_tcp(stream: &mut TcpStream) -> bool {
    let query = framed(&forward::tests::query(None).with_id(1));
    stream.write_all(&query).await.is_ok() && stream.read_u16().await.is_ok_and(|length| length == 32)
        // The answer, so that the next length is where it is expected.
        && stream.read_exact(&mut [0; 32]).await.is_ok()
}

async fn asks_udp(server: SocketAddr) -> bool {
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(server).await.unwrap();
    socket.send(&forward::tests::query(None).with_id(7)).await.unwrap();
    let mut answer = [0; 512];
    matches!(
        tokio::time::timeout(Duration::from_secs(2), socket.recv(&mut answer)).await,
        Ok(Ok(32)) if answer[..2] == [0, 7]
    )
}

#[tokio::test]
async fn what_did_not_change_is_not_touched() {
    LocalSet::new()
        .run_until(async {
            let port = free_port();
            let [one, two, three] = [1, 2, 3].map(|last| address(last, port));
            let mut servers = Servers::new(Forwarder::new(None, Arc::default()), BTreeSet::new());
            servers.listen(&BTreeSet::from([one, two])).await.unwrap();
            let mut to_one = TcpStream::connect(one).await.unwrap();
            let mut to_two = TcpStream::connect(two).await.unwrap();
            assert!(asks_tcp(&mut to_one).await && asks_tcp(&mut to_two).await);
            assert!(asks_udp(one).await && asks_udp(two).await);
            // The same again.
            servers.listen(&BTreeSet::from([two, one])).await.unwrap();
            assert!(asks_tcp(&mut to_one).await && asks_tcp(&mut to_two).await);
            // Another instead of the first.
            servers.listen(&BTreeSet::from([two, three])).await.unwrap();
            assert!(!asks_tcp(&mut to_one).await && asks_tcp(&mut to_two).await);
            assert!(!asks_udp(one).await && asks_udp(two).await && asks_udp(three).await);
            // And back: the address is free at once, whatever became of its connections.
            servers.listen(&BTreeSet::from([one])).await.unwrap();
            assert!(asks_udp(one).await && !asks_udp(two).await);
        })
        .await;
}

#[tokio::test]
async fn an_address_that_comes_late_is_waited_for_and_one_that_is_not_there_is_named() {
    LocalSet::new()
        .run_until(async {
            let port = free_port();
            let (free, taken) = (address(4, port), address(5, port));
            let holder = UdpSocket::bind(taken).unwrap();
            let mut servers = Servers::new(Forwarder::new(None, Arc::default()), BTreeSet::new());
            let both = BTreeSet::from([free, taken]);
            let later = async {
                tokio::time::sleep(BIND_PAUSE * 3 / 2).await;
                drop(holder);
            };
            let (result, ()) = tokio::join!(servers.listen(&both), later);
            result.unwrap();
            assert!(asks_udp(taken).await);

            // TEST-NET-1 is no address of this machine.
            let nowhere = SocketAddr::from(([192, 0, 2, 1], port));
            let error = servers.listen(&BTreeSet::from([nowhere])).await.unwrap_err().to_string();
            assert!(error.starts_with(&format!("Cannot listen on {nowhere} over UDP: ")), "{error}");
        })
        .await;
}

#[tokio::test]
async fn a_server_that_died_comes_back() {
    LocalSet::new()
        .run_until(async {
            let own = address(6, free_port());
            let mut servers = Servers::new(Forwarder::new(None, Arc::default()), BTreeSet::new());
            let stats = Arc::clone(&servers.forwarder.stats);
            assert!(!stats.listening.holds());
            servers.listen(&BTreeSet::from([own])).await.unwrap();
            assert!(stats.listening.holds());
            servers.revive();
            assert_eq!((servers.udp.len(), servers.tcp.len()), (1, 1), "nothing to do");
            servers.udp.remove(0).close().await;
            servers.tcp.remove(0).close().await;
            assert!(!asks_udp(own).await);
            servers.revive();
            assert!(asks_udp(own).await);
            assert!(asks_tcp(&mut TcpStream::connect(own).await.unwrap()).await);
        })
        .await;
}

#[tokio::test]
async fn further_addresses_are_served_when_they_come_and_outlive_the_tunnels() {
    LocalSet::new()
        .run_until(async {
            let port = free_port();
            let [own, here, late] = [7, 8, 9].map(|last| address(last, port));
            let holder = UdpSocket::bind(late).unwrap();
            let mut servers =
                Servers::new(Forwarder::new(None, Arc::default()), BTreeSet::from([here, late]));
            servers.revive();
            assert_eq!(servers.missing, BTreeSet::from([late]));
            let mut to_here = TcpStream::connect(here).await.unwrap();
            assert!(asks_udp(here).await && asks_tcp(&mut to_here).await);
            // What the operator asked for must not depend on the tunnel's addresses, nor these on it.
            servers.listen(&BTreeSet::from([own])).await.unwrap();
            assert!(asks_udp(own).await);
            drop(holder);
            servers.revive();
            assert_eq!(servers.missing, BTreeSet::new());
            servers.listen(&BTreeSet::new()).await.unwrap();
            assert!(asks_udp(late).await && !asks_udp(own).await && asks_tcp(&mut to_here).await);
            assert!(!servers.forwarder.stats.listening.holds(), "none of the tunnel's is served");
        })
        .await;
}

#[tokio::test]
async fn look_ups_go_by_the_files_as_they_are_now() {
    let folder = tempfile::tempdir().unwrap();
    let (conf, hosts) = (folder.path().join("resolv.conf"), folder.path().join("hosts"));
    let replace = |file: &Path, text: &str| {
        let new = folder.path().join("new");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, file).unwrap();
    };
    let (forwarder, resolver) =
        (Forwarder::new(None, Arc::default()), Arc::new(Resolver::new(None, Duration::from_secs(1))));
    let mut files = Files::new(&conf, &hosts);
    // There are none yet.
    files.look(&forwarder, &resolver);
    let found = |v4: [u8; 4], v6: &str| Resolved {
        v4: Lookup::Answer(vec![v4.into()]),
        v6: Lookup::Answer(vec![v6.parse().unwrap()]),
    };
    let name = DomainName::parse("git.test").unwrap();
    LocalSet::new()
        .run_until(async {
            for last in [1, 2] {
                // The same length twice.
                replace(&hosts, &format!("10.0.0.{last} git.test\n2001:db8::{last} git.test\n"));
                replace(&conf, &format!("nameserver 192.0.2.{last}\n"));
                files.look(&forwarder, &resolver);
                let (sender, mut results) = mpsc::unbounded_channel();
                look_up(Arc::clone(&resolver), name.clone(), Rc::clone(&forwarder), sender).await;
                let expect = found([10, 0, 0, last], &format!("2001:db8::{last}"));
                assert_eq!(results.recv().await, Some((name.clone(), expect)));
                assert_eq!(results.recv().await, None, "one answer");
                let server = SocketAddr::from(([192, 0, 2, last], 53));
                assert_eq!((forwarder.nameservers(), resolver.nameservers()), (vec![server], vec![server]));
            }
            // A file that is away for a moment changes nothing, one without nameservers names this machine's.
            std::fs::remove_file(&conf).unwrap();
            files.look(&forwarder, &resolver);
            assert_eq!(resolver.nameservers(), forwarder.nameservers());
            assert_eq!(resolver.nameservers(), [SocketAddr::from(([192, 0, 2, 2], 53))]);
            replace(&conf, "options edns0\n");
            files.look(&forwarder, &resolver);
            assert_eq!(resolver.nameservers(), forwarder.nameservers());
            assert_eq!(resolver.nameservers(), [SocketAddr::from(([127, 0, 0, 1], 53))]);
        })
        .await;
}

#[tokio::test]
async fn look_ups_are_counted_by_how_they_end() {
    // A limit that nobody can keep; the hosts file needs no time.
    let (forwarder, resolver) =
        (Forwarder::new(None, Arc::default()), Arc::new(Resolver::new(None, Duration::ZERO)));
    resolver.set_hosts(Hosts::parse("10.0.0.1 git.test\n2001:db8::1 git.test\n"));
    LocalSet::new()
        .run_until(async {
            let (sender, mut results) = mpsc::unbounded_channel();
            for text in ["git.test", "slow.test"] {
                let name = DomainName::parse(text).unwrap();
                look_up(Arc::clone(&resolver), name, Rc::clone(&forwarder), sender.clone()).await;
            }
            let (_, slow) = (results.recv().await.unwrap(), results.recv().await.unwrap().1);
            assert_eq!(slow, Resolved { v4: Lookup::TimedOut, v6: Lookup::TimedOut });
            let counts = [Count::LookUps, Count::LookUpsFailed, Count::LookUpsTimedOut];
            assert_eq!(counts.map(|count| forwarder.stats.get(count)), [2, 0, 1]);
        })
        .await;
}

#[tokio::test]
async fn the_thread_answers_each_name_once_and_says_when_it_ends() {
    // Of this machine's files; nobody is asked for these (RFC 6761), so that nothing is sent and no right is needed.
    let (handle, mut look_ups) = start(crate::data::MARK, BTreeSet::new(), Arc::default()).unwrap();
    let names = ["localhost", "a.localhost", "b.localhost"].map(|name| DomainName::parse(name).unwrap());
    names.iter().for_each(|name| look_ups.resolve(name.clone()));
    let mut answered = Vec::new();
    for _ in &names {
        let (name, Resolved { v4, v6 }) =
            tokio::time::timeout(Duration::from_secs(20), look_ups.recv()).await.unwrap().unwrap();
        let Lookup::Answer(v4) = v4 else { panic!("{name}: {v4:?}, {v6:?}") };
        assert!(!v4.is_empty() && v4.iter().all(|ip| ip.is_loopback()), "{name}: {v4:?}");
        answered.push(name);
    }
    answered.sort();
    let mut expect = names.to_vec();
    expect.sort();
    assert_eq!(answered, expect);
    handle.close().await;
    assert_eq!(tokio::time::timeout(Duration::from_secs(20), look_ups.recv()).await.unwrap(), None);
    look_ups.resolve(names[0].clone());
}
