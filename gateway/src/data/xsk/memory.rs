//! Memory that is shared with the kernel: mapped once, seen only as atomic words. Frames are `umem.rs`.

use std::{
    io,
    os::fd::BorrowedFd,
    ptr::{self, NonNull},
    sync::atomic::{AtomicU32, AtomicU64},
};

use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// A mapping; it ends when this is dropped.
pub struct Area {
    base: NonNull<u8>,
    len: usize,
}

#[expect(unsafe_code, reason = "the mapping belongs to no thread")]
// SAFETY: `base` is a mapping of the process. What is reached through a shared reference are atomics, and pointers
// whose users say themselves what they rely on.
unsafe impl Send for Area {}
#[expect(unsafe_code, reason = "the mapping belongs to no thread")]
// SAFETY: as above.
unsafe impl Sync for Area {}

impl Area {
    /// `len` bytes of zeros.
    ///
    /// # Errors
    /// There is no memory.
    pub fn anonymous(len: usize) -> io::Result<Self> {
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::POPULATE);
        // SAFETY: no address is asked for, so no mapping of anybody is touched.
        #[expect(unsafe_code, reason = "mmap can be told to replace mappings")]
        let base = unsafe { mmap_anonymous(ptr::null_mut(), len, prot, flags) }?;
        Self::new(base.cast(), len)
    }

    /// `len` bytes from `offset` on of what `fd` offers to be mapped: a ring of an AF_XDP socket.
    ///
    /// # Errors
    /// `fd` has nothing there, or less.
    pub fn of(fd: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<Self> {
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::POPULATE);
        // SAFETY: no address is asked for, so no mapping of anybody is touched.
        #[expect(unsafe_code, reason = "mmap can be told to replace mappings")]
        let base = unsafe { mmap(ptr::null_mut(), len, prot, flags, fd, offset) }?;
        Self::new(base.cast(), len)
    }

    fn new(base: *mut u8, len: usize) -> io::Result<Self> {
        let base = NonNull::new(base).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, len })
    }

    /// How many bytes it has.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Where it begins, at a page.
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// The 32-bit word at byte `at`; `None` if there is none, or not at a multiple of its size.
    pub fn word(&self, at: usize) -> Option<&AtomicU32> {
        self.fits::<AtomicU32>(at, 1)?;
        // SAFETY: inside the mapping and aligned, by the line above; zeros or whatever the kernel writes is a valid
        // value, and both sides access it atomically as long as the mapping lives.
        #[expect(unsafe_code, reason = "a word of a mapping")]
        let word = unsafe { self.base.byte_add(at).cast::<AtomicU32>().as_ref() };
        Some(word)
    }

    /// `count` 64-bit words from byte `at` on; `None` if they are not all there, or not at a multiple of their size.
    pub fn words(&self, at: usize, count: usize) -> Option<&[AtomicU64]> {
        self.fits::<AtomicU64>(at, count)?;
        // SAFETY: as above, for each of them.
        #[expect(unsafe_code, reason = "words of a mapping")]
        let words = unsafe { NonNull::slice_from_raw_parts(self.base.byte_add(at).cast(), count).as_ref() };
        Some(words)
    }

    fn fits<T>(&self, at: usize, count: usize) -> Option<()> {
        let end = count.checked_mul(size_of::<T>())?.checked_add(at)?;
        (end <= self.len && at.is_multiple_of(align_of::<T>())).then_some(())
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: ours since `new`; what was lent of it borrowed from `self`.
        #[expect(unsafe_code, reason = "munmap of a mapping that was ours")]
        // One that cannot be unmapped stays until the process ends.
        let _stays = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn words_are_inside_and_aligned_or_not_there() {
        let area = Area::anonymous(4096).unwrap();
        assert_eq!(area.len(), 4096);
        for (at, there) in [(0, true), (4, true), (2, false), (4092, true), (4093, false), (4096, false)] {
            assert_eq!(area.word(at).is_some(), there, "word at {at}");
        }
        let table = [
            (0, 512, true),
            (0, 513, false),
            (8, 511, true),
            (8, 512, false),
            (4, 1, false),
            (4096, 0, true),
            (4088, usize::MAX, false),
        ];
        for (at, count, there) in table {
            assert_eq!(area.words(at, count).is_some(), there, "{count} words at {at}");
        }
        area.word(8).unwrap().store(7, Ordering::Relaxed);
        assert_eq!(
            area.words(8, 1).unwrap()[0].load(Ordering::Relaxed).to_ne_bytes()[..4],
            7_u32.to_ne_bytes()
        );
    }
}
