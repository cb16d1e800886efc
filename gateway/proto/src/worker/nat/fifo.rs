//! Slots in the order they came, any of them taken out in constant time. Knows no session.

use super::expiry::{NONE, Slot};

/// The queue. A slot is in it at most once.
pub struct Fifo {
    first: Slot,
    last: Slot,
    /// Previous and next, by slot.
    links: Vec<[Slot; 2]>,
}

impl Fifo {
    pub fn new() -> Self {
        Self { first: NONE, last: NONE, links: Vec::new() }
    }

    /// The slot that came first.
    pub fn first(&self) -> Option<Slot> {
        (self.first != NONE).then_some(self.first)
    }

    /// `slot` must not be in the queue.
    pub fn push(&mut self, slot: Slot) {
        let at = slot as usize;
        if at >= self.links.len() {
            self.links.resize(at + 1, [NONE; 2]);
        }
        self.links[at] = [self.last, NONE];
        match self.last {
            NONE => self.first = slot,
            last => self.links[last as usize][1] = slot,
        }
        self.last = slot;
    }

    /// `slot` must be in the queue.
    pub fn remove(&mut self, slot: Slot) {
        let [previous, next] = self.links[slot as usize];
        match previous {
            NONE => self.first = next,
            previous => self.links[previous as usize][1] = next,
        }
        match next {
            NONE => self.last = previous,
            next => self.links[next as usize][0] = previous,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_slot_leaves_and_the_order_stays() {
        for gone in 0..4 {
            let mut fifo = Fifo::new();
            (0..4).for_each(|slot| fifo.push(slot));
            fifo.remove(gone);
            fifo.push(gone);
            let mut order = Vec::new();
            while let Some(slot) = fifo.first() {
                order.push(slot);
                fifo.remove(slot);
            }
            let mut expect: Vec<_> = (0..4).filter(|slot| *slot != gone).collect();
            expect.push(gone);
            assert_eq!(order, expect);
        }
    }
}
