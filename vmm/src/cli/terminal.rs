//! A person's terminal, for as long as it is a guest's, and a terminal made for a guest.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// Ctrl-], by which a person takes the terminal back.
pub(super) const ESCAPE: u8 = 0x1d;

/// A terminal that hands every key to the guest. Dropping any of its clones gives it back as it was.
#[derive(Debug, Clone)]
pub(super) struct Raw(Arc<Restore>);

#[derive(Debug)]
struct Restore {
    terminal: OwnedFd,
    // A plain structure of numbers behind a cell, which keeps it from being shared.
    before: libc::termios,
}

impl Raw {
    /// Of standard input, if that is a terminal.
    pub(super) fn of_stdin() -> io::Result<Option<Self>> {
        let Ok(before) = tcgetattr(io::stdin()) else { return Ok(None) };
        let terminal = io::stdin().as_fd().try_clone_to_owned()?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&terminal, SetArg::TCSANOW, &raw)?;
        let guard = Self(Arc::new(Restore { terminal, before: before.into() }));
        // A panic ends the process without dropping anything.
        let (in_panic, hook) = (guard.clone(), std::panic::take_hook());
        std::panic::set_hook(Box::new(move |info| {
            in_panic.restore();
            hook(info);
        }));
        Ok(Some(guard))
    }

    /// Gives it back, for those who end the process without dropping anything.
    pub(super) fn restore(&self) {
        // Should the terminal be gone, there is nothing to give back.
        let _ = tcsetattr(&self.0.terminal, SetArg::TCSANOW, &Termios::from(self.0.before));
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        self.restore();
    }
}

/// Keys of a terminal. At the escape they end, after `on_escape` has been called.
pub(super) struct Keys<R, F> {
    pub(super) source: R,
    pub(super) on_escape: F,
    pub(super) ended: bool,
}

impl<R: Read, F: FnMut()> Read for Keys<R, F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.ended {
            return Ok(0);
        }
        let count = self.source.read(buffer)?;
        match buffer[..count].iter().position(|byte| *byte == ESCAPE) {
            Some(at) => {
                self.ended = true;
                (self.on_escape)();
                Ok(at)
            }
            None => Ok(count),
        }
    }
}

/// A terminal for a guest.
pub(super) struct Pty {
    /// Ours: what is written here is shown there, and what is typed there is read here.
    pub(super) ours: File,
    /// Where a person finds it.
    pub(super) path: PathBuf,
    /// Kept open, so that the terminal stays when a person leaves.
    pub(super) theirs: OwnedFd,
}

impl Pty {
    pub(super) fn open() -> io::Result<Self> {
        let pty = nix::pty::openpty(None, None)?;
        let mut raw = tcgetattr(&pty.slave)?;
        // Otherwise it would echo what the guest prints to the guest.
        cfmakeraw(&mut raw);
        tcsetattr(&pty.slave, SetArg::TCSANOW, &raw)?;
        let path = nix::unistd::ttyname(&pty.slave)?;
        Ok(Self { ours: File::from(pty.master), path, theirs: pty.slave })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_end_at_the_escape() {
        for (typed, expected, escapes) in [
            (&b"ls\x03\n"[..], &b"ls\x03\n"[..], 0),
            (b"", b"", 0),
            (b"\x1d", b"", 1),
            (b"ab\x1dcd\x1d", b"ab", 1),
        ] {
            let mut seen = 0;
            let mut keys = Keys { source: typed, on_escape: || seen += 1, ended: false };
            let mut got = Vec::new();
            keys.read_to_end(&mut got).unwrap();
            assert_eq!((got.as_slice(), seen), (expected, escapes), "{typed:?}");
        }
    }
}
