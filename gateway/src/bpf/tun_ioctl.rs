//! TUNSETSTEERINGEBPF, the one system call of this folder that no crate wraps.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd, RawFd},
};

/// Lets `program`, a socket filter, choose the queue of each packet that the kernel sends into the device of `queue`;
/// for all queues of the device, in place of the program it had. The device keeps it until it disappears.
///
/// # Errors
/// `EINVAL` if the kernel (before 4.16) does not know the call or `program` is no socket filter; `EBADFD` if `queue` is
/// no attached TUN queue.
pub fn set_steering(queue: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let program: RawFd = program.as_raw_fd();
    // SAFETY: both descriptors are open while they are borrowed. The kernel reads one int at the address, which is
    // valid for the call, and keeps a reference of its own to the program (linux/if_tun.h).
    #[expect(unsafe_code, reason = "ioctl takes an address")]
    let result = unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETSTEERINGEBPF, &raw const program) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
