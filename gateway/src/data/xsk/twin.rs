//! The kernel's side of a queue in memory: what it does with the rings of several sockets that share a UMEM.

#![expect(clippy::cast_possible_truncation, reason = "places and lengths of a small memory")]

use std::{
    cell::RefCell,
    io::{self, ErrorKind},
    rc::Rc,
    sync::{Arc, atomic::Ordering},
};

use super::{
    memory::Area,
    port::{Port, Queue, Statistics, Wire},
    ring::{Consumer, Desc, Flags, Producer, pair},
    umem::{CompletionRing, FillRing, KERNEL_HEADROOM, RxRing, TxRing, Umem},
};

/// One queue and its sockets.
pub struct Kernel {
    pub umem: Arc<Umem>,
    fill: Consumer<u64>,
    completion: Producer<u64>,
    fill_flags: Flags,
    sockets: Vec<Socket>,
    /// Taken from the fill ring, and not used after all.
    spare: Vec<u64>,
    /// Sent, and not yet said so.
    flying: Vec<u64>,
    /// Frames complete by themselves.
    pub completes: bool,
    /// Nothing can be sent.
    pub down: bool,
    /// A driver without copies: it sends when it likes, [`Kernel::send_all`].
    pub zero_copy: bool,
    /// How often it was told of frames in the fill ring.
    pub wakes: usize,
    /// How often it was told of frames in a transmit ring.
    pub kicks: usize,
}

struct Socket {
    rx: Producer<Desc>,
    tx: Consumer<Desc>,
    tx_flags: Flags,
    sent: Vec<Vec<u8>>,
    statistics: Statistics,
}

/// The sizes of a queue.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub frames: u32,
    pub offered: usize,
    pub fill: u32,
    pub completion: u32,
    pub rx: u32,
    pub tx: u32,
    /// Where the indices of all rings begin.
    pub start: u32,
}

/// A socket of the twin.
pub struct TwinWire {
    kernel: Rc<RefCell<Kernel>>,
    socket: usize,
}

/// A queue with `count` ports.
pub fn twin(sizes: Sizes, count: usize) -> (Rc<RefCell<Kernel>>, Arc<Queue>, Vec<Port<TwinWire>>) {
    let Sizes { frames, offered, fill, completion, rx, tx, start } = sizes;
    let (umem, pool) = Umem::new(frames, 2048).unwrap();
    let (fill, fill_end, fill_flags) = pair(fill, start);
    let (completion_end, completion, _) = pair(completion, start);
    let kernel = Rc::new(RefCell::new(Kernel {
        umem: Arc::clone(&umem),
        fill: fill_end,
        completion: completion_end,
        fill_flags,
        sockets: Vec::new(),
        spare: Vec::new(),
        flying: Vec::new(),
        completes: true,
        down: false,
        zero_copy: false,
        wakes: 0,
        kicks: 0,
    }));
    let fill = FillRing::new(Arc::clone(&umem), fill);
    let completion = CompletionRing::new(Arc::clone(&umem), completion);
    let queue = Arc::new(Queue::new(Arc::clone(&umem), pool, fill, completion, offered));
    let port = |socket| {
        let (rx_end, rx, _) = pair(rx, start);
        let (tx, tx_end, tx_flags) = pair(tx, start);
        tx_flags.set_needs_wakeup(true);
        let end =
            Socket { rx: rx_end, tx: tx_end, tx_flags, sent: vec![], statistics: Statistics::default() };
        kernel.borrow_mut().sockets.push(end);
        let (rx, tx) = (RxRing::new(Arc::clone(&umem), rx), TxRing::new(Arc::clone(&umem), tx));
        Port::new(Arc::clone(&queue), rx, tx, TwinWire { kernel: Rc::clone(&kernel), socket })
    };
    let ports = (0..count).map(port).collect();
    (kernel, queue, ports)
}

impl Kernel {
    /// A frame arrives for a socket. False if it is dropped.
    pub fn deliver(&mut self, socket: usize, bytes: &[u8]) -> bool {
        self.fill.look();
        let taken = self.spare.pop().or_else(|| self.fill.pop());
        self.fill.release();
        let Some(frame) = taken else {
            self.sockets.iter_mut().for_each(|socket| socket.statistics.fill_empty += 1);
            self.sockets[socket].statistics.dropped += 1;
            return false;
        };
        let end = &mut self.sockets[socket];
        if bytes.len() > 2048 - KERNEL_HEADROOM {
            end.statistics.dropped += 1;
            self.spare.push(frame);
            return false;
        }
        if end.rx.is_full() {
            end.statistics.ring_full += 1;
            self.spare.push(frame);
            return false;
        }
        let addr = frame + KERNEL_HEADROOM as u64;
        write(self.umem.area(), addr as usize, bytes);
        end.rx.push(Desc { addr, len: bytes.len() as u32, options: 0 });
        end.rx.submit();
        true
    }

    /// Up to 32 frames of a socket leave.
    fn send(&mut self, socket: usize) -> io::Result<()> {
        self.kicks += 1;
        if self.down {
            return Err(io::Error::from_raw_os_error(libc::ENETDOWN));
        }
        let end = &mut self.sockets[socket];
        let mut result = Ok(());
        let mut left = 32;
        while end.tx.look() > 0 {
            if left == 0 || self.completion.room() <= self.flying.len() {
                result = Err(ErrorKind::WouldBlock.into());
                break;
            }
            left -= 1;
            let Desc { addr, len, .. } = end.tx.pop().unwrap();
            end.sent.push(read(self.umem.area(), addr as usize, len as usize));
            self.flying.push(addr);
            end.tx.release();
        }
        if self.completes {
            self.complete(usize::MAX);
        }
        result
    }

    /// Says of up to `most` frames that they are sent.
    pub fn complete(&mut self, most: usize) {
        for addr in self.flying.drain(..most.min(self.flying.len())) {
            assert!(self.completion.push(addr), "the place was kept");
        }
        self.completion.submit();
    }

    /// What a socket has sent since the last call.
    pub fn sent(&mut self, socket: usize) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.sockets[socket].sent)
    }

    /// Whether it wants to be told of new frames.
    pub fn set_sleepy(&mut self, tx: bool, fill: bool) {
        self.sockets.iter().for_each(|socket| socket.tx_flags.set_needs_wakeup(tx));
        self.fill_flags.set_needs_wakeup(fill);
    }

    /// The transmit rings are looked at without being told.
    pub fn send_all(&mut self) {
        for socket in 0..self.sockets.len() {
            while self.send(socket).is_err_and(|e| e.kind() == ErrorKind::WouldBlock && self.completes) {}
        }
    }

    /// Frames that have left the rings for the kernel's own purposes.
    pub fn held(&self) -> usize {
        self.spare.len() + self.flying.len()
    }
}

impl Wire for TwinWire {
    fn kick(&self) -> io::Result<()> {
        let mut kernel = self.kernel.borrow_mut();
        if kernel.zero_copy {
            kernel.kicks += 1;
            return Ok(());
        }
        kernel.send(self.socket)
    }

    fn sends_later(&self) -> bool {
        self.kernel.borrow().zero_copy
    }

    fn wake(&self) {
        self.kernel.borrow_mut().wakes += 1;
    }

    fn statistics(&self) -> Statistics {
        self.kernel.borrow().sockets[self.socket].statistics
    }
}

fn read(area: &Area, at: usize, len: usize) -> Vec<u8> {
    let first = at / 8 * 8;
    let words = area.words(first, (at + len - first).div_ceil(8)).unwrap();
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes()).collect();
    bytes[at - first..][..len].to_vec()
}

/// `at` is a multiple of 8.
fn write(area: &Area, at: usize, bytes: &[u8]) {
    let words = area.words(at, bytes.len().div_ceil(8)).unwrap();
    for (word, bytes) in words.iter().zip(bytes.chunks(8)) {
        let mut value = [0; 8];
        value[..bytes.len()].copy_from_slice(bytes);
        word.store(u64::from_ne_bytes(value), Ordering::Relaxed);
    }
}
