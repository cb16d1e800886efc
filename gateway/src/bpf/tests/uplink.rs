//! One table of frames through user space's `classify` and through XDP, which is attached to `up0`, native.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use aya::programs::{TestRun as _, TestRunOptions, XdpMode};
use gateway_common::{FrameCount, FrameKind, classify, frame_table};

use super::{network::Network, object};
use crate::bpf::{KernelPlane, uplink};

fn plane() -> KernelPlane {
    let mut plane = KernelPlane::open(object()).unwrap();
    plane.load_uplink().unwrap();
    plane
}

const XDP_PASS: u32 = 2;

#[test]
#[ignore = "needs root and the BPF object; `cargo xtask test` runs it"]
fn bpf_counts_every_frame_of_the_table_as_user_space_does() {
    let mut plane = plane();
    let mut expect: BTreeMap<FrameKind, (u64, u64)> = BTreeMap::new();
    for sample in frame_table::all() {
        let mut out = vec![0; sample.bytes.len()];
        let before = plane.frame_counts().unwrap();
        let options = TestRunOptions {
            data_in: Some(&sample.bytes),
            data_out: Some(&mut out),
            ..TestRunOptions::new()
        };
        let result = uplink::program(&mut plane.ebpf).unwrap().test_run(options).unwrap();
        assert_eq!(result.return_value, XDP_PASS, "verdict for {}", sample.name);
        assert_eq!(out, sample.bytes, "{} was changed", sample.name);
        let counted = difference(&before, &plane.frame_counts().unwrap());
        let bytes = u64::try_from(sample.bytes.len()).unwrap();
        assert_eq!(counted, BTreeMap::from([(sample.kind, (1, bytes))]), "{}", sample.name);
        let sum = expect.entry(sample.kind).or_default();
        *sum = (sum.0 + 1, sum.1 + bytes);
    }
    let zero: Vec<_> = FrameKind::ALL.iter().map(|kind| (*kind, FrameCount::default())).collect();
    assert_eq!(difference(&zero, &plane.frame_counts().unwrap()), expect);
}

#[test]
#[ignore = "needs root and the BPF object; `cargo xtask test` runs it"]
fn bpf_counts_datagrams_of_real_sockets_on_a_veth() {
    let network = Network::make().unwrap();
    let mut plane = plane();
    let plane = network.enter("receiver", move || {
        plane.attach_uplink("up0", XdpMode::Driver)?;
        Ok(plane)
    });
    let plane = plane.unwrap();
    let before = plane.frame_counts().unwrap();

    let mut payloads: Vec<_> = frame_table::all().into_iter().filter_map(|sample| sample.payload).collect();
    payloads.dedup();
    let mut expect: BTreeMap<FrameKind, u64> = BTreeMap::new();
    for payload in &payloads {
        *expect.entry(classify(payload).into()).or_default() += 2;
    }
    let received = network.enter("receiver", || {
        let sockets = [receiver(Ipv4Addr::UNSPECIFIED.into())?, receiver(Ipv6Addr::UNSPECIFIED.into())?];
        network.enter("sender", || send(&payloads))?;
        for socket in sockets {
            for payload in &payloads {
                let mut buffer = [0; 2048];
                let (length, _) = socket.recv_from(&mut buffer).context("a datagram did not pass XDP")?;
                ensure!(buffer[..length] == **payload, "a datagram was changed: {:02x?}", &buffer[..length]);
            }
        }
        Ok(())
    });
    received.unwrap();

    // Neighbour discovery and the like may be seen too; none of it is UDP.
    let wanted = |kind: &FrameKind| *kind >= FrameKind::Stun;
    let counted: BTreeMap<_, _> = difference(&before, &plane.frame_counts().unwrap())
        .into_iter()
        .filter(|(kind, _)| wanted(kind))
        .map(|(kind, (packets, _))| (kind, packets))
        .collect();
    assert_eq!(counted, expect);
}

/// Packets and bytes counted between the two, of the kinds that were counted at all.
fn difference(
    before: &[(FrameKind, FrameCount)],
    after: &[(FrameKind, FrameCount)],
) -> BTreeMap<FrameKind, (u64, u64)> {
    let pairs = before.iter().zip(after);
    pairs
        .map(|((kind, old), (_, new))| (*kind, (new.packets - old.packets, new.bytes - old.bytes)))
        .filter(|(_, counted)| *counted != (0, 0))
        .collect()
}

const PORT: u16 = 52625;

fn receiver(address: IpAddr) -> Result<UdpSocket> {
    let domain = if address.is_ipv4() { socket2::Domain::IPV4 } else { socket2::Domain::IPV6 };
    let socket = socket2::Socket::new(domain, socket2::Type::DGRAM, None)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&SocketAddr::new(address, PORT).into())?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    Ok(socket.into())
}

fn send(payloads: &[Vec<u8>]) -> Result<()> {
    for (from, to) in [("10.99.7.2:0", "10.99.7.1"), ("[fd99:7::2]:0", "fd99:7::1")] {
        let socket = UdpSocket::bind(from)?;
        for payload in payloads {
            socket.send_to(payload, SocketAddr::new(to.parse()?, PORT))?;
        }
    }
    Ok(())
}
