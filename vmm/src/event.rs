//! A flag in the shape of a file descriptor: set by one thread or by the kernel, waited for with
//! poll by another.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd;

/// The flag. Setting it twice before it is taken is the same as setting it once.
#[derive(Debug)]
pub struct Event {
    read: OwnedFd,
    /// Where there is no eventfd, the two ends of a pipe differ.
    #[cfg(not(target_os = "linux"))]
    write: OwnedFd,
}

impl Event {
    /// Not set.
    #[cfg(target_os = "linux")]
    pub fn new() -> io::Result<Self> {
        use nix::sys::eventfd::{EfdFlags, EventFd};
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { read: event.into() })
    }

    /// Not set.
    #[cfg(not(target_os = "linux"))]
    pub fn new() -> io::Result<Self> {
        use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
        let (read, write) = unistd::pipe()?;
        for fd in [&read, &write] {
            fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        }
        Ok(Self { read, write })
    }

    #[cfg(target_os = "linux")]
    fn write_end(&self) -> &OwnedFd {
        &self.read
    }

    #[cfg(not(target_os = "linux"))]
    fn write_end(&self) -> &OwnedFd {
        &self.write
    }

    /// Sets it.
    pub fn set(&self) {
        // It fails when the counter or the pipe is full: then the flag is set already.
        let _ = unistd::write(self.write_end(), &1u64.to_ne_bytes());
    }

    /// Takes it: says whether it was set, and clears it.
    pub fn take(&self) -> bool {
        let mut buffer = [0; 512];
        let mut set = false;
        loop {
            match unistd::read(&self.read, &mut buffer) {
                Ok(0) => return set,
                Ok(_) => set = true,
                Err(Errno::EINTR) => {}
                Err(_) => return set,
            }
        }
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.read.as_fd()
    }
}

/// Waits until one of the descriptors can be read, and says which can.
pub fn wait_readable(fds: &[BorrowedFd<'_>]) -> io::Result<Vec<bool>> {
    let mut polled: Vec<_> = fds.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
    loop {
        match poll(&mut polled, PollTimeout::NONE) {
            Ok(_) => return Ok(polled.iter().map(|fd| fd.any().unwrap_or(true)).collect()),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_often_taken_once() {
        let event = Event::new().unwrap();
        assert!(!event.take());
        for _ in 0..100_000 {
            event.set();
        }
        assert!(event.take());
        assert!(!event.take());
    }

    #[test]
    fn waiting_tells_which() {
        let (a, b) = (Event::new().unwrap(), Event::new().unwrap());
        b.set();
        assert_eq!(wait_readable(&[a.as_fd(), b.as_fd()]).unwrap(), [false, true]);
        a.set();
        assert_eq!(wait_readable(&[a.as_fd(), b.as_fd()]).unwrap(), [true, true]);
    }
}
