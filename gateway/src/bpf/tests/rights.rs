//! Which rights steering needs, seen by a process that has no others, and what is said where it is missing.

use std::{os::fd::AsFd as _, process::Command};

use aya::programs::XdpMode;
use gateway_proto::{ConnectionIndex, WorkerId};

use super::network::Network;
use crate::bpf::{Kernel, LeftOut};

const REFUSAL: &str = "no BPF rights: grant CAP_BPF";

#[test]
#[ignore = "needs root and the BPF object; `cargo xtask test` runs it"]
fn bpf_steering_needs_cap_bpf_and_nothing_else() {
    const ALONE: &str = "bpf::tests::rights::bpf_steering_loads_and_is_attached_with_the_rights_there_are";
    with_rights(
        ALONE,
        &[("-all,+bpf", None), ("-all,+net_admin,+bpf", None), ("-all,+net_admin", Some(REFUSAL))],
    );
}

#[test]
#[ignore = "needs root and the BPF object; `cargo xtask test` runs it"]
fn bpf_uplink_needs_three_rights_and_the_missing_one_is_named() {
    const ALONE: &str = "bpf::tests::rights::bpf_uplink_is_attached_with_the_rights_there_are";
    with_rights(
        ALONE,
        &[
            ("-all,+net_admin,+bpf,+perfmon", None),
            ("-all,+net_admin,+perfmon", Some(REFUSAL)),
            ("-all,+net_admin,+bpf", Some("the kernel's verifier refuses the programs: grant CAP_PERFMON")),
            // XSKS is refused then.
            ("-all,+bpf,+perfmon", Some("no BPF rights")),
        ],
    );
}

/// Runs a test of this program by itself, with each of these rights; what it must say, if it is to fail.
fn with_rights(test: &str, table: &[(&str, Option<&str>)]) {
    let network = Network::make().unwrap();
    for (rights, refusal) in table {
        let child = network.enter("receiver", || {
            let mut child = Command::new("setpriv");
            child.args(["--bounding-set", rights, "--inh-caps", rights]).arg(std::env::current_exe()?);
            Ok(child.args(["--exact", test, "--ignored", "--nocapture"]).output()?)
        });
        let child = child.unwrap();
        let (out, err) = (String::from_utf8_lossy(&child.stdout), String::from_utf8_lossy(&child.stderr));
        assert!(out.contains("running 1 test"), "{rights}: setpriv or the test did not start:\n{out}{err}");
        assert_eq!(child.status.success(), refusal.is_none(), "{rights}:\n{out}{err}");
        if let Some(refusal) = refusal {
            assert!(err.contains(refusal), "{rights}:\n{out}{err}");
        }
    }
}

#[test]
#[ignore = "needs root and the BPF object; `cargo xtask test` runs it"]
fn bpf_steering_loads_and_is_attached_with_the_rights_there_are() {
    let sockets = [(); 2].map(|()| {
        // Bound and never sent to, so it may be in any namespace.
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None).unwrap();
        socket.set_reuse_port(true).unwrap();
        socket
    });
    let any: std::net::SocketAddr = ([0; 4], 0).into();
    sockets[0].bind(&any.into()).unwrap();
    sockets[1].bind(&sockets[0].local_addr().unwrap()).unwrap();
    let mut steering = Kernel::steering().unwrap();
    steering.plane.attach_sockets(false, &sockets.each_ref().map(|socket| socket.as_fd())).unwrap();
    steering.owners.set_session(ConnectionIndex::new(7).unwrap(), WorkerId::new(1));
    steering.owners.set_tunnel([100, 64, 0, 7].into(), WorkerId::new(1));
    assert_eq!(steering.owners.left_out(), LeftOut::default());
}

/// In the namespace `receiver`; elsewhere there is no such device.
#[test]
#[ignore = "needs root and the BPF object; `cargo xtask test` runs it"]
fn bpf_uplink_is_attached_with_the_rights_there_are() {
    let mut kernel = Kernel::whole(None, None).unwrap();
    if !std::path::Path::new("/proc/thread-self/net/dev_snmp6/up0").exists() {
        return;
    }
    let link = kernel.plane.attach_uplink("up0", XdpMode::Driver).unwrap();
    assert!(kernel.enable(true).unwrap());
    kernel.plane.detach_uplink(link).unwrap();
}
