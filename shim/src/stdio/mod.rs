//! Streams of a process, from the machine to where the client wants them, and back.
//!
//! Nothing is kept but one buffer a stream, so whoever reads slowly slows the process. A client that goes away and
//! comes back finds its FIFOs open: the shim holds both ends of each. Only `CloseIO` is the end of input, and only
//! the end of the process's stream, or its removal, that of output.

mod logger;
mod pump;
mod sink;

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use agent_api::agent::Stdio;
use agent_api::stdio::Stream;
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::deadlines;
use crate::error::{Attempt, Error, Result};
use crate::guest::Guest;
use crate::ledger::Io;
use logger::Logger;
use pump::{Meter, pump_in, pump_out};
use sink::Sink;

/// Both ends of the client's streams, opened.
pub struct Opened {
    stdin: Option<(pipe::Receiver, OwnedFd)>,
    outputs: Vec<(Stream, Sink)>,
    logger: Option<Logger>,
}

/// Where a stream leads.
#[derive(Debug, PartialEq, Eq)]
enum Place<'a> {
    Nowhere,
    Path(&'a str),
    File(&'a str),
    Program { uri: &'a str, acknowledged: bool },
}

fn place(uri: &str) -> Result<Place<'_>> {
    let Some((scheme, rest)) = uri.split_once("://") else {
        return Ok(if uri.is_empty() { Place::Nowhere } else { Place::Path(uri) });
    };
    match scheme {
        "fifo" => Ok(Place::Path(rest)),
        "file" => Ok(Place::File(rest)),
        "binary" => Ok(Place::Program { uri: rest, acknowledged: false }),
        "binary-v2" => Ok(Place::Program { uri: rest, acknowledged: true }),
        _ => Err(Error::invalid(format!(
            "streams to {uri} are not supported; there are FIFOs, file://, binary:// and binary-v2://"
        ))),
    }
}

impl Opened {
    /// Opens where the client's streams lead. `environment` is for a logging process.
    pub async fn open(io: &Io, environment: &[(String, String)]) -> Result<Self> {
        let stdin = match place(&io.stdin)? {
            Place::Nowhere => None,
            Place::Path(path) | Place::File(path) => open_input(path)?,
            Place::Program { .. } => return Err(Error::invalid("a logging process has no input to give")),
        };
        let mut opened = Self { stdin, outputs: Vec::new(), logger: None };
        if let Place::Program { uri, acknowledged } = place(&io.stdout)? {
            let (logger, [stdout, stderr]) = Logger::start(uri, acknowledged, environment).await?;
            opened.logger = Some(logger);
            opened.outputs.push((Stream::Stdout, stdout));
            if !io.terminal && !io.stderr.is_empty() {
                opened.outputs.push((Stream::Stderr, stderr));
            }
            return Ok(opened);
        }
        let stderr = if io.terminal { "" } else { &io.stderr };
        for (stream, uri) in [(Stream::Stdout, io.stdout.as_str()), (Stream::Stderr, stderr)] {
            let sink = match place(uri)? {
                Place::Nowhere => continue,
                Place::Path(path) => open_output(path)?,
                Place::File(path) => open_file(path)?,
                Place::Program { .. } => {
                    return Err(Error::invalid("a logging process takes standard output and error together"));
                }
            };
            opened.outputs.push((stream, sink));
        }
        Ok(opened)
    }

    /// What the agent has to know.
    pub fn announce(&self, terminal: bool) -> Stdio {
        let has = |stream| self.outputs.iter().any(|(own, _)| *own == stream);
        Stdio {
            terminal,
            stdin: self.stdin.is_some(),
            stdout: has(Stream::Stdout),
            stderr: has(Stream::Stderr),
            ..Stdio::default()
        }
    }

    /// Joins them to the process, which was announced to the agent.
    pub async fn join(self, guest: &Guest, id: &str, exec: &str) -> Result<Streams> {
        let mut tasks = Vec::new();
        let mut hold = None;
        if let Some((from, held)) = self.stdin {
            let to = guest.stream(id, exec, Stream::Stdin).await?;
            tasks.push(tokio::spawn(pump_in(from, to)));
            hold = Some(held);
        }
        let mut outputs = Vec::new();
        for (stream, sink) in self.outputs {
            let from = guest.stream(id, exec, stream).await?;
            let meter = Meter::default();
            outputs.push((tokio::spawn(pump_out(from, sink, meter.clone())), meter));
        }
        Ok(Streams {
            input: Mutex::new((hold, tasks.pop())),
            outputs: Mutex::new(outputs),
            logger: Mutex::new(self.logger),
        })
    }
}

/// A FIFO for reading. The writing end is held, so that a client which goes away is not the end.
fn open_input(path: &str) -> Result<Option<(pipe::Receiver, OwnedFd)>> {
    let what = format!("opening {path} for standard input");
    let kind = std::fs::metadata(path).attempt(&what)?.file_type();
    if !kind.is_fifo() {
        // /dev/null and the like have nothing to give.
        return Ok(None);
    }
    let read = open(path, OpenOptions::new().read(true)).attempt(&what)?;
    let held = open(path, OpenOptions::new().write(true)).attempt(&what)?;
    Ok(Some((pipe::Receiver::from_file(read).attempt(&what)?, held.into())))
}

fn open(path: &str, options: &mut OpenOptions) -> std::io::Result<File> {
    options.custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path)
}

/// A FIFO for writing. The reading end is held, so that a client can go away and another come.
fn open_output(path: &str) -> Result<Sink> {
    let what = format!("opening {path} for output");
    if !std::fs::metadata(path).attempt(&what)?.file_type().is_fifo() {
        return open_file(path);
    }
    let held = open(path, OpenOptions::new().read(true)).attempt(&what)?;
    let write = open(path, OpenOptions::new().write(true)).attempt(&what)?;
    Ok(Sink::pipe(pipe::Sender::from_file(write).attempt(&what)?, Some(held.into())))
}

fn open_file(path: &str) -> Result<Sink> {
    let what = format!("opening {path} for output");
    if let Some(parent) = Path::new(path).parent().filter(|parent| !parent.exists()) {
        std::fs::create_dir_all(parent).attempt(&what)?;
    }
    let file = OpenOptions::new().append(true).create(true).mode(0o644).open(path).attempt(&what)?;
    Ok(Sink::file(file))
}

type Input = (Option<OwnedFd>, Option<JoinHandle<()>>);

/// The streams of a process. Dropping them cuts them off.
pub struct Streams {
    input: Mutex<Input>,
    outputs: Mutex<Vec<(JoinHandle<()>, Meter)>>,
    logger: Mutex<Option<Logger>>,
}

impl Streams {
    /// The end of input, after what was written so far.
    pub fn close_input(&self) {
        self.input.lock().unwrap_or_else(PoisonError::into_inner).0 = None;
    }

    fn meters(&self) -> Vec<Meter> {
        let outputs = self.outputs.lock().unwrap_or_else(PoisonError::into_inner);
        outputs.iter().map(|(_, meter)| meter.clone()).collect()
    }

    /// Returns when all that an exited process has written is where the client wants it, or after a deadline.
    pub async fn drain(&self) {
        for meter in self.meters() {
            let _ = timeout(deadlines::DRAIN, meter.drained(Some(deadlines::IDLE))).await;
        }
    }

    /// Ends them. What the process has written is waited for, but not for ever.
    pub async fn close(&self) {
        let (_, input) = std::mem::take(&mut *self.input.lock().unwrap_or_else(PoisonError::into_inner));
        if let Some(input) = input {
            input.abort();
        }
        let all = async {
            for meter in self.meters() {
                meter.drained(None).await;
            }
        };
        let _ = timeout(deadlines::DRAIN + Duration::from_secs(1), all).await;
        let outputs = std::mem::take(&mut *self.outputs.lock().unwrap_or_else(PoisonError::into_inner));
        for (pump, _) in outputs {
            pump.abort();
            let _ = pump.await;
        }
        let logger = self.logger.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(logger) = logger {
            logger.end().await;
        }
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        let input = self.input.get_mut().unwrap_or_else(PoisonError::into_inner).1.take();
        let outputs = std::mem::take(self.outputs.get_mut().unwrap_or_else(PoisonError::into_inner));
        for pump in input.into_iter().chain(outputs.into_iter().map(|(pump, _)| pump)) {
            pump.abort();
        }
    }
}

#[cfg(test)]
mod tests;
