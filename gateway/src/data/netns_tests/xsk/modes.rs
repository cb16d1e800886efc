//! What real devices are like, and the mode that a veth gets.

use rtnetlink::Handle;

use super::{
    Bed, SIZES,
    redirect::{Mode as Attach, Redirect},
};
use crate::data::{
    netns_tests::{ethtool, in_netns, ip},
    xsk::{Facts, Mode, OpenError, Place, Refusal, Transfer, Wanted, facts, open, probe},
};

async fn of(handle: &Handle, name: &str) -> Facts {
    let index = ip(&format!("-o link show {name}")).split(':').next().unwrap().parse().unwrap();
    facts(handle, index).await.unwrap()
}

#[test]
fn xsk_facts_are_what_the_devices_are() {
    in_netns(async {
        let bed = Bed::new();
        let (connection, handle, _) = rtnetlink::new_connection().unwrap();
        let task = tokio::spawn(connection);
        let veth = of(&handle, "veth-a").await;
        let expect = Facts {
            name: "veth-a".to_owned(),
            index: bed.interface,
            ethernet: true,
            up: true,
            kind: Some("veth".to_owned()),
            enslaved: false,
            mtu: 1500,
            queues: 2,
            program: None,
            has_vlans: false,
            strips_vlan: veth.strips_vlan,
            merges: veth.merges,
        };
        assert_eq!(veth, expect);
        assert!(veth.strips_vlan.is_some(), "ethtool says it of a veth");
        let lo = of(&handle, "lo").await;
        assert!(!lo.ethernet && lo.kind.is_none(), "{lo:?}");

        ip("link add link veth-a name eth0.5 type vlan id 5");
        ip("link add br0 type bridge");
        ip("link add v0 type veth peer name v1");
        ip("link set v0 master br0");
        assert_eq!(of(&handle, "br0").await.kind.as_deref(), Some("bridge"));
        assert!(of(&handle, "v0").await.enslaved && !of(&handle, "v1").await.enslaved);
        if ip("-o link show eth0.5").is_empty() {
            eprintln!("skipped: VLANs on a device (this kernel has none)");
        } else {
            assert_eq!(of(&handle, "eth0.5").await.kind.as_deref(), Some("vlan"));
            let with_vlan = of(&handle, "veth-a").await;
            assert_eq!(veth.change(&with_vlan), Some("its VLANs have changed"));
            ip("link del eth0.5");
        }
        for (gro, merges) in [("on", true), ("off", false)] {
            ethtool(&format!("-K veth-a gro {gro}"));
            assert_eq!(of(&handle, "veth-a").await.merges, merges);
        }
        let veth = Facts { merges: false, ..veth };
        for (change, expect) in [
            ("link set veth-a mtu 1400", Some("its MTU has changed")),
            ("link set veth-a mtu 1500", None),
            ("link set veth-a down", Some("its link is down")),
            ("link set veth-a up", None),
        ] {
            ip(change);
            assert_eq!(veth.change(&of(&handle, "veth-a").await), expect, "{change}");
        }
        assert!(facts(&handle, 9999).await.is_err());
        task.abort();
    });
}

#[test]
fn xsk_veth_gets_nothing_by_itself_and_what_it_can_if_it_is_told() {
    in_netns(async {
        let bed = Bed::new();
        let (connection, handle, _) = rtnetlink::new_connection().unwrap();
        let task = tokio::spawn(connection);
        let try_mode = |mode: Mode| {
            let attach = if mode == Mode::Generic { Attach::Generic } else { Attach::Native };
            let transfer = if mode == Mode::ZeroCopy { Transfer::ZeroCopy } else { Transfer::Copy };
            let redirect =
                Redirect::attach(bed.interface, attach).map_err(|e| Refusal::Mode(e.to_string()))?;
            let place = Place { interface: bed.interface, queue: 0, transfer };
            // A machine that is busy takes its time to let go of a queue.
            let sockets =
                (0..10).map(|_| open(place, 1, SIZES)).find(|r| !matches!(r, Err(OpenError::Taken(_))));
            Ok((redirect, sockets.expect("the queue is free").map_err(Refusal::from)?))
        };
        let attempt = |mode| try_mode(mode).map(drop);
        let table = [
            (Wanted::Auto, "off (veth-a is a veth device, whose own offloads are faster)"),
            (
                Wanted::Exactly(Mode::ZeroCopy),
                "off (not native with zero-copy: the driver has no zero-copy mode for AF_XDP)",
            ),
            (Wanted::Exactly(Mode::Native), "native"),
            (Wanted::Exactly(Mode::Generic), "generic"),
        ];
        for (wanted, expect) in table {
            let facts = Facts { merges: false, ..of(&handle, "veth-a").await };
            assert_eq!(probe(wanted, &facts, attempt).to_string(), expect, "{wanted:?}");
        }
        // As if it were a NIC: every step is taken.
        let nic = Facts { kind: None, merges: false, ..of(&handle, "veth-a").await };
        let mut steps = Vec::new();
        let outcome = probe(Wanted::Auto, &nic, |mode| {
            steps.push(mode);
            if mode == Mode::Native { Err(Refusal::Mode("a test".to_owned())) } else { attempt(mode) }
        });
        assert_eq!(
            (outcome.mode, steps),
            (Some(Mode::Generic), vec![Mode::ZeroCopy, Mode::Native, Mode::Generic])
        );

        // Somebody else's program is left where it is.
        let other = Redirect::attach(bed.interface, Attach::Native).unwrap();
        let facts = of(&handle, "veth-a").await;
        let text = probe(Wanted::Exactly(Mode::Native), &facts, attempt).to_string();
        assert!(text.starts_with("off (another XDP program (id "), "{text}");
        drop(other);
        assert_eq!(of(&handle, "veth-a").await.program, None);
        task.abort();
    });
}
