//! A flag in the shape of a file descriptor: set by one thread or by the kernel, waited for with
//! poll by another.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

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
                // There was no more.
                Ok(read) if read < buffer.len() => return true,
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
    wait_readable_for(fds, None)
}

/// The same, but no longer than `within` (give or take a millisecond); then none of them can.
pub fn wait_readable_for(fds: &[BorrowedFd<'_>], within: Option<Duration>) -> io::Result<Vec<bool>> {
    let mut polled: Vec<_> = fds.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
    wait(&mut polled, within)?;
    Ok(polled.iter().map(|fd| fd.any().unwrap_or(true)).collect())
}

/// Waits until something happens on one of the descriptors, or for `within`, rounded up to
/// milliseconds. Without a deadline it ends only when something has happened.
pub fn wait(fds: &mut [PollFd<'_>], within: Option<Duration>) -> io::Result<()> {
    let timeout = within.map_or(PollTimeout::NONE, |within| {
        let millis = within.as_nanos().div_ceil(1_000_000);
        i32::try_from(millis).ok().and_then(|millis| millis.try_into().ok()).unwrap_or(PollTimeout::MAX)
    });
    loop {
        match poll(fds, timeout) {
            // Who waits for a while looks at the clock again anyway.
            Err(Errno::EINTR) if within.is_none() => {}
            Ok(_) | Err(Errno::EINTR) => return Ok(()),
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

    #[test]
    fn waiting_ends_at_the_deadline() {
        let event = Event::new().unwrap();
        for within in [Duration::ZERO, Duration::from_micros(1), Duration::from_millis(5)] {
            let start = std::time::Instant::now();
            assert_eq!(wait_readable_for(&[event.as_fd()], Some(within)).unwrap(), [false]);
            assert!(start.elapsed() >= within);
        }
        event.set();
        assert_eq!(wait_readable_for(&[event.as_fd()], Some(Duration::MAX)).unwrap(), [true]);
    }
}
