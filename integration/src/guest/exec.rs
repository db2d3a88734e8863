//! Commands in a guest: one stream each, in the frames of the test bed's init.

use std::borrow::Cow;
use std::fmt;
use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use testbed::{Exec, Kind, Reply, Request, read_frame, write_frame, write_json};

use crate::command::{printable, tail};

/// For what a command has said and nobody has read.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// A command that runs in a guest. Dropping it ends the command.
pub struct Session {
    stream: UnixStream,
    command: String,
    ends: Instant,
    ran: Ran,
    /// How much of its stdout has been waited for.
    seen: usize,
    ended: bool,
}

/// What a command did.
#[derive(Clone, Debug, Default)]
pub struct Ran {
    /// Its exit code, as a shell tells it.
    pub code: i32,
    /// All of its stdout.
    pub stdout: Vec<u8>,
    /// All of its stderr.
    pub stderr: Vec<u8>,
}

impl Ran {
    /// Its stdout as text.
    pub fn out(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.stdout)
    }
}

impl fmt::Display for Ran {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "code {}", self.code)?;
        for bytes in [&self.stdout, &self.stderr] {
            for line in tail(&String::from_utf8_lossy(bytes), 20).lines() {
                write!(f, "\n    | {}", printable(line))?;
            }
        }
        Ok(())
    }
}

impl Session {
    /// Starts `argv`, which may take `within`.
    pub fn begin(stream: UnixStream, argv: Vec<String>, within: Duration) -> Result<Self> {
        let command = argv.join(" ");
        let exec = Exec { argv, env: Vec::new(), terminal: None };
        write_json(&stream, Kind::Request, &Request::Exec(exec)).context("sending the guest a command")?;
        let ends = Instant::now() + within;
        Ok(Self { stream, command, ends, ran: Ran::default(), seen: 0, ended: false })
    }

    /// Feeds it `bytes`; none at all ends its input.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<()> {
        write_frame(&self.stream, Kind::Stdin, bytes).context("feeding a command in the guest")
    }

    /// Waits until its stdout has `text`, behind what was waited for before.
    pub fn until_stdout_has(&mut self, text: &str) -> Result<()> {
        loop {
            let new = &self.ran.stdout[self.seen..];
            let found = new.windows(text.len().max(1)).position(|window| window == text.as_bytes());
            if let Some(at) = found {
                self.seen += at + text.len();
                return Ok(());
            }
            if let Some(code) = self.step()? {
                bail!("`{}` ended with {code} before it said {text:?}: {}", self.command, self.ran);
            }
        }
    }

    /// Waits for its end.
    pub fn finish(mut self) -> Result<Ran> {
        loop {
            if let Some(code) = self.step()? {
                self.ran.code = code;
                return Ok(std::mem::take(&mut self.ran));
            }
        }
    }

    /// Takes one frame; gives the exit code when it was the last.
    fn step(&mut self) -> Result<Option<i32>> {
        let left = self.ends.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        self.stream.set_read_timeout(Some(left))?;
        match read_frame(&self.stream) {
            Ok(Some((Kind::Stdout, bytes))) => self.ran.stdout.extend(bytes),
            Ok(Some((Kind::Stderr, bytes))) => self.ran.stderr.extend(bytes),
            Ok(Some((Kind::Reply, payload))) => {
                self.ended = true;
                let reply: Reply = serde_json::from_slice(&payload)?;
                if let Reply::Failed(why) = &reply {
                    bail!("in the guest `{}`: {why}", self.command);
                }
                return Ok(Some(reply.shell_code()));
            }
            Ok(Some((kind, _))) => bail!("the guest sent a frame of kind {kind:?}"),
            Ok(None) => bail!("the guest went away while `{}` ran: {}", self.command, self.ran),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                bail!("in the guest `{}` did not end in time: {}", self.command, self.ran)
            }
            Err(error) => {
                return Err(error).with_context(|| format!("waiting for `{}` in the guest", self.command));
            }
        }
        Ok(None)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        // Whoever looks for the cause of a failure wants to know what it said until now.
        self.ends = Instant::now() + LAST_WORDS;
        while Instant::now() < self.ends && matches!(self.step(), Ok(None)) {}
        if !self.ended {
            eprintln!("  in the guest `{}` still ran: {}", self.command, self.ran);
        }
    }
}

/// Whether anybody answers.
pub(super) fn ping(stream: &UnixStream, within: Duration) -> Result<()> {
    ask(stream, &Request::Ping, within)
}

/// Makes the guest turn itself off.
pub(super) fn power_off(stream: &UnixStream, within: Duration) -> Result<()> {
    ask(stream, &Request::PowerOff, within)
}

fn ask(stream: &UnixStream, request: &Request, within: Duration) -> Result<()> {
    stream.set_read_timeout(Some(within))?;
    write_json(stream, Kind::Request, request).context("asking the guest's init")?;
    match read_frame(stream).context("waiting for the guest's init")? {
        Some((Kind::Reply, payload)) => match serde_json::from_slice(&payload)? {
            Reply::Failed(why) => bail!("the guest's init says {why}"),
            _ => Ok(()),
        },
        Some((kind, _)) => bail!("the guest's init sent a frame of kind {kind:?}"),
        None => bail!("the guest's init hung up"),
    }
}
