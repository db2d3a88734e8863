//! The system call.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use nix::errno::Errno;

/// `bpf(2)`.
///
/// # Safety
/// What the attributes point to is as the command wants it until the call returns.
pub unsafe fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<i32> {
    // SAFETY: the kernel reads as many bytes of the structure as it has; the rest is the caller's promise.
    let done =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    i32::try_from(Errno::result(done)?).map_err(io::Error::other)
}

/// A descriptor that the kernel has just made.
pub fn owned(fd: i32) -> OwnedFd {
    // SAFETY: nobody else knows its number.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
