//! The data plane on real devices, in network namespaces made for each test and gone with its thread.
//!
//! ```text
//!   namespace a                                                     namespace b
//!   100.64.0.1  tun-firezone -- workers -- 192.0.2.1 === veth === 192.0.2.2 -- workers -- tun-firezone  100.64.0.2
//!   fd00:2021:1111::1                                                                     fd00:2021:1111::2
//! ```
//!
//! The workers are [`pipe::Pipe`]s: no cryptography, one datagram per packet. Without root these tests say so and pass.

#![expect(clippy::cast_possible_truncation, reason = "patterns to fill packets with")]

mod fast;
mod interface;
mod life;
mod pipe;
mod sockets;
mod traffic;
mod xsk;

use std::{fs::File, process::Command as Process};

use gateway_proto::addr::TunnelAddrs;
use nix::sched::{CloneFlags, setns, unshare};

use self::pipe::Pipe;
use super::{BufferSizes, Capabilities, DataPlane, TUN_NAME, Wanted, fast as fast_path, udp};

const ALL: Capabilities = Capabilities::ALL;
const SIZES: BufferSizes = BufferSizes { recv: udp::RECV_BUFFER, send: udp::SEND_BUFFER };

/// Nothing but sockets.
const OFF: fast_path::Config = fast_path::Config { wanted: Wanted::Off, bpffs: None, clients: None };

/// Runs `test` in a network namespace of its own; says so if it cannot.
fn in_netns(test: impl Future<Output = ()> + Send) {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: making network namespaces and TUN devices needs root");
        return;
    }
    std::thread::scope(|scope| {
        let run = || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(test);
        };
        if let Err(panic) = scope.spawn(run).join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// A data plane of one worker around `pipe`.
fn start(pipe: &Pipe) -> DataPlane {
    start_several(1, pipe, ALL)
}

/// A data plane whose workers are like `pipe` and share its figures.
fn start_several(workers: usize, pipe: &Pipe, allowed: Capabilities) -> DataPlane {
    let core = |id| Pipe { id, workers, ..pipe.clone() };
    DataPlane::start_with(TUN_NAME, workers, SIZES, allowed, &OFF, core, |_, _| None).unwrap()
}

fn one<T>(of: anyhow::Result<Vec<T>>) -> T {
    of.unwrap().pop().expect("there is one")
}

async fn veth_between(a: &File, b: &File) {
    use std::os::fd::AsRawFd as _;
    setns(a, CloneFlags::CLONE_NEWNET).unwrap();
    let (connection, handle, _) = rtnetlink::new_connection().unwrap();
    let task = tokio::spawn(connection);
    handle.link().add(rtnetlink::LinkVeth::new("veth-a", "veth-b").build()).execute().await.unwrap();
    let to_b = rtnetlink::LinkUnspec::new_with_name("veth-b").setns_by_fd(b.as_raw_fd()).build();
    handle.link().change(to_b).execute().await.unwrap();
    task.abort();
    for (ns, name, v4, v6) in
        [(a, "veth-a", "192.0.2.1/24", "2001:db8::1/64"), (b, "veth-b", "192.0.2.2/24", "2001:db8::2/64")]
    {
        setns(ns, CloneFlags::CLONE_NEWNET).unwrap();
        ip(&format!("addr add {v4} dev {name}"));
        ip(&format!("addr add {v6} dev {name} nodad"));
        ip(&format!("link set {name} up"));
    }
}

/// `ethtool`, in the namespace of this thread.
fn ethtool(arguments: &str) {
    let output = Process::new("ethtool").args(arguments.split(' ')).output().expect("ethtool is installed");
    assert!(output.status.success(), "ethtool {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The output of `ip`, in the namespace of this thread; empty if it fails.
fn ip(arguments: &str) -> String {
    let output = Process::new("ip").args(arguments.split(' ')).output().expect("iproute2 is installed");
    if !output.status.success() {
        println!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    }
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn addrs(n: u8) -> TunnelAddrs {
    TunnelAddrs { v4: [100, 64, 0, n].into(), v6: [0xfd00, 0x2021, 0x1111, 0, 0, 0, 0, n.into()].into() }
}
