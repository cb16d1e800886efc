//! How much may wait in the spool, and how much does. Knows numbers, no file; shared by who writes and who removes.

use std::{
    io,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// What may wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Files of records.
    pub files: u64,
    /// Their contents.
    pub bytes: u64,
}

/// An outage of half a day with one flow a second, two files each. On a file system with blocks of 4 KiB that is 400 MB. A
/// file has less than 1 KB usually, and 5 KB at most.
pub const LIMITS: Limits = Limits { files: 100_000, bytes: 256 << 20 };

/// A stock that seems to be full is counted again after this time: somebody else may have made room.
const RECOUNT: Duration = Duration::from_secs(60);

/// What waits.
#[derive(Debug)]
pub struct Stock {
    limits: Limits,
    /// `None` until it is counted.
    counted: Mutex<Option<Counted>>,
}

/// What waits, as far as this process knows: what another one adds or removes is not in it.
#[derive(Debug, Clone, Copy)]
struct Counted {
    level: Limits,
    at: Instant,
}

impl Stock {
    /// One that nobody has counted yet.
    pub fn new(limits: Limits) -> Self {
        Self { limits, counted: Mutex::default() }
    }

    /// Makes room for a file of `bytes`; false if there is none. `count` looks at all files.
    ///
    /// # Errors
    /// Those of `count`.
    pub fn take(&self, bytes: u64, count: impl Fn() -> io::Result<Limits>) -> io::Result<bool> {
        let mut counted = self.lock();
        let mut known = match *counted {
            Some(known) if self.has_room(known.level, bytes) || known.at.elapsed() < RECOUNT => known,
            _ => Counted { level: count()?, at: Instant::now() },
        };
        let has_room = self.has_room(known.level, bytes);
        if has_room {
            known.level.files += 1;
            known.level.bytes += bytes;
        }
        *counted = Some(known);
        Ok(has_room)
    }

    /// A file of `bytes` is gone. One that was removed while the others were counted may be subtracted without having been
    /// counted: harmless, so many more find room until the next count.
    pub fn give(&self, bytes: u64) {
        if let Some(Counted { level, .. }) = &mut *self.lock() {
            level.files = level.files.saturating_sub(1);
            level.bytes = level.bytes.saturating_sub(bytes);
        }
    }

    /// Who knows what is gone: the next [`Stock::take`] counts.
    pub fn forget(&self) {
        *self.lock() = None;
    }

    fn has_room(&self, level: Limits, bytes: u64) -> bool {
        level.files < self.limits.files && level.bytes.saturating_add(bytes) <= self.limits.bytes
    }

    fn lock(&self) -> MutexGuard<'_, Option<Counted>> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
