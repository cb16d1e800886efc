//! How a worker's thread is woken: an eventfd that it polls, and a flag that says whether waking is worth a system call.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::atomic::{AtomicBool, Ordering, fence},
};

use rustix::event::{EventfdFlags, eventfd};

/// One worker's bell.
pub struct Wake {
    fd: OwnedFd,
    asleep: AtomicBool,
}

impl Wake {
    /// A silent one.
    pub fn new() -> io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Self { fd, asleep: AtomicBool::new(false) })
    }

    /// Wakes the worker, or keeps it from falling asleep.
    pub fn ring(&self) {
        // The counter cannot overflow within the life of a process. EAGAIN would mean it is readable anyway.
        let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
    }

    /// Wakes the worker if it sleeps. To be called behind the atomic store that published something for it.
    pub fn ring_if_asleep(&self) {
        // With the fence in `fall_asleep`: either this sees the flag, or the worker sees what was published.
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::Relaxed) {
            self.ring();
        }
    }

    /// The worker is about to sleep. True if it must not, because `is_waiting` finds something.
    pub fn fall_asleep(&self, is_waiting: impl FnOnce() -> bool) -> bool {
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        is_waiting()
    }

    /// The worker is awake.
    pub fn wake_up(&self) {
        self.asleep.store(false, Ordering::Relaxed);
    }

    /// Makes the eventfd unreadable.
    pub fn clear(&self) {
        // EAGAIN means it was not readable, which is what we want.
        let _ = rustix::io::read(&self.fd, &mut [0u8; 8]);
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
