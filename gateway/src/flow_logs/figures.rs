//! What became of flow logs, in numbers: counted by the two threads, read by any, without a lock.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

/// Counters of the two threads.
#[derive(Debug, Default)]
pub struct Tally {
    /// Records that found no room in the spool.
    pub no_room: AtomicU64,
    /// Writes to disk that failed.
    pub failed: AtomicU64,
    /// Records that the endpoint took, or refused for good: they are gone from the spool.
    pub uploaded: AtomicU64,
    /// Whether the last pass of the upload failed.
    pub upload_fails: AtomicBool,
}

/// How it is at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Figures {
    /// Orders that wait to be written.
    pub waiting: usize,
    /// Orders that were lost for want of room before the writer.
    pub lost: u64,
    /// Records that found no room in the spool.
    pub no_room: u64,
    /// Writes to disk that failed.
    pub failed: u64,
    /// Files in the spool, and their bytes. `None` until they were counted.
    pub spool: Option<(u64, u64)>,
    /// Records that the endpoint took, or refused for good.
    pub uploaded: u64,
    /// Whether the last pass of the upload failed.
    pub upload_fails: bool,
}

impl Tally {
    /// The threads' part; what is waiting, lost and in the spool others know.
    pub fn read(&self) -> Figures {
        Figures {
            no_room: self.no_room.load(Relaxed),
            failed: self.failed.load(Relaxed),
            uploaded: self.uploaded.load(Relaxed),
            upload_fails: self.upload_fails.load(Relaxed),
            ..Figures::default()
        }
    }
}
