//! A byte ring from one worker to another: one thread writes, one reads, nobody waits and nothing is allocated.
//!
//! ```text
//!            head (reader)          published (writer)   tail (writer, private)
//!              v                         v                  v
//!   |..........[head|bytes][head|bytes]..[head|bytes]........|~~~~ slack ~~~~|
//!   0                                                    capacity
//! ```
//!
//! Positions only grow; where a record begins is its position modulo the capacity. A record that begins before the
//! capacity may end behind it, in the slack: so every record is one piece, and the next begins at 0. What is written is
//! seen once it is published, one release-store for a batch; room is free again once it is released.

#![expect(unsafe_code, reason = "two threads share bytes without a lock")]

use std::{
    cell::UnsafeCell,
    mem::MaybeUninit,
    net::SocketAddr,
    slice,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use gateway_proto::{Datagram, Ecn, Handover, Passed};

/// The longest datagram or packet, in bytes.
const LONGEST: usize = 65_536;
/// Bytes that records are aligned to.
const UNIT: usize = align_of::<Unit>();
/// Bytes in front of what a record carries.
const HEAD: usize = size_of::<Head>().next_multiple_of(UNIT);
/// What may lie behind the capacity.
const SLACK: usize = (HEAD + LONGEST).next_multiple_of(UNIT);

/// A ring of `capacity` bytes, a power of two of 4 KiB at least. Its pages are touched as traffic needs them.
pub fn ring(capacity: usize) -> (Producer, Consumer) {
    assert!(capacity.is_power_of_two() && capacity >= 4096, "no capacity: {capacity}");
    let units = Box::<[UnsafeCell<Unit>]>::new_uninit_slice((capacity + SLACK) / UNIT);
    let shared = Arc::new(Shared {
        published: Padded(AtomicUsize::new(0)),
        released: Padded(AtomicUsize::new(0)),
        capacity,
        units,
    });
    let producer = Producer { shared: Arc::clone(&shared), tail: 0, published: 0, released: 0 };
    (producer, Consumer { shared, head: 0, until: 0, most: 0 })
}

/// The writer's end.
pub struct Producer {
    shared: Arc<Shared>,
    /// Where the next record goes.
    tail: usize,
    /// What the reader may see.
    published: usize,
    /// How far the reader was when last looked at.
    released: usize,
}

impl Producer {
    /// Writes `handover` behind everything that was written. False if there is no room for it.
    #[inline]
    pub fn push(&mut self, handover: &Handover<'_>) -> bool {
        let (head, bytes) = Head::of(handover);
        if bytes.len() > LONGEST {
            return false;
        }
        let capacity = self.shared.capacity;
        let at = self.tail & (capacity - 1);
        let next = after(self.tail, bytes.len(), capacity);
        if next.wrapping_sub(self.released) > capacity {
            self.released = self.shared.released.0.load(Ordering::Acquire);
            if next.wrapping_sub(self.released) > capacity {
                return false;
            }
        }
        let record = self.shared.at(at);
        // SAFETY: `at` is a multiple of UNIT below the capacity, and a record is at most SLACK long, so it lies in the
        // allocation and is aligned for `Head`. The reader reads only up to what is published, which ends at or before
        // `tail`, and has released all that lay here in the lap before: `next - released <= capacity`, with the acquire
        // above ordering its reads before these writes.
        unsafe {
            record.cast::<Head>().write(head);
            record.add(HEAD).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        }
        self.tail = next;
        true
    }

    /// Lets the reader see what was written; false if that is nothing new.
    pub fn publish(&mut self) -> bool {
        let news = self.tail != self.published;
        if news {
            self.published = self.tail;
            self.shared.published.0.store(self.tail, Ordering::Release);
        }
        news
    }
}

/// The reader's end.
pub struct Consumer {
    shared: Arc<Shared>,
    /// The next record.
    head: usize,
    /// Where records end that may be read.
    until: usize,
    /// The most bytes that were ever found waiting.
    most: usize,
}

impl Consumer {
    /// Looks how far the writer has published: [`Consumer::records`] goes no further. True if there are records.
    pub fn look(&mut self) -> bool {
        self.until = self.shared.published.0.load(Ordering::Acquire);
        self.most = self.most.max(self.until.wrapping_sub(self.head));
        self.holds()
    }

    /// The next records, at most `most`, each seen once.
    pub fn records(&mut self, most: usize) -> impl Iterator<Item = Handover<'_>> {
        let Self { shared, head, until, .. } = self;
        let (shared, until) = (&**shared, *until);
        let mut left = most;
        std::iter::from_fn(move || {
            if *head == until || left == 0 {
                return None;
            }
            left -= 1;
            let record = shared.at(*head & (shared.capacity - 1));
            // SAFETY: a record was written here before `until` was published, and the acquire in `look` ordered that
            // before this. The writer does not touch it again before it is released, for which `release` needs the
            // borrow back that the yielded record holds.
            let (head_of_record, bytes) = unsafe {
                let head = record.cast::<Head>().read();
                (head, slice::from_raw_parts(record.add(HEAD), head.len))
            };
            *head = after(*head, bytes.len(), shared.capacity);
            Some(head_of_record.handover(bytes))
        })
    }

    /// Gives the room of the records that were seen back to the writer.
    pub fn release(&mut self) {
        self.shared.released.0.store(self.head, Ordering::Release);
    }

    /// Whether there are records up to where [`Consumer::look`] saw.
    pub fn holds(&self) -> bool {
        self.until != self.head
    }

    /// The most bytes that [`Consumer::look`] ever found waiting, at most the capacity.
    pub fn most(&self) -> usize {
        self.most
    }

    /// For others to see how full it is.
    pub fn level(&self) -> Level {
        Level(Arc::clone(&self.shared))
    }

    /// Whether anything is published that was not read.
    pub fn is_waiting(&self) -> bool {
        self.shared.published.0.load(Ordering::Acquire) != self.head
    }
}

/// How full a ring is, seen by neither of its ends.
pub struct Level(Arc<Shared>);

impl Level {
    /// Bytes that are published and whose room is not free again, heads included.
    pub fn bytes(&self) -> usize {
        let released = self.0.released.0.load(Ordering::Relaxed);
        // The two are of two moments: what was read meanwhile must not look like the whole address space.
        let waiting = self.0.published.0.load(Ordering::Relaxed).wrapping_sub(released);
        waiting.min(self.0.capacity)
    }
}

/// The position behind a record of `len` bytes at `position`.
#[inline]
fn after(position: usize, len: usize, capacity: usize) -> usize {
    let size = (HEAD + len).next_multiple_of(UNIT);
    let to_end = capacity - (position & (capacity - 1));
    position.wrapping_add(size.min(to_end))
}

#[repr(align(16))]
struct Unit(#[expect(dead_code, reason = "only its size and alignment are of use")] [u8; 16]);

struct Shared {
    published: Padded<AtomicUsize>,
    released: Padded<AtomicUsize>,
    capacity: usize,
    units: Box<[MaybeUninit<UnsafeCell<Unit>>]>,
}

// SAFETY: the bytes are only reached through the one `Producer` and the one `Consumer`, whose positions keep them apart.
unsafe impl Sync for Shared {}
// SAFETY: bytes belong to no thread.
unsafe impl Send for Shared {}

impl Shared {
    #[inline]
    fn at(&self, offset: usize) -> *mut u8 {
        debug_assert!(offset < self.capacity && offset.is_multiple_of(UNIT), "no record begins at {offset}");
        self.units.as_ptr().cast::<u8>().cast_mut().wrapping_add(offset)
    }
}

/// On a cache line of its own (and the one that the processor fetches with it).
#[repr(align(128))]
struct Padded<T>(T);

/// A [`Handover`] without its bytes.
#[derive(Clone, Copy)]
struct Head {
    len: usize,
    hops: u8,
    kind: Kind,
}

const _: () = assert!(align_of::<Head>() <= UNIT);

#[derive(Clone, Copy)]
enum Kind {
    Datagram(Addresses),
    Initiation(Addresses, [u8; 32]),
    Packet,
}

#[derive(Clone, Copy)]
struct Addresses {
    local: SocketAddr,
    from: SocketAddr,
    ecn: Ecn,
}

impl Head {
    #[inline]
    fn of<'a>(handover: &Handover<'a>) -> (Self, &'a [u8]) {
        let addresses = |d: &Datagram<'_>| Addresses { local: d.local, from: d.from, ecn: d.ecn };
        let (kind, bytes) = match &handover.what {
            Passed::Datagram(datagram) => (Kind::Datagram(addresses(datagram)), datagram.payload),
            Passed::Initiation(datagram, key) => {
                (Kind::Initiation(addresses(datagram), *key), datagram.payload)
            }
            Passed::Packet(packet) => (Kind::Packet, *packet),
        };
        (Self { len: bytes.len(), hops: handover.hops, kind }, bytes)
    }

    #[inline]
    fn handover<'a>(&self, payload: &'a [u8]) -> Handover<'a> {
        let datagram = |&Addresses { local, from, ecn }: &Addresses| Datagram { local, from, ecn, payload };
        let what = match &self.kind {
            Kind::Datagram(addresses) => Passed::Datagram(datagram(addresses)),
            Kind::Initiation(addresses, key) => Passed::Initiation(datagram(addresses), *key),
            Kind::Packet => Passed::Packet(payload),
        };
        Handover { hops: self.hops, what }
    }
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "patterns to fill packets with")]
mod tests {
    use std::{thread, time::Instant};

    use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};

    use super::*;

    #[test]
    fn what_is_passed_arrives_as_it_was() {
        let (mut to, mut from) = ring(4096);
        let local = "192.0.2.1:52625".parse().unwrap();
        let peer = SocketAddr::V6(std::net::SocketAddrV6::new("fe80::7".parse().unwrap(), 9, 3, 5));
        let datagram = |payload| Datagram { local, from: peer, ecn: Ecn::Ce, payload };
        let passed = [
            Passed::Datagram(datagram(b"datagram")),
            Passed::Initiation(datagram(b"initiation"), [7; 32]),
            Passed::Packet(b"packet"),
            Passed::Datagram(datagram(b"")),
        ];
        for (hops, what) in (1..).zip(passed) {
            assert!(to.push(&Handover { hops, what }));
        }
        assert!(!from.look() && !from.is_waiting(), "nothing is published yet");
        assert!(to.publish() && from.is_waiting() && from.look());
        let got: Vec<String> = from.records(10).map(|h| format!("{h:?}")).collect();
        let expect: Vec<String> =
            (1..).zip(passed).map(|(hops, what)| format!("{:?}", Handover { hops, what })).collect();
        assert_eq!(got, expect);
        assert!(!from.look() && !from.is_waiting() && !to.publish());
    }

    #[test]
    fn full_ring_refuses_and_has_room_again_when_records_are_released() {
        let (mut to, mut from) = ring(4096);
        let packet =
            |n: u8| Handover { hops: 1, what: Passed::Packet(&[[0; 900], [1; 900]][usize::from(n)]) };
        let mut room = 0;
        while to.push(&packet(0)) {
            room += 1;
        }
        assert!((3..=4).contains(&room), "{room} records of 900 bytes in 4096");
        assert!(!to.push(&packet(0)));
        to.publish();
        assert!(from.look());
        assert_eq!(from.records(1).count(), 1);
        assert!(!to.push(&packet(1)), "seen, but not released");
        from.release();
        assert!(to.push(&packet(1)), "the first record's place");
        assert_eq!(from.records(10).count(), room - 1, "no further than it looked");
        to.publish();
        assert!(from.look());
        assert_eq!(from.records(10).count(), 1);
        let mut long = vec![0; LONGEST + 1];
        assert!(!to.push(&Handover { hops: 1, what: Passed::Packet(&long) }));
        from.release();
        long.pop();
        let (mut to, mut from) = ring(128 << 10);
        for _ in 0..10 {
            assert!(to.push(&Handover { hops: 1, what: Passed::Packet(&long) }), "the longest fits");
            assert!(to.publish() && from.look());
            assert_eq!(from.records(1).count(), 1);
            from.release();
        }
    }

    #[test]
    fn two_threads_pass_records_of_all_sizes_whole_and_in_order() {
        for (capacity, longest) in [(4096, 1500), (128 << 10, LONGEST), (1 << 20, LONGEST)] {
            let (mut to, mut from) = ring(capacity);
            let records = if longest < 2000 { 30_000u32 } else { 5_000 };
            let length = move |rng: &mut SmallRng| match rng.random_range(0..4) {
                0 => rng.random_range(0..=longest),
                1 => rng.random_range(0..64usize),
                _ => rng.random_range(0..=1316.min(longest)),
            };
            let writer = thread::spawn(move || {
                let (mut rng, mut publish) = (SmallRng::seed_from_u64(4), SmallRng::seed_from_u64(5));
                let mut bytes = vec![0; longest];
                let mut refused = 0u64;
                for i in 0..records {
                    let packet = &mut bytes[..length(&mut rng)];
                    packet.fill(i as u8);
                    while !to.push(&Handover { hops: i as u8, what: Passed::Packet(packet) }) {
                        refused += 1;
                        to.publish();
                        thread::yield_now();
                    }
                    if publish.random_bool(0.1) {
                        to.publish();
                    }
                }
                to.publish();
                refused
            });
            let mut rng = SmallRng::seed_from_u64(4);
            let (mut seen, started) = (0u32, Instant::now());
            while seen < records {
                assert!(started.elapsed().as_secs() < 300, "stuck after {seen} records");
                if !from.look() {
                    thread::yield_now();
                    continue;
                }
                for Handover { hops, what } in from.records(1 + seen as usize % 100) {
                    let Passed::Packet(packet) = what else { panic!("record {seen} is no packet") };
                    assert_eq!((packet.len(), hops), (length(&mut rng), seen as u8), "record {seen}");
                    assert!(packet.iter().all(|byte| *byte == seen as u8), "record {seen}");
                    seen += 1;
                }
                from.release();
            }
            let refused = writer.join().unwrap();
            println!("{records} records through {capacity} bytes; the writer found no room {refused} times");
            assert!(!from.look());
        }
    }
}
