//! How much may wait in the spool, and how much does. Knows numbers, no file; shared by who writes and who removes.

use std::{
    io,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
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
    /// What was counted last, for who must not wait for the lock, which is held while files are counted. Files, bytes;
    /// [`UNKNOWN`] until then.
    shown: [AtomicU64; 2],
}

/// More than any number of files.
const UNKNOWN: u64 = u64::MAX;

/// What waits, as far as this process knows: what another one adds or removes is not in it.
#[derive(Debug, Clone, Copy)]
struct Counted {
    level: Limits,
    at: Instant,
}

impl Stock {
    /// One that nobody has counted yet.
    pub fn new(limits: Limits) -> Self {
        Self { limits, counted: Mutex::default(), shown: [AtomicU64::new(UNKNOWN), AtomicU64::new(0)] }
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
        self.show(known.level);
        Ok(has_room)
    }

    /// Counts, where nobody has since the start, or since [`Stock::forget`].
    ///
    /// # Errors
    /// Those of `count`.
    pub fn look(&self, count: impl Fn() -> io::Result<Limits>) -> io::Result<()> {
        let mut counted = self.lock();
        if counted.is_none() {
            let level = count()?;
            *counted = Some(Counted { level, at: Instant::now() });
            self.show(level);
        }
        Ok(())
    }

    /// What waits, as far as it is known: never waits for a count. The two numbers may be of two moments.
    pub fn level(&self) -> Option<Limits> {
        let [files, bytes] = self.shown.each_ref().map(|number| number.load(Relaxed));
        (files != UNKNOWN).then_some(Limits { files, bytes })
    }

    fn show(&self, Limits { files, bytes }: Limits) {
        let [shown_files, shown_bytes] = &self.shown;
        shown_bytes.store(bytes, Relaxed);
        shown_files.store(files, Relaxed);
    }

    /// A file of `bytes` is gone. One that was removed while the others were counted may be subtracted without having been
    /// counted: harmless, so many more find room until the next count.
    pub fn give(&self, bytes: u64) {
        if let Some(Counted { level, .. }) = &mut *self.lock() {
            level.files = level.files.saturating_sub(1);
            level.bytes = level.bytes.saturating_sub(bytes);
            self.show(*level);
        }
    }

    /// Who knows what is gone: the next [`Stock::take`] or [`Stock::look`] counts.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_follows_each_change_and_stays_while_nobody_knows() {
        let stock = Stock::new(Limits { files: 3, bytes: 100 });
        let level = |files, bytes| Some(Limits { files, bytes });
        assert_eq!(stock.level(), None);
        assert!(stock.look(|| Err(io::ErrorKind::Other.into())).is_err());
        assert_eq!(stock.level(), None, "a count that failed shows nothing");
        stock.look(|| Ok(Limits { files: 1, bytes: 10 })).unwrap();
        assert_eq!(stock.level(), level(1, 10));
        stock.look(|| panic!("counted again")).unwrap();
        assert!(stock.take(20, || panic!("counted again")).unwrap());
        assert_eq!(stock.level(), level(2, 30));
        assert!(!stock.take(71, || panic!("counted again")).unwrap(), "too large");
        assert_eq!(stock.level(), level(2, 30));
        stock.give(20);
        assert_eq!(stock.level(), level(1, 10));
        stock.forget();
        stock.give(10);
        assert_eq!(stock.level(), level(1, 10), "the last that was known");
        stock.look(|| Ok(Limits { files: 0, bytes: 0 })).unwrap();
        assert_eq!(stock.level(), level(0, 0));
    }
}
