//! Logging processes: `binary:///path?key=value` reads output on descriptors 3 and 4, and closes 5 when it is ready.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Stdio;

use log::warn;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, pipe2};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::time::timeout;

use super::sink::Sink;
use crate::deadlines;
use crate::error::{Attempt, Error, Result};

/// A process that takes output.
#[derive(Debug)]
pub(super) struct Logger(Child);

/// The program, and its arguments: keys and values of the query.
fn parse(uri: &str) -> (String, Vec<String>) {
    let (path, query) = uri.split_once('?').unwrap_or((uri, ""));
    let mut arguments = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        arguments.push(decode(key, true));
        if !value.is_empty() {
            arguments.push(decode(value, true));
        }
    }
    (decode(path, false), arguments)
}

/// `%2F` is `/`; in a query, `+` is a space.
fn decode(text: &str, query: bool) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let code = tail.get(..2).and_then(|code| std::str::from_utf8(code).ok());
        let code = code.and_then(|code| u8::from_str_radix(code, 16).ok());
        let (decoded, length) = match (byte, code) {
            (b'%', Some(code)) => (code, 2),
            (b'+', _) if query => (b' ', 0),
            _ => (byte, 0),
        };
        bytes.push(decoded);
        rest = &tail[length..];
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn above(fd: &OwnedFd) -> io::Result<OwnedFd> {
    let copy = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(10))?;
    // SAFETY: the call has just made this descriptor, for nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

impl Logger {
    /// Starts one, and returns when it is ready, with what its output streams are to be written to.
    pub(super) async fn start(
        uri: &str,
        acknowledged: bool,
        environment: &[(String, String)],
    ) -> Result<(Self, [Sink; 2])> {
        let (program, arguments) = parse(uri);
        let what = format!("starting the logging process {program}");
        let make = || -> io::Result<_> {
            let (mut inherited, mut ours) = (Vec::new(), Vec::new());
            for (writes, number) in [(true, 3), (true, 4), (false, 5)] {
                let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
                let (theirs, own) = if writes { (read, write) } else { (write, read) };
                inherited.push((above(&theirs)?, number));
                ours.push(own);
            }
            let mut command = Command::new(&program);
            command.args(arguments).env_clear().envs(environment.iter().cloned());
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            // SAFETY: after the fork there are only system calls that take numbers.
            unsafe {
                command.pre_exec(move || {
                    for (from, to) in &inherited {
                        if libc::dup2(from.as_raw_fd(), *to) < 0 {
                            return Err(io::Error::last_os_error());
                        }
                    }
                    Ok(())
                });
            }
            command.kill_on_drop(true);
            // The command has the other ends; with it they are closed here.
            let child = command.spawn()?;
            Ok((child, ours))
        };
        let (child, ours) = make().attempt(&what)?;
        let mut ours = ours.into_iter();
        let mut next = || ours.next().ok_or_else(|| Error::unknown("a pipe is missing"));
        let (stdout, stderr, ready) = (next()?, next()?, next()?);
        let logger = Self(child);
        let mut ready = pipe::Receiver::from_owned_fd(nonblocking(ready).attempt(&what)?).attempt(&what)?;
        let mut said = Vec::new();
        match timeout(deadlines::LOGGER_READY, ready.read_to_end(&mut said)).await {
            Err(_) => {
                return Err(Error::deadline(format!(
                    "{what}: it is not ready after {:?}",
                    deadlines::LOGGER_READY
                )));
            }
            Ok(Err(error)) => return Err(error).attempt(what),
            Ok(Ok(0)) if acknowledged => {
                return Err(Error::unknown(format!("{what}: it ended without saying that it is ready")));
            }
            Ok(Ok(_)) => {}
        }
        let sink = |fd| io::Result::Ok(Sink::pipe(pipe::Sender::from_owned_fd(nonblocking(fd)?)?, None));
        let sinks = [sink(stdout).attempt(&what)?, sink(stderr).attempt(&what)?];
        Ok((logger, sinks))
    }

    /// Lets it read the rest, whose end it has seen, and ends it.
    pub(super) async fn end(mut self) {
        if timeout(deadlines::LOGGER_END, self.0.wait()).await.is_ok() {
            return;
        }
        warn!("the logging process has not ended {:?} after its input", deadlines::LOGGER_END);
        if let Some(pid) = self.0.id().and_then(|pid| i32::try_from(pid).ok()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        if timeout(deadlines::LOGGER_END, self.0.wait()).await.is_err() {
            let _ = self.0.kill().await;
        }
    }
}

fn nonblocking(fd: OwnedFd) -> io::Result<OwnedFd> {
    fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_and_their_arguments() {
        assert_eq!(
            parse("/usr/bin/nerdctl?_NERDCTL_INTERNAL_LOGGING=%2Fvar%2Flib&flag&a=b+c"),
            (
                "/usr/bin/nerdctl".to_owned(),
                ["_NERDCTL_INTERNAL_LOGGING", "/var/lib", "flag", "a", "b c"].map(str::to_owned).to_vec()
            )
        );
        assert_eq!(decode("%zz+%4", false), "%zz+%4");
    }
}
