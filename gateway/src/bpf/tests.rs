//! The compiled object in a real kernel: one table of frames through user space's `classify` and through XDP.
//!
//! Ignored by default, because they need root and the object; `cargo xtask test` runs them where both are there. The
//! network is two namespaces that the test makes and removes:
//!
//! ```text
//!   [ sender ] far0 10.99.7.2, fd99:7::2 --- veth --- up0 10.99.7.1, fd99:7::1 [ receiver ]   XDP uplink on up0, native
//! ```

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use aya::programs::{TestRun as _, TestRunOptions, XdpMode};
use gateway_common::{FrameCount, FrameKind, classify, frame_table};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::{KernelPlane, built_in, uplink};

const XDP_PASS: u32 = 2;

fn object() -> &'static [u8] {
    built_in().expect("built without the BPF object; run `cargo xtask build-ebpf` first")
}

#[test]
#[ignore = "needs root and the BPF object; `cargo xtask test` runs it"]
fn bpf_counts_every_frame_of_the_table_as_user_space_does() {
    let mut plane = KernelPlane::load(object()).unwrap();
    let mut expect: BTreeMap<FrameKind, (u64, u64)> = BTreeMap::new();
    for sample in frame_table::all() {
        let mut out = vec![0; sample.bytes.len()];
        let before = plane.frame_counts().unwrap();
        let options = TestRunOptions {
            data_in: Some(&sample.bytes),
            data_out: Some(&mut out),
            ..TestRunOptions::new()
        };
        let result = uplink(&mut plane.ebpf).unwrap().test_run(options).unwrap();
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
    let mut plane = KernelPlane::load(object()).unwrap();
    let plane = network.enter("receiver", move || {
        plane.attach("up0", XdpMode::Driver)?;
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

#[test]
#[ignore = "needs root and the BPF object; `cargo xtask test` runs it"]
fn bpf_object_is_accepted_by_bpftool() {
    let folder = tempfile::tempdir().unwrap();
    let object_file = folder.path().join("firezone-gateway.o");
    std::fs::write(&object_file, object()).unwrap();
    let mount_point = folder.path().join("bpffs");
    std::fs::create_dir(&mount_point).unwrap();
    // A mount namespace of its own: the bpffs, and the program pinned in it, are gone when the shell is.
    const SCRIPT: &str = r#"mount -t bpf bpf "$2" && bpftool prog load "$1" "$2/uplink" && bpftool prog show pinned "$2/uplink""#;
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", SCRIPT, "sh"])
        .args([&object_file, &mount_point])
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "bpftool refuses the object:\n{out}{err}");
    assert!(out.contains("xdp") && out.contains("name uplink"), "{out}");
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

/// Two namespaces with a veth between them; removed when dropped.
struct Network {
    prefix: String,
}

impl Network {
    fn make() -> Result<Self> {
        let network = Self { prefix: format!("fz-bpf-{}", std::process::id()) };
        let (sender, receiver) = (network.namespace("sender"), network.namespace("receiver"));
        let sides = [(&receiver, "up0", 1, 2), (&sender, "far0", 2, 1)];
        ip(&format!("netns add {sender}"))?;
        ip(&format!("netns add {receiver}"))?;
        ip(&format!("-n {receiver} link add name up0 type veth peer name far0 netns {sender}"))?;
        for (namespace, name, own, _) in sides {
            ip(&format!("-n {namespace} link set {name} address 02:00:00:00:07:0{own} up"))?;
            ip(&format!("-n {namespace} address add 10.99.7.{own}/24 dev {name}"))?;
            ip(&format!("-n {namespace} address add fd99:7::{own}/64 dev {name} nodad"))?;
        }
        // Static neighbours: a queue in front of a neighbour look-up drops what a test sends in one go.
        for (namespace, name, _, other) in sides {
            for address in [format!("10.99.7.{other}"), format!("fd99:7::{other}")] {
                let hardware = format!("02:00:00:00:07:0{other}");
                ip(&format!("-n {namespace} neighbour replace {address} lladdr {hardware} dev {name}"))?;
            }
        }
        let deadline = Instant::now() + Duration::from_secs(5);
        while !std::str::from_utf8(&ip(&format!("-n {receiver} link show up0"))?)?.contains("state UP") {
            ensure!(Instant::now() < deadline, "the veth does not come up");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(network)
    }

    fn namespace(&self, name: &str) -> String {
        format!("{}-{name}", self.prefix)
    }

    /// Runs `work` on a thread inside a namespace; only the network is another one.
    fn enter<T: Send>(&self, name: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let file = std::fs::File::open(format!("/run/netns/{}", self.namespace(name)))?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                move_into_link_name_space(std::os::fd::AsFd::as_fd(&file), Some(LinkNameSpaceType::Network))?;
                work()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in ["sender", "receiver"] {
            // One that was never made cannot be removed.
            let _gone = ip(&format!("netns delete {}", self.namespace(name)));
        }
    }
}

fn ip(arguments: &str) -> Result<Vec<u8>> {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().context("cannot start ip")?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`ip {arguments}` failed: {error}");
    Ok(output.stdout)
}
