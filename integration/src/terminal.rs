//! A program on a terminal, as a person has it: what is typed, what is shown, and the size of the window.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;

use crate::command::contains;
use crate::wait::{Attempt, until};

/// A running program and its terminal. Dropping it kills the program.
pub struct Terminal {
    child: Child,
    words: String,
    side: File,
}

impl Terminal {
    /// Runs `words` on a terminal of this size, in columns and lines.
    pub fn run(words: &[String], size: (u16, u16)) -> Result<Self> {
        let text = words.join(" ");
        eprintln!("$ {text} (on a terminal)");
        let what = || format!("starting `{text}` on a terminal");
        let OpenptyResult { master, slave } = openpty(&winsize(size), None).with_context(what)?;
        fcntl(&master, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).with_context(what)?;
        fcntl(&master, FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK)).with_context(what)?;
        let (program, arguments) = words.split_first().context("there is no program to start")?;
        let copy = |fd: &OwnedFd| fd.try_clone().with_context(what);
        let mut command = Command::new(program);
        command.args(arguments).stdin(copy(&slave)?).stdout(copy(&slave)?).stderr(slave);
        // SAFETY: between fork and exec there are only system calls, which neither allocate nor lock.
        unsafe {
            command.pre_exec(|| {
                set_pdeathsig(Some(Signal::SIGKILL))?;
                nix::unistd::setsid()?;
                // The terminal is its standard input by now.
                Errno::result(libc::ioctl(0, libc::TIOCSCTTY, 0))?;
                Ok(())
            });
        }
        let child = command.spawn().with_context(what)?;
        // The other side is the program's alone, so that its end is seen.
        drop(command);
        Ok(Self { child, words: text, side: master.into() })
    }

    /// Types `bytes`.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.side.write_all(bytes).with_context(|| format!("typing to `{}`", self.words))
    }

    /// Gives the window another size, in columns and lines.
    pub fn resize(&self, size: (u16, u16)) -> Result<()> {
        let size = winsize(size);
        // SAFETY: the descriptor is open, and the request reads a `struct winsize`, which this is.
        let done = unsafe { libc::ioctl(self.side.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
        Errno::result(done).map(drop).with_context(|| format!("resizing the terminal of `{}`", self.words))
    }

    /// What is shown up to and with `text`, or a little more.
    pub fn read_until(&mut self, text: &str, deadline: Duration) -> Result<Vec<u8>> {
        let mut shown = Vec::new();
        self.read(deadline, &mut shown, |shown| contains(shown, text.as_bytes()))?;
        if !contains(&shown, text.as_bytes()) {
            bail!("`{}` ended without {text:?}: {:?}", self.words, String::from_utf8_lossy(&shown));
        }
        Ok(shown)
    }

    /// The rest of what is shown, and how the program ended.
    pub fn end(mut self, deadline: Duration) -> Result<(Vec<u8>, ExitStatus)> {
        let mut shown = Vec::new();
        self.read(deadline, &mut shown, |_| false)?;
        let ended = until(&format!("`{}` to end", self.words), deadline, || match self.child.try_wait() {
            Ok(Some(status)) => Attempt::Done(status),
            other => Attempt::Pending(format!("{other:?}")),
        })?;
        Ok((shown, ended))
    }

    /// Kills the program, as when its window is gone.
    pub fn kill(mut self) -> io::Result<()> {
        self.child.kill()?;
        self.child.wait().map(drop)
    }

    fn read(&mut self, deadline: Duration, shown: &mut Vec<u8>, done: impl Fn(&[u8]) -> bool) -> Result<()> {
        let ends = Instant::now() + deadline;
        let mut buffer = vec![0; 64 * 1024];
        while !done(shown) {
            let left = ends.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let so_far = String::from_utf8_lossy(shown);
                bail!("waited {:.1} s for `{}`; it shows {so_far:?}", deadline.as_secs_f64(), self.words);
            }
            let mut wanted = [PollFd::new(self.side.as_fd(), PollFlags::POLLIN)];
            match poll(&mut wanted, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
                Ok(0) | Err(Errno::EINTR) => continue,
                Ok(_) => {}
                Err(error) => return Err(error).context("polling a terminal"),
            }
            match self.side.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => shown.extend_from_slice(&buffer[..count]),
                // Nobody has the other side any more.
                Err(error) if error.raw_os_error() == Some(libc::EIO) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("reading a terminal"),
            }
        }
        Ok(())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn winsize((columns, lines): (u16, u16)) -> Winsize {
    Winsize { ws_row: lines, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    fn shell(script: &str) -> Terminal {
        Terminal::run(&["sh".to_owned(), "-c".to_owned(), script.to_owned()], (91, 37)).unwrap()
    }

    #[test]
    fn typed_and_shown() {
        let mut terminal = shell("tty >/dev/null && stty size; read line; echo got $line; stty size; exit 4");
        terminal.read_until("37 91\r\n", LONG).unwrap();
        terminal.resize((100, 50)).unwrap();
        terminal.write(b"typed\n").unwrap();
        let (shown, status) = terminal.end(LONG).unwrap();
        assert_eq!(String::from_utf8_lossy(&shown), "typed\r\ngot typed\r\n50 100\r\n");
        assert_eq!(status.code(), Some(4));
    }

    #[test]
    fn keys_that_are_signals() {
        let mut terminal = shell("trap 'echo caught; exit 5' INT; echo ready; while :; do sleep 0.1; done");
        terminal.read_until("ready", LONG).unwrap();
        terminal.write(b"\x03").unwrap();
        let (shown, status) = terminal.end(LONG).unwrap();
        assert!(contains(&shown, b"caught"), "{:?}", String::from_utf8_lossy(&shown));
        assert_eq!(status.code(), Some(5));
    }

    #[test]
    fn silence_is_given_up() {
        let error = shell("exec sleep 1000").read_until("word", Duration::from_millis(50)).unwrap_err();
        assert!(error.to_string().contains("waited"), "{error}");
    }
}
