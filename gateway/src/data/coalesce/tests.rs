//! Tests of the coalescer: what was merged is split again and compared; the kernel's refusals.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
};

use rand::{Rng as _, SeedableRng as _, rngs::SmallRng, seq::IndexedRandom as _};

use super::{
    super::{split::Reader, test_packets::Spec},
    *,
};

const ALL: Offloads = Offloads { vnet: true, uso: true };

#[test]
fn splitting_what_was_merged_gives_every_flow_its_packets_in_order() {
    for seed in 0..40 {
        for refuse in [false, true] {
            let packets = random_traffic(seed);
            let tun = FakeTun { refuse_merged: refuse, ..FakeTun::new(ALL) };
            let drops = write(&tun, &packets);
            let got = tun.split();
            assert_eq!(by_flow(&got), by_flow(&packets), "seed {seed}, refuse {refuse}");
            assert_eq!(drops, Counters::default());
        }
    }
}

#[test]
fn sixty_interleaved_flows_are_one_write_each() {
    let mut packets = Vec::new();
    for round in 0..3u32 {
        for flow in 0..60 {
            let seq = 1000 + round * 1000;
            packets.push(
                Spec { flow, seq, v6: flow % 2 == 0, payload: vec![round as u8; 1000], ..Spec::default() }
                    .build(),
            );
        }
    }
    let tun = FakeTun::new(ALL);
    write(&tun, &packets);
    assert_eq!(tun.writes.borrow().len(), 60);
    assert_eq!(by_flow(&tun.split()), by_flow(&packets));
}

#[test]
fn merging_follows_the_table() {
    type Change = fn(&mut Spec);
    // Two packets of 100 bytes each; the change is made to the second. Expected: number of writes.
    let table: &[(&str, Change, usize)] = &[
        ("in order", |_| {}, 1),
        ("a gap", |s| s.seq += 1, 2),
        ("a repetition", |s| s.seq -= 100, 2),
        ("another acknowledgment", |s| s.ack += 1, 2),
        ("another window", |s| s.window += 1, 2),
        ("another option", |s| s.options[11] = 9, 2),
        ("no options", |s| s.options.clear(), 2),
        ("another TOS", |s| s.tos = 3, 2),
        ("another TTL", |s| s.ttl = 3, 2),
        ("without DF", |s| s.df = false, 2),
        ("with DF, any identification", |s| s.id = 9999, 1),
        ("FIN", |s| s.flags = 0x11, 2),
        ("SYN", |s| s.flags = 0x12, 2),
        ("RST", |s| s.flags = 0x14, 2),
        ("URG", |s| s.flags = 0x30, 2),
        ("ECE", |s| s.flags = 0x50, 2),
        ("CWR", |s| s.flags = 0x90, 2),
        ("PSH", |s| s.flags = 0x18, 1),
        ("no payload", |s| s.payload.clear(), 2),
        ("a shorter payload", |s| s.payload.truncate(1), 1),
        ("a longer payload", |s| s.payload.push(1), 2),
        ("another flow", |s| s.flow = 2, 2),
    ];
    for v6 in [false, true] {
        for (name, change, writes) in table {
            if v6 && name.contains("DF") {
                continue;
            }
            let first = Spec { v6, ..Spec::default() };
            let mut second = Spec { seq: first.seq + 100, id: first.id + 1, ..first.clone() };
            change(&mut second);
            let tun = FakeTun::new(ALL);
            let packets = [first.build(), second.build()];
            write(&tun, &packets);
            assert_eq!(tun.writes.borrow().len(), *writes, "{name}, v6 {v6}");
            assert_eq!(by_flow(&tun.split()), by_flow(&packets), "{name}, v6 {v6}");
        }
    }
}

#[test]
fn packet_that_cannot_join_ends_what_later_ones_may_join() {
    let at = |seq| Spec { seq, ..Spec::default() };
    let fin = Spec { flags: 0x11, payload: vec![], ..at(1100) };
    let tun = FakeTun::new(ALL);
    let packets = [at(1000).build(), fin.build(), at(1100).build()];
    write(&tun, &packets);
    assert_eq!(tun.split(), packets, "the data stays behind the FIN");
}

#[test]
fn wrong_checksum_is_never_hidden_in_a_super_packet() {
    for (bad, in_ip) in [(0, false), (1, false), (2, false), (0, true), (1, true), (2, true)] {
        let mut packets: Vec<_> = (0u16..3)
            .map(|i| Spec { id: i, seq: 1000 + u32::from(i) * 100, ..Spec::default() }.build())
            .collect();
        let at = if in_ip { 10 } else { packets[bad].len() - 1 };
        packets[bad][at] ^= 1;
        let tun = FakeTun::new(ALL);
        write(&tun, &packets);
        assert_eq!(tun.split(), packets, "packet {bad}");
    }
    let mut none = Spec { tcp: false, ..Spec::default() }.build();
    none[26..28].fill(0);
    let tun = FakeTun::new(ALL);
    write(&tun, &[none.clone(), none.clone()]);
    assert_eq!(tun.split(), [none.clone(), none]);
}

#[test]
fn refused_super_packet_loses_nothing_and_merging_rests() {
    let packets: Vec<_> = (0..4).map(|i| Spec { seq: 1000 + i * 100, ..Spec::default() }.build()).collect();
    let tun = FakeTun { refuse_merged: true, ..FakeTun::new(ALL) };
    let mut writer = Writer::new(&tun);
    let (now, mut drops) = (Instant::now(), Counters::default());
    for (at, refused) in [(now, 1), (now, 0), (now + REST, 1)] {
        tun.writes.borrow_mut().clear();
        tun.refused.set(0);
        put(&mut writer, &packets, at, &mut drops);
        writer.flush(at, &mut drops);
        assert!(writer.is_empty());
        assert_eq!(tun.split(), packets);
        assert_eq!(tun.refused.get(), refused);
    }
    assert_eq!(drops, Counters::default());
}

#[test]
fn device_without_offloads_gets_plain_packets() {
    for (offloads, writes) in
        [(Offloads { vnet: false, uso: false }, 4), (Offloads { vnet: true, uso: false }, 3), (ALL, 2)]
    {
        let tcp = |seq| Spec { seq, ..Spec::default() }.build();
        let udp = Spec { tcp: false, ..Spec::default() }.build();
        let packets = [tcp(1000), tcp(1100), udp.clone(), udp];
        let tun = FakeTun::new(offloads);
        write(&tun, &packets);
        assert_eq!(tun.writes.borrow().len(), writes, "{offloads:?}");
        assert_eq!(by_flow(&tun.split()), by_flow(&packets), "{offloads:?}");
    }
}

#[test]
fn kernel_errors_are_counted_per_packet() {
    for (errno, reason) in [(libc::EIO, DropReason::TunWrite), (libc::EAGAIN, DropReason::Backpressure)] {
        let tun = FakeTun { refuse_all: Some(errno), ..FakeTun::new(ALL) };
        let packets: Vec<_> =
            (0..4).map(|i| Spec { seq: 1000 + i * 100, ..Spec::default() }.build()).collect();
        assert_eq!(write(&tun, &packets).get(reason), 4);
    }
}

#[test]
fn reservation_is_forgotten_by_the_next_and_too_long_ones_are_refused() {
    let tun = FakeTun::new(ALL);
    let (mut writer, now, mut drops) = (Writer::new(&tun), Instant::now(), Counters::default());
    writer.reserve(100, now, &mut drops).unwrap().fill(0xee);
    let packet = Spec::default().build();
    put(&mut writer, std::slice::from_ref(&packet), now, &mut drops);
    writer.commit(50, now);
    assert!(writer.reserve(MAX_LEN + 1, now, &mut drops).is_none());
    writer.commit(50, now);
    assert!(writer.reserve(MAX_LEN, now, &mut drops).unwrap().len() >= MAX_LEN);
    writer.flush(now, &mut drops);
    assert_eq!(tun.split(), [packet]);
}

fn write(tun: &FakeTun, packets: &[Vec<u8>]) -> Counters {
    let (mut writer, mut drops) = (Writer::new(tun), Counters::default());
    put(&mut writer, packets, Instant::now(), &mut drops);
    writer.flush(Instant::now(), &mut drops);
    drops
}

fn put(writer: &mut Writer<&FakeTun>, packets: &[Vec<u8>], now: Instant, drops: &mut Counters) {
    for packet in packets {
        writer.reserve(packet.len(), now, drops).unwrap()[..packet.len()].copy_from_slice(packet);
        writer.commit(packet.len(), now);
    }
}

/// Many flows, mostly bulk data, with everything that interrupts it.
fn random_traffic(seed: u64) -> Vec<Vec<u8>> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut flows: Vec<Spec> = (0..rng.random_range(1..=60))
        .map(|flow| Spec {
            v6: rng.random(),
            tcp: rng.random_bool(0.7),
            df: rng.random(),
            flow,
            seq: rng.random(),
            options: if rng.random() { vec![1; 12] } else { vec![] },
            ..Spec::default()
        })
        .collect();
    let mut packets = Vec::new();
    for _ in 0..rng.random_range(1..1500) {
        let at = rng.random_range(0..flows.len());
        let spec = &mut flows[at];
        let len = *[1200, 1200, 1200, 1200, 1200, 1199, 1, 0, 600].choose(&mut rng).unwrap();
        spec.payload = (0..len).map(|_| rng.random()).collect();
        spec.flags = *[0x10, 0x10, 0x10, 0x10, 0x10, 0x10, 0x18, 0x11, 0x02].choose(&mut rng).unwrap();
        match rng.random_range(0..40) {
            0 => spec.ack = spec.ack.wrapping_add(1),
            1 => spec.seq = spec.seq.wrapping_add(1),
            2 => spec.window ^= 1,
            3 => spec.tos ^= 3,
            4 => spec.id = rng.random(),
            _ => {}
        }
        let mut packet = spec.build();
        spec.seq = spec.seq.wrapping_add(len as u32);
        spec.id = spec.id.wrapping_add(1);
        match rng.random_range(0..60) {
            // A wrong transport checksum.
            0 if len > 0 => *packet.last_mut().unwrap() ^= 0x55,
            // ICMP, IGMP, whatever is no flow.
            1 => packet = vec![0x45, 1, 2, 3, rng.random()],
            // A fragment.
            2 if packet[0] == 0x45 => packet[6] |= 0x20,
            _ => {}
        }
        packets.push(packet);
    }
    packets
}

/// Packets by flow; those without one stay in order among themselves. Identifications of DF packets mean nothing.
fn by_flow(packets: &[Vec<u8>]) -> HashMap<Vec<u8>, Vec<Vec<u8>>> {
    let mut flows: HashMap<_, Vec<_>> = HashMap::new();
    for packet in packets {
        let mut packet = packet.clone();
        let key = match Layout::of(&packet) {
            Some(layout) => {
                if !layout.v6 && packet[6] & 0x40 != 0 {
                    packet[4..6].fill(0);
                    packet[10..12].fill(0);
                }
                let mut key = layout.addresses(&packet).to_vec();
                key.extend([layout.transport.number(), u8::from(layout.v6)]);
                key.extend(&packet[layout.l4..layout.l4 + 4]);
                key
            }
            None => Vec::new(),
        };
        flows.entry(key).or_default().push(packet);
    }
    flows
}

/// A device that remembers what was written to it, and hands it back as super-packets.
struct FakeTun {
    offloads: Offloads,
    refuse_merged: bool,
    refuse_all: Option<i32>,
    writes: RefCell<Vec<Vec<u8>>>,
    /// Super-packets refused.
    refused: Cell<usize>,
}

impl FakeTun {
    fn new(offloads: Offloads) -> Self {
        Self {
            offloads,
            refuse_merged: false,
            refuse_all: None,
            writes: RefCell::default(),
            refused: Cell::default(),
        }
    }

    fn split(&self) -> Vec<Vec<u8>> {
        let writes = self.writes.borrow();
        let mut writes = writes.iter();
        let (mut reader, mut drops) = (Reader::new(self.offloads.vnet), Counters::default());
        let mut packets = Vec::new();
        loop {
            let read = |buffer: &mut [u8]| {
                let write = writes.next().ok_or(io::ErrorKind::WouldBlock)?;
                buffer[..write.len()].copy_from_slice(write);
                Ok(write.len())
            };
            let more = reader.fill(read, &mut drops).unwrap();
            packets.extend(reader.packets().map(|p| p.to_vec()));
            if !more {
                assert_eq!(drops, Counters::default());
                return packets;
            }
        }
    }
}

impl Device for &FakeTun {
    fn write(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        if let Some(errno) = self.refuse_all {
            return Err(io::Error::from_raw_os_error(errno));
        }
        if self.refuse_merged && parts.len() > 1 {
            self.refused.set(self.refused.get() + 1);
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let write: Vec<u8> = parts.iter().flat_map(|part| part.to_vec()).collect();
        assert!(write.len() <= virtio::LEN + MAX_LEN);
        self.writes.borrow_mut().push(write);
        Ok(())
    }

    fn offloads(&self) -> Offloads {
        self.offloads
    }
}
