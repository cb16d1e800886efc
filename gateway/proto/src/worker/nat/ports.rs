//! Which ports towards one resource's address are taken (packets.md section 5.2), and the next free one in constant
//! time. Knows no session.
//!
//! A few ports are a sorted list; from [`MANY`] on they are a bitmap of 8 KB with a summary of its full words, so that
//! the memory stays in proportion to the ports in use whatever a client does.

use std::ops::RangeInclusive;

/// As many ports become a bitmap,
const MANY: usize = 48;
/// and so few a list again. The distance pays for the conversion.
const FEW: usize = 16;
const WORDS: usize = 1024;

/// The ports taken, of one kind towards one address.
pub enum Ports {
    /// Sorted.
    Few(Vec<u16>),
    /// Boxed, most resources see few ports.
    Many(Box<Bitmap>),
}

impl Ports {
    pub fn new() -> Self {
        Self::Few(Vec::new())
    }

    /// Takes `wanted`, or the first free one after it, from the start of `range` again after its end. `None` if all
    /// of the range is taken.
    ///
    /// 0 is an identifier, and a port that a client may send from; it is preserved, and never chosen.
    pub fn take(&mut self, wanted: u16, range: &RangeInclusive<u16>) -> Option<u16> {
        let preserve = (wanted == 0 || range.contains(&wanted)) && !self.is_taken(wanted);
        let port = if preserve {
            wanted
        } else {
            let after = wanted.checked_add(1).filter(|port| range.contains(port));
            after
                .and_then(|from| self.free(from, *range.end()))
                .or_else(|| self.free(*range.start(), *range.end()))?
        };
        self.set(port);
        Some(port)
    }

    /// Gives `port` back. True if none is taken any more.
    pub fn give(&mut self, port: u16) -> bool {
        match self {
            Self::Few(list) => {
                if let Ok(at) = list.binary_search(&port) {
                    list.remove(at);
                }
                list.is_empty()
            }
            Self::Many(bitmap) => {
                bitmap.clear(port);
                if bitmap.taken <= FEW {
                    *self = Self::Few(bitmap.list());
                }
                false
            }
        }
    }

    fn is_taken(&self, port: u16) -> bool {
        match self {
            Self::Few(list) => list.binary_search(&port).is_ok(),
            Self::Many(bitmap) => bitmap.is_taken(port),
        }
    }

    fn set(&mut self, port: u16) {
        match self {
            Self::Few(list) => {
                if let Err(at) = list.binary_search(&port) {
                    list.insert(at, port);
                }
                if list.len() >= MANY {
                    *self = Self::Many(Bitmap::of(list));
                }
            }
            Self::Many(bitmap) => bitmap.set(port),
        }
    }

    /// The first free port of `from..=to`.
    fn free(&self, from: u16, to: u16) -> Option<u16> {
        match self {
            Self::Few(list) => {
                // At most MANY of them are in the way.
                let mut port = from;
                for taken in &list[list.partition_point(|taken| *taken < from)..] {
                    if *taken != port {
                        break;
                    }
                    port = port.checked_add(1)?;
                }
                Some(port)
            }
            Self::Many(bitmap) => bitmap.free(from),
        }
        .filter(|port| *port <= to)
    }
}

/// One bit for every port.
pub struct Bitmap {
    taken: usize,
    words: [u64; WORDS],
    /// One bit for every word that has no free port.
    full: [u64; WORDS / 64],
}

impl Bitmap {
    fn of(list: &[u16]) -> Box<Self> {
        let mut bitmap = Box::new(Self { taken: 0, words: [0; WORDS], full: [0; WORDS / 64] });
        list.iter().for_each(|port| bitmap.set(*port));
        bitmap
    }

    fn list(&self) -> Vec<u16> {
        let mut list = Vec::with_capacity(MANY);
        list.extend((0..=u16::MAX).step_by(64).flat_map(|first| {
            let word = self.words[usize::from(first) / 64];
            (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| first + bit)
        }));
        list
    }

    fn is_taken(&self, port: u16) -> bool {
        let (word, bit) = place(port);
        self.words[word] & bit != 0
    }

    fn set(&mut self, port: u16) {
        let (word, bit) = place(port);
        self.taken += usize::from(self.words[word] & bit == 0);
        self.words[word] |= bit;
        if self.words[word] == u64::MAX {
            self.full[word / 64] |= 1 << (word % 64);
        }
    }

    fn clear(&mut self, port: u16) {
        let (word, bit) = place(port);
        self.taken -= usize::from(self.words[word] & bit != 0);
        self.words[word] &= !bit;
        self.full[word / 64] &= !(1 << (word % 64));
    }

    /// The first free port from `from` on: one word, the rest of one summary, at most 15 summaries, one word.
    fn free(&self, from: u16) -> Option<u16> {
        let (first, bit) = place(from);
        let here = !self.words[first] & !(bit - 1);
        if here != 0 {
            return port(first, here);
        }
        let next = first + 1;
        let mut mask = u64::MAX << (next % 64);
        for (at, full) in self.full.iter().enumerate().skip(next / 64) {
            let open = !full & mask;
            if open != 0 {
                let word = at * 64 + open.trailing_zeros() as usize;
                return port(word, !self.words[word]);
            }
            mask = u64::MAX;
        }
        None
    }
}

fn place(port: u16) -> (usize, u64) {
    (usize::from(port) / 64, 1 << (port % 64))
}

fn port(word: usize, free: u64) -> Option<u16> {
    u16::try_from(word * 64 + free.trailing_zeros() as usize).ok()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// "Original port, port+1 … 65535, then 1 … port−1; the first [that] is free."
    fn slow(taken: &BTreeSet<u16>, wanted: u16, range: &RangeInclusive<u16>) -> Option<u16> {
        let preserved = (wanted == 0 || range.contains(&wanted)).then_some(wanted);
        let after = (wanted..=u16::MAX).skip(1);
        preserved
            .into_iter()
            .chain(after.chain(1..wanted).chain(wanted..=wanted).filter(|port| range.contains(port)))
            .find(|port| !taken.contains(port))
    }

    #[test]
    fn the_next_free_port_is_the_one_that_a_search_finds() {
        let mut state = 1_u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            u16::try_from(state >> 48).unwrap()
        };
        for (range, spread) in
            [(1..=u16::MAX, 300), (1000..=1040, 60), (65_400..=u16::MAX, 136), (1..=200, 250)]
        {
            let (mut ports, mut model) = (Ports::new(), BTreeSet::new());
            let (mut refused, mut shapes) = (0, [0; 2]);
            for step in 0..6_000 {
                // Filling and emptying by turns, so that both shapes are gone through.
                if random() % 100 < if step / 1000 % 2 == 0 { 65 } else { 20 } {
                    let wanted = range.start().saturating_sub(3).saturating_add(random() % spread);
                    let expect = slow(&model, wanted, &range);
                    assert_eq!(ports.take(wanted, &range), expect, "step {step}: {wanted} of {range:?}");
                    refused += u32::from(expect.is_none());
                    model.extend(expect);
                } else if !model.is_empty() {
                    let port = *model.iter().nth(usize::from(random()) % model.len()).unwrap();
                    model.remove(&port);
                    let none = ports.give(port);
                    assert!(!none || model.is_empty());
                    assert!(none || !model.is_empty() || matches!(ports, Ports::Many(_)));
                }
                shapes[usize::from(matches!(ports, Ports::Many(_)))] += 1;
            }
            if range == (1000..=1040) {
                assert!(refused > 100, "{refused}");
            } else {
                assert!(shapes.iter().all(|n| *n > 500), "{range:?}: {shapes:?}");
            }
        }
    }

    #[test]
    fn all_ports_can_be_taken_and_then_none() {
        let range = 1..=u16::MAX;
        let mut ports = Ports::new();
        let first: Vec<_> = (0..65_535).map(|_| ports.take(40_000, &range).unwrap()).collect();
        assert_eq!(first[..2], [40_000, 40_001]);
        assert_eq!(first[25_535..25_537], [65_535, 1]);
        assert_eq!(first[65_534], 39_999);
        assert_eq!(ports.take(40_000, &range), None);
        assert_eq!(ports.take(0, &range), Some(0), "preserved, though never chosen");
        assert_eq!(ports.take(0, &range), None);
        ports.give(7);
        assert_eq!(ports.take(65_535, &range), Some(7));
    }
}
