//! Processes of the host: known by number and start time, so that a number that is used again is not mistaken.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

/// A process that may have ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// When it was started, in ticks since the host was.
    pub started: u64,
}

impl Process {
    /// The process that has this number now.
    pub fn of(pid: u32) -> io::Result<Self> {
        Ok(Self { pid, started: start_time(pid)? })
    }

    /// Whether it has not ended.
    pub fn is_alive(&self) -> bool {
        self.open().is_ok_and(|found| found.is_some_and(|pidfd| !ended(&pidfd, Duration::ZERO)))
    }

    /// Ends it, and returns when it has ended.
    pub fn kill(&self, within: Duration) -> io::Result<()> {
        let Some(pidfd) = self.open()? else { return Ok(()) };
        send_kill(&pidfd)?;
        if ended(&pidfd, within) {
            return Ok(());
        }
        let text = format!("process {} has not ended {within:?} after SIGKILL", self.pid);
        Err(io::Error::new(io::ErrorKind::TimedOut, text))
    }

    /// A descriptor of just this process, if it is still there.
    fn open(&self) -> io::Result<Option<OwnedFd>> {
        let Some(pidfd) = open(self.pid)? else { return Ok(None) };
        // Read after it was opened: if it is the right one now, the descriptor is that of the right one.
        Ok((start_time(self.pid).ok() == Some(self.started)).then_some(pidfd))
    }
}

/// A descriptor of whatever process has this number now.
fn open(pid: u32) -> io::Result<Option<OwnedFd>> {
    // SAFETY: takes numbers only.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if pidfd < 0 {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            Some(libc::ESRCH | libc::EINVAL) => Ok(None),
            _ => Err(error),
        };
    }
    // SAFETY: the call has just made this descriptor, for nobody else.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(pidfd as i32) }))
}

/// One that has ended already is fine.
fn send_kill(pidfd: &OwnedFd) -> io::Result<()> {
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: takes a descriptor, which is open, numbers, and no pointer to anything.
    let sent =
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), libc::SIGKILL, none, 0) };
    if sent == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ESRCH) { Ok(()) } else { Err(error) }
}

fn ended(pidfd: &OwnedFd, within: Duration) -> bool {
    let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(within).unwrap_or(PollTimeout::MAX);
    poll(&mut fds, timeout).is_ok_and(|ready| ready > 0)
}

fn start_time(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name may have anything in it, also brackets. The 22nd field is the 20th after it.
    let field = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(19));
    field
        .and_then(|field| field.parse().ok())
        .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat: {stat:?}")))
}

/// What a program says that has ended within that time; it is killed otherwise. Nobody reads meanwhile, so it says no
/// more than a pipe holds.
pub fn output(mut command: Command, within: Duration) -> io::Result<Output> {
    let program = command.get_program().to_owned();
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(
            |error| io::Error::new(error.kind(), format!("starting {}: {error}", program.display())),
        )?;
    let until = Instant::now() + within;
    while child.try_wait()?.is_none() {
        if Instant::now() >= until {
            let _ = child.kill();
            let _ = child.wait();
            let text = format!("{} has not ended within {within:?}", program.display());
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    child.wait_with_output()
}

/// A process for tests that does nothing until it is killed.
#[cfg(test)]
pub(crate) fn sleeper() -> Process {
    let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    let process = Process::of(child.id()).unwrap();
    std::thread::spawn(move || child.wait());
    process
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_not_waited_for_longer_than_that() {
        let sh = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            command
        };
        let said = output(sh("echo out; echo err >&2; exit 3"), Duration::from_secs(20)).unwrap();
        assert_eq!(
            (said.status.code(), &said.stdout[..], &said.stderr[..]),
            (Some(3), &b"out\n"[..], &b"err\n"[..])
        );
        let late = output(sh("exec sleep 60"), Duration::from_millis(50)).unwrap_err();
        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
        assert!(
            output(Command::new("/none"), Duration::from_secs(1)).unwrap_err().to_string().contains("/none")
        );
    }

    #[test]
    fn only_the_right_process_is_killed() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::of(child.id()).unwrap();
        let other = Process { started: process.started + 1, ..process };
        assert!(process.is_alive() && !other.is_alive());
        other.kill(Duration::from_secs(1)).unwrap();
        assert!(process.is_alive());
        process.kill(Duration::from_secs(5)).unwrap();
        assert!(!process.is_alive());
        child.wait().unwrap();
        process.kill(Duration::from_secs(1)).unwrap();
        assert!(!process.is_alive());
    }
}
