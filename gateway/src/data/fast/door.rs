//! How a worker that runs gets another fast path, or none: control puts it here, the worker takes it between two turns.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use crate::data::{wake::Wake, xsk::Fast};

/// One worker's.
pub struct Door {
    wake: Arc<Wake>,
    next: Mutex<Option<Option<Fast>>>,
    /// Something lies there.
    any: AtomicBool,
    /// The worker does not have what was put there last.
    open: AtomicBool,
}

impl Door {
    /// Of the worker that `wake` wakes. Nothing lies there.
    pub fn new(wake: Arc<Wake>) -> Self {
        Self { wake, next: Mutex::default(), any: AtomicBool::new(false), open: AtomicBool::new(false) }
    }

    /// The worker shall have this instead of what it has.
    pub fn put(&self, fast: Option<Fast>) {
        let old = self.next.lock().unwrap_or_else(PoisonError::into_inner).replace(fast);
        self.open.store(true, Ordering::Release);
        self.any.store(true, Ordering::Release);
        self.wake.ring();
        drop(old);
    }

    /// Makes the worker have a turn.
    pub fn ring(&self) {
        self.wake.ring();
    }

    /// Whether the worker has what was put there last, and nothing of before.
    pub fn is_taken(&self) -> bool {
        !self.open.load(Ordering::Acquire)
    }

    /// For the worker: what it shall have, if that is news. [`Door::taken`] when it has it.
    #[inline]
    pub fn take(&self) -> Option<Option<Fast>> {
        if !self.any.load(Ordering::Acquire) {
            return None;
        }
        self.any.store(false, Ordering::Relaxed);
        self.next.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// For the worker: it has what it has taken.
    pub fn taken(&self) {
        if !self.any.load(Ordering::Acquire) {
            self.open.store(false, Ordering::Release);
        }
    }
}
