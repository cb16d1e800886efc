//! The fast path asks for no memory: batches in, datagrams out, on a real veth.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use gateway_common::Counters;
use gateway_proto::{Ecn, Route};

use super::{
    Bed, PAIRS, QUEUES, SIZES, address,
    redirect::{Mode, Redirect},
};
use crate::{
    count_allocations,
    data::{
        netns_tests::in_netns,
        xsk::{Board, Fast, FastPlace, Refused, Switch, Watch, Ways, datagrams},
    },
};

/// One turn as in `turn.rs`: what waits is received, and each datagram answered by `route`.
fn turn(fast: &mut Fast, route: &Route, drops: &mut Counters) -> usize {
    let mut received = 0;
    fast.begin_turn();
    fast.on_passed(false);
    for port in 0..fast.ports() {
        let mut waiting = fast.look(port);
        while waiting > 0 {
            let Some(batch) = fast.receive(port) else { break };
            waiting -= batch.len();
            fast.begin_batch();
            let refused = Refused::default();
            for datagram in datagrams(&batch, &refused) {
                received += 1;
                let len = datagram.payload.len();
                assert!(fast.prepare(route, len), "the way is known");
                fast.buffer().unwrap()[..len].copy_from_slice(datagram.payload);
                fast.commit(len);
            }
            refused.count(drops);
            fast.recycle(port, batch);
            fast.flush();
        }
    }
    fast.on_empty(false);
    fast.on_empty(true);
    fast.count_drops(drops);
    fast.end_turn();
    received
}

#[test]
fn xsk_turns_ask_for_no_memory() {
    in_netns(async {
        let bed = Bed::new();
        let redirect = Redirect::attach(bed.interface, Mode::Native).unwrap();
        let mut places = Vec::new();
        for queue in 0..QUEUES {
            let (_, mut ports) = bed.open(queue, 1, SIZES);
            redirect.set(queue, 0, ports[0].wire());
            places.push(FastPlace { interface: bed.interface, port: ports.remove(0) });
        }
        let board = Arc::new(Board::default());
        let watch = tokio::spawn(Watch::new(Arc::clone(&board), [bed.interface]).unwrap().run());
        let ways = Ways::new(Arc::clone(&board), 1, 1);
        let mut fast = Fast::new(0, places, ways, Arc::new(Switch::new(1))).unwrap();
        for (here, there) in PAIRS {
            let sender = bed.socket(there);
            let route =
                Route { src: Some(address(here, 0)), dst: sender.local_addr().unwrap(), ecn: Ecn::Ect0 };
            let deadline = Instant::now() + Duration::from_secs(5);
            while !fast.prepare(&route, 1) {
                assert!(Instant::now() < deadline, "no way to {there}");
                tokio::time::sleep(Duration::from_millis(5)).await;
                fast.begin_batch();
            }
            let mut drops = Counters::default();
            let (mut received, mut asked) = (0, 0);
            for round in 0..200 {
                for _ in 0..20 {
                    sender.send_to(&[7; 900], address(here, 0)).unwrap();
                }
                let before = count_allocations::so_far();
                received += turn(&mut fast, &route, &mut drops);
                // The first ones fill what is kept.
                if round > 2 {
                    asked += count_allocations::so_far() - before;
                }
            }
            assert!(received > 1000, "{received} of 4000");
            assert_eq!((asked, drops.iter().collect::<Vec<_>>()), (0, vec![]), "{received} datagrams");
        }
        let before = count_allocations::so_far();
        drop(std::hint::black_box(Box::new(1)));
        assert_eq!(count_allocations::so_far() - before, 1, "nothing is counted");
        watch.abort();
    });
}
