//! The rings of an AF_XDP socket, each with one writer and one reader (Documentation/networking/af_xdp.rst, "Rings").
//!
//! ```text
//!               consumer (reader's)          producer (writer's)
//!                  v                            v
//!   |..............[entry][entry].......[entry].....................|    size: a power of two
//!                   released until here         submitted until here
//! ```
//!
//! Both indices are 32-bit, only grow, and wrap; an entry's place is its index modulo the size. Each side keeps its own
//! index and what it last saw of the other's, so most calls touch no shared cache line. Entries are read and written
//! as atomic words, ordered by the indices: nothing here is unsafe, whatever the other side does.

use std::{
    array,
    marker::PhantomData,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering, fence},
    },
};

use super::memory::Area;

/// What a ring holds.
pub trait Entry: Copy {
    /// How many 64-bit words it is.
    const WORDS: usize;
    /// From its words.
    fn load(words: &[AtomicU64]) -> Self;
    /// Into its words.
    fn store(self, words: &[AtomicU64]);
}

/// The place of a frame in the UMEM, in bytes: what fill and completion rings hold.
impl Entry for u64 {
    const WORDS: usize = 1;

    #[inline]
    fn load(words: &[AtomicU64]) -> Self {
        words[0].load(Ordering::Relaxed)
    }

    #[inline]
    fn store(self, words: &[AtomicU64]) {
        words[0].store(self, Ordering::Relaxed);
    }
}

/// `struct xdp_desc`: what receive and transmit rings hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Desc {
    /// The first byte's place in the UMEM.
    pub addr: u64,
    /// How many bytes.
    pub len: u32,
    /// XDP_PKT_CONTD and the like; 0 for what is whole.
    pub options: u32,
}

impl Entry for Desc {
    const WORDS: usize = 2;

    #[inline]
    fn load(words: &[AtomicU64]) -> Self {
        let [addr, rest] = array::from_fn(|i| words[i].load(Ordering::Relaxed));
        let [len, options]: [u32; 2] = bytemuck::cast(rest);
        Self { addr, len, options }
    }

    #[inline]
    fn store(self, words: &[AtomicU64]) {
        words[0].store(self.addr, Ordering::Relaxed);
        words[1].store(bytemuck::cast([self.len, self.options]), Ordering::Relaxed);
    }
}

/// Where things are in a ring's mapping, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// The writer's index.
    pub producer: usize,
    /// The reader's index.
    pub consumer: usize,
    /// Where the kernel says whether it sleeps.
    pub flags: usize,
    /// The entries.
    pub entries: usize,
}

/// XDP_RING_NEED_WAKEUP: the kernel looks at the ring only when it is called.
const NEED_WAKEUP: u32 = 1;

/// What both ends know.
struct Ring<T> {
    area: Arc<Area>,
    layout: Layout,
    /// A power of two.
    size: u32,
    entry: PhantomData<T>,
}

impl<T: Entry> Ring<T> {
    /// `None` if the mapping is too small for what the layout says, or `size` is no power of two.
    fn new(area: Arc<Area>, layout: Layout, size: u32) -> Option<Self> {
        area.words(layout.entries, size as usize * T::WORDS)?;
        for at in [layout.producer, layout.consumer, layout.flags] {
            area.word(at)?;
        }
        size.is_power_of_two().then_some(Self { area, layout, size, entry: PhantomData })
    }

    #[inline]
    fn word(&self, at: usize) -> &AtomicU32 {
        self.area.word(at).expect("looked at by Ring::new")
    }

    #[inline]
    fn producer(&self) -> &AtomicU32 {
        self.word(self.layout.producer)
    }

    #[inline]
    fn consumer(&self) -> &AtomicU32 {
        self.word(self.layout.consumer)
    }

    #[inline]
    fn needs_wakeup(&self) -> bool {
        self.word(self.layout.flags).load(Ordering::Relaxed) & NEED_WAKEUP != 0
    }

    #[inline]
    fn entry(&self, index: u32) -> &[AtomicU64] {
        let at = self.layout.entries + (index & (self.size - 1)) as usize * T::WORDS * size_of::<u64>();
        self.area.words(at, T::WORDS).expect("looked at by Ring::new")
    }
}

/// The writer's end.
pub struct Producer<T> {
    ring: Ring<T>,
    /// Where the next entry goes.
    next: u32,
    /// What the reader may see.
    submitted: u32,
    /// How far the reader was when last looked at.
    released: u32,
}

impl<T: Entry> Producer<T> {
    /// Over a mapping; goes on where the ring is.
    pub fn new(area: Arc<Area>, layout: Layout, size: u32) -> Option<Self> {
        let ring = Ring::new(area, layout, size)?;
        let next = ring.producer().load(Ordering::Relaxed);
        let released = ring.consumer().load(Ordering::Acquire);
        Some(Self { ring, next, submitted: next, released })
    }

    /// How many entries there is room for.
    #[inline]
    pub fn room(&mut self) -> usize {
        self.released = self.ring.consumer().load(Ordering::Acquire);
        self.known_room() as usize
    }

    fn known_room(&self) -> u32 {
        self.ring.size.saturating_sub(self.next.wrapping_sub(self.released))
    }

    /// Whether nothing more fits; looks only if that is what is known.
    #[inline]
    pub fn is_full(&mut self) -> bool {
        self.known_room() == 0 && self.room() == 0
    }

    /// Writes an entry behind all others; the reader sees it with the next [`Producer::submit`]. False if it is full.
    #[inline]
    pub fn push(&mut self, entry: T) -> bool {
        if self.is_full() {
            return false;
        }
        entry.store(self.ring.entry(self.next));
        self.next = self.next.wrapping_add(1);
        true
    }

    /// Lets the reader see what was written. False if that is nothing new.
    #[inline]
    pub fn submit(&mut self) -> bool {
        let news = self.next != self.submitted;
        if news {
            self.submitted = self.next;
            self.ring.producer().store(self.next, Ordering::Release);
        }
        news
    }

    /// Entries that the reader may see and has not released yet.
    #[inline]
    pub fn waiting(&self) -> usize {
        self.submitted.wrapping_sub(self.ring.consumer().load(Ordering::Acquire)).min(self.ring.size) as usize
    }

    /// Whether the reader must be called to look. After [`Producer::submit`]: a reader that falls asleep says so before it
    /// looks for the last time, so one of the two sees what the other has written.
    #[inline]
    pub fn needs_wakeup(&self) -> bool {
        fence(Ordering::SeqCst);
        self.ring.needs_wakeup()
    }
}

/// The reader's end.
pub struct Consumer<T> {
    ring: Ring<T>,
    /// The next entry.
    next: u32,
    /// What the writer knows that was read.
    released: u32,
    /// How far the writer was when last looked at.
    submitted: u32,
}

impl<T: Entry> Consumer<T> {
    /// Over a mapping; goes on where the ring is.
    pub fn new(area: Arc<Area>, layout: Layout, size: u32) -> Option<Self> {
        let ring = Ring::new(area, layout, size)?;
        let next = ring.consumer().load(Ordering::Relaxed);
        Some(Self { ring, next, released: next, submitted: next })
    }

    /// Looks how many entries wait: [`Consumer::pop`] goes no further.
    #[inline]
    pub fn look(&mut self) -> usize {
        self.submitted = self.ring.producer().load(Ordering::Acquire);
        // More than there is place for is what only a broken writer says.
        let waiting = self.submitted.wrapping_sub(self.next).min(self.ring.size);
        self.submitted = self.next.wrapping_add(waiting);
        waiting as usize
    }

    /// The next entry of those that [`Consumer::look`] saw.
    #[inline]
    pub fn pop(&mut self) -> Option<T> {
        if self.next == self.submitted {
            return None;
        }
        let entry = T::load(self.ring.entry(self.next));
        self.next = self.next.wrapping_add(1);
        Some(entry)
    }

    /// Gives the places of what was read back to the writer.
    #[inline]
    pub fn release(&mut self) {
        if self.released != self.next {
            self.released = self.next;
            self.ring.consumer().store(self.next, Ordering::Release);
        }
    }
}

/// Both ends of a ring in memory, with indices that begin at `start`, and a third end: the flags.
#[cfg(test)]
pub fn pair<T: Entry>(size: u32, start: u32) -> (Producer<T>, Consumer<T>, Flags) {
    let layout = Layout { producer: 0, consumer: 64, flags: 128, entries: 192 };
    let area = Area::anonymous(layout.entries + size as usize * T::WORDS * size_of::<u64>()).unwrap();
    let area = Arc::new(area);
    for at in [layout.producer, layout.consumer] {
        area.word(at).unwrap().store(start, Ordering::Relaxed);
    }
    let producer = Producer::new(Arc::clone(&area), layout, size).unwrap();
    let consumer = Consumer::new(Arc::clone(&area), layout, size).unwrap();
    (producer, consumer, Flags { area, at: layout.flags })
}

/// What the kernel says about itself.
#[cfg(test)]
pub struct Flags {
    area: Arc<Area>,
    at: usize,
}

#[cfg(test)]
impl Flags {
    /// The kernel wants to be called, or looks by itself.
    pub fn set_needs_wakeup(&self, needed: bool) {
        self.area.word(self.at).unwrap().store(u32::from(needed), Ordering::Relaxed);
    }
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "patterns to fill entries with")]
mod tests {
    use std::{collections::VecDeque, thread};

    use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};

    use super::*;

    #[test]
    fn a_layout_that_does_not_fit_the_mapping_is_no_ring() {
        let area = Arc::new(Area::anonymous(4096).unwrap());
        let good = Layout { producer: 0, consumer: 64, flags: 128, entries: 192 };
        let table = [
            (good, 128, true),
            (good, 256, false),
            (good, 100, false),
            (good, 0, false),
            (Layout { producer: 4096, ..good }, 64, false),
            (Layout { consumer: 66, ..good }, 64, false),
            (Layout { flags: usize::MAX, ..good }, 64, false),
            (Layout { entries: 196, ..good }, 64, false),
        ];
        for (layout, size, fits) in table {
            assert_eq!(
                Producer::<Desc>::new(area.clone(), layout, size).is_some(),
                fits,
                "{layout:?} {size}"
            );
            assert_eq!(
                Consumer::<Desc>::new(area.clone(), layout, size).is_some(),
                fits,
                "{layout:?} {size}"
            );
        }
    }

    #[test]
    fn a_full_ring_takes_nothing_until_the_reader_has_released() {
        for start in [0, 5, u32::MAX - 3, u32::MAX] {
            let (mut to, mut from, _) = pair::<u64>(8, start);
            assert_eq!((to.room(), from.look(), from.pop()), (8, 0, None));
            for i in 0..8 {
                assert!(to.push(i), "{i} from {start}");
            }
            assert!(!to.push(8) && to.room() == 0, "full");
            assert_eq!((from.look(), to.waiting()), (0, 0), "nothing is submitted");
            assert!(to.submit() && !to.submit());
            assert_eq!((from.look(), to.waiting()), (8, 8));
            for i in 0..3 {
                assert_eq!(from.pop(), Some(i));
            }
            assert!(!to.push(8), "read, but not released");
            from.release();
            assert_eq!((to.room(), to.waiting()), (3, 5));
            assert!(to.push(8) && to.push(9) && to.push(10) && !to.push(11));
            assert_eq!(from.look(), 5, "what is not submitted is not seen");
            to.submit();
            assert_eq!(from.look(), 8);
            assert_eq!(std::iter::from_fn(|| from.pop()).collect::<Vec<_>>(), (3..11).collect::<Vec<_>>());
        }
    }

    #[test]
    fn an_end_that_is_made_later_goes_on_where_the_ring_is() {
        let (mut to, mut from, flags) = pair::<Desc>(4, u32::MAX);
        let desc = |addr| Desc { addr, len: 7, options: 9 };
        to.push(desc(1));
        to.push(desc(2));
        to.submit();
        from.look();
        assert_eq!(from.pop(), Some(desc(1)));
        from.release();
        let (layout, area) = (to.ring.layout, Arc::clone(&flags.area));
        drop((to, from));
        let mut to = Producer::new(Arc::clone(&area), layout, 4).unwrap();
        let mut from = Consumer::<Desc>::new(area, layout, 4).unwrap();
        assert_eq!((to.room(), to.waiting(), from.look()), (3, 1, 1));
        assert!(to.push(desc(3)) && to.submit());
        from.look();
        assert_eq!([from.pop(), from.pop(), from.pop()], [Some(desc(2)), Some(desc(3)), None]);
        assert!(!to.needs_wakeup());
        flags.set_needs_wakeup(true);
        assert!(to.needs_wakeup());
    }

    #[test]
    fn an_index_that_cannot_be_reads_no_entry_twice_in_one_look() {
        let (to, mut from, _) = pair::<u64>(4, 0);
        to.ring.producer().store(1000, Ordering::Release);
        assert_eq!(from.look(), 4);
        assert_eq!(std::iter::from_fn(|| from.pop()).count(), 4);
        // And a reader that says it is ahead of the writer gets no more room than there is.
        let (mut to, _, _) = pair::<u64>(4, 0);
        to.ring.consumer().store(3, Ordering::Release);
        assert!(to.room() <= 4 && to.waiting() <= 4);
    }

    #[test]
    fn whatever_is_done_in_whatever_order_is_what_a_queue_does() {
        for seed in 0..200 {
            let mut rng = SmallRng::seed_from_u64(seed);
            let size = 1 << rng.random_range(0..5);
            let (mut to, mut from, _) = pair::<Desc>(size, u32::MAX.wrapping_sub(rng.random_range(0..100)));
            let (mut written, mut seen, mut read) = (VecDeque::new(), 0, 0);
            let (mut visible, mut held, mut number) = (0, 0, 0);
            for _ in 0..1000 {
                match rng.random_range(0..5) {
                    0 => {
                        let desc =
                            Desc { addr: number, len: number as u32 ^ 0xaaaa, options: !(number as u32) };
                        let fits = written.len() + held < size as usize;
                        assert_eq!(to.push(desc), fits, "seed {seed}");
                        if fits {
                            written.push_back(desc);
                            number += 1;
                        }
                    }
                    1 => {
                        assert_eq!(to.submit(), visible != written.len(), "seed {seed}");
                        visible = written.len();
                    }
                    2 => {
                        seen = from.look();
                        assert_eq!(seen, visible, "seed {seed}");
                    }
                    3 => {
                        let expect = (seen > 0).then(|| written.pop_front().unwrap());
                        assert_eq!(from.pop(), expect, "seed {seed}");
                        if expect.is_some() {
                            (seen, visible, held, read) = (seen - 1, visible - 1, held + 1, read + 1);
                        }
                    }
                    _ => {
                        from.release();
                        held = 0;
                        assert_eq!(to.room(), size as usize - written.len(), "seed {seed}");
                        assert_eq!(to.waiting(), visible, "seed {seed}");
                    }
                }
            }
            assert!(read > 10, "seed {seed}: only {read} were read");
        }
    }

    #[test]
    fn two_threads_pass_entries_whole_and_in_order_over_the_end_of_the_indices() {
        const COUNT: u64 = 200_000;
        for size in [1, 4, 64] {
            let (mut to, mut from, _) = pair::<Desc>(size, u32::MAX - 1000);
            let desc = |i: u64| Desc { addr: i, len: i as u32, options: !(i as u32) };
            let writer = thread::spawn(move || {
                let mut rng = SmallRng::seed_from_u64(1);
                for i in 0..COUNT {
                    while !to.push(desc(i)) {
                        to.submit();
                        thread::yield_now();
                    }
                    if rng.random_bool(0.2) {
                        to.submit();
                    }
                }
                to.submit();
            });
            let mut seen = 0;
            while seen < COUNT {
                if from.look() == 0 {
                    thread::yield_now();
                }
                while let Some(entry) = from.pop() {
                    assert_eq!(entry, desc(seen), "through {size} places");
                    seen += 1;
                }
                from.release();
            }
            writer.join().unwrap();
            assert_eq!(from.look(), 0);
        }
    }
}
