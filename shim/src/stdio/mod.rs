//! Streams of a process, from the machine to where the client wants them, and back.
//!
//! Nothing is kept but one buffer a stream, so whoever reads slowly slows the process. A client that goes away and
//! comes back finds its FIFOs open: the shim holds both ends of each. Only `CloseIO` is the end of input, and only
//! the end of the process's stream, or its removal, that of output.

mod ear;
mod logger;
mod pump;
mod sink;

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use agent_api::agent::Stdio;
use agent_api::stdio::Stream;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::deadlines;
use crate::error::{Attempt, Error, Result};
use crate::guest::Guest;
use crate::ledger::Io;
pub use ear::{Ears, MOST as LONGEST_TOLD};
use logger::Logger;
use pump::{Feed, Meter, pump_in, pump_out};
use sink::Sink;

/// Which streams a process has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamSet {
    /// A terminal.
    pub terminal: bool,
    /// Standard input, and so on.
    pub stdin: bool,
    /// Also that of a terminal.
    pub stdout: bool,
    /// A terminal has none.
    pub stderr: bool,
}

impl StreamSet {
    fn has(self, stream: Stream) -> bool {
        match stream {
            Stream::Stdin => self.stdin,
            Stream::Stdout => self.stdout,
            Stream::Stderr => self.stderr,
        }
    }
}

/// Both ends of the client's streams, opened.
pub struct Opened {
    terminal: bool,
    stdin: Option<(pipe::Receiver, OwnedFd)>,
    outputs: Vec<(Stream, Sink)>,
    logger: Option<Logger>,
    /// What the client is told before anything that the process says.
    before: [Vec<u8>; 2],
    ears: Option<Ears>,
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

/// Which streams there are, once they are opened.
pub fn announced(io: &Io) -> Result<StreamSet> {
    let stdin = match place(&io.stdin)? {
        Place::Path(path) | Place::File(path) => is_fifo(path).attempt(format_args!("looking at {path}"))?,
        Place::Nowhere | Place::Program { .. } => false,
    };
    let stdout = place(&io.stdout)? != Place::Nowhere;
    let stderr = !io.terminal && place(&io.stderr)? != Place::Nowhere;
    Ok(StreamSet { terminal: io.terminal, stdin, stdout, stderr })
}

fn is_fifo(path: &str) -> std::io::Result<bool> {
    Ok(std::fs::metadata(path)?.file_type().is_fifo())
}

impl Opened {
    /// Opens where the client's streams lead. `environment` is for a logging process.
    pub async fn open(io: &Io, environment: &[(String, String)]) -> Result<Self> {
        let stdin = match place(&io.stdin)? {
            Place::Nowhere => None,
            Place::Path(path) | Place::File(path) => open_input(path)?,
            Place::Program { .. } => return Err(Error::invalid("a logging process has no input to give")),
        };
        let mut opened = Self { terminal: io.terminal, stdin, ..Self::nowhere() };
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

    fn set(&self) -> StreamSet {
        let has = |stream| self.outputs.iter().any(|(own, _)| *own == stream);
        let (stdout, stderr) = (has(Stream::Stdout), has(Stream::Stderr));
        StreamSet { terminal: self.terminal, stdin: self.stdin.is_some(), stdout, stderr }
    }

    /// What the agent has to know.
    pub fn announce(&self) -> Stdio {
        let StreamSet { terminal, stdin, stdout, stderr } = self.set();
        Stdio { terminal, stdin, stdout, stderr, ..Stdio::default() }
    }

    /// Streams that lead nowhere.
    pub fn nowhere() -> Self {
        Self {
            terminal: false,
            stdin: None,
            outputs: Vec::new(),
            logger: None,
            before: Default::default(),
            ears: None,
        }
    }

    /// Others hear what the process says.
    pub fn heard_by(&mut self, ears: Ears) {
        self.ears = Some(ears);
    }

    /// The client is told these first, as what the process has said on its two outputs.
    pub fn tell(&mut self, stdout: Vec<u8>, stderr: Vec<u8>) {
        self.before = [stdout, stderr];
    }

    /// Joins them to a process that had these before its machine was saved. Of what it had and is to have no more,
    /// output is dropped, and input has ended; what it had not it does not get.
    pub async fn rejoin(mut self, guest: &Guest, id: &str, exec: &str, had: StreamSet) -> Result<Streams> {
        if !had.stdin {
            self.stdin = None;
        } else if self.stdin.is_none() {
            drop(guest.stream(id, exec, Stream::Stdin, &AtomicBool::new(false)).await?);
        }
        self.outputs.retain(|(stream, _)| had.has(*stream));
        for stream in [Stream::Stdout, Stream::Stderr] {
            if had.has(stream) && !self.outputs.iter().any(|(own, _)| *own == stream) {
                self.outputs.push((stream, Sink::nowhere()));
            }
        }
        let mut streams = self.join(guest, id, exec).await?;
        streams.set = had;
        Ok(streams)
    }

    /// Joins them to a process that is only being announced: each way to the guest and back takes its time. An error of the
    /// announcement comes first, and then nothing is joined.
    pub async fn join_while(
        self,
        guest: &Guest,
        id: &str,
        exec: &str,
        announcing: impl Future<Output = Result<()>>,
    ) -> Result<Result<Streams>> {
        let coming = AtomicBool::new(true);
        let announcing = async {
            let announced = announcing.await;
            coming.store(false, Ordering::Release);
            announced
        };
        let joining = self.connect(guest, id, exec, &coming);
        tokio::pin!(joining, announcing);
        let joined = tokio::select! {
            // The agent hears of it before it hears of its streams.
            biased;
            announced = &mut announcing => {
                announced?;
                return Ok(joining.await);
            }
            joined = &mut joining => joined,
        };
        announcing.await?;
        Ok(joined)
    }

    /// Joins them to the process, which is announced to the agent by now. One that has ended is at its end here, too.
    pub async fn join(self, guest: &Guest, id: &str, exec: &str) -> Result<Streams> {
        self.connect(guest, id, exec, &AtomicBool::new(false)).await
    }

    /// The same, of one that may still be being announced.
    async fn connect(self, guest: &Guest, id: &str, exec: &str, announcing: &AtomicBool) -> Result<Streams> {
        let set = self.set();
        let mut outputs = self.outputs.into_iter();
        // There are no more than two.
        let (first, second) = (outputs.next(), outputs.next());
        let (fed, first, second) = tokio::try_join!(
            connected(guest, id, exec, self.stdin.map(|stdin| (Stream::Stdin, stdin)), announcing),
            connected(guest, id, exec, first, announcing),
            connected(guest, id, exec, second, announcing),
        )?;
        let read = first.into_iter().chain(second);
        // Nothing moves before all are there.
        let mut input = Input::default();
        if let Some((_, to, (from, held))) = fed {
            let feed = Feed::default();
            let pump = tokio::spawn(pump_in(from, to, feed.clone()));
            input = Input { held: Some(held), pump: Some((pump, feed)) };
        }
        let mut outputs = Vec::new();
        let [stdout, stderr] = self.before;
        let (mut before, ears) = ([Some(stdout), Some(stderr)], self.ears);
        for (stream, from, sink) in read {
            let index = usize::from(stream == Stream::Stderr);
            let meter = Meter::of(ears.as_ref().map(|ears| ears.of(stream).clone()));
            let first = before[index].take().unwrap_or_default();
            let pump = tokio::spawn(pump_out(from, sink, meter.clone(), first));
            outputs.push(Output { stream, pump, meter });
        }
        Ok(Streams {
            set,
            input: Mutex::new(input),
            outputs: Mutex::new(outputs),
            logger: Mutex::new(self.logger),
        })
    }
}

/// A stream of a process with its connection, if there is one and it has not ended, and what it is to be joined to.
async fn connected<T>(
    guest: &Guest,
    id: &str,
    exec: &str,
    stream: Option<(Stream, T)>,
    announcing: &AtomicBool,
) -> Result<Option<(Stream, UnixStream, T)>> {
    let Some((stream, end)) = stream else { return Ok(None) };
    let connection = guest.stream(id, exec, stream, announcing).await?;
    Ok(connection.map(|connection| (stream, connection, end)))
}

/// A FIFO for reading. The writing end is held, so that a client which goes away is not the end.
fn open_input(path: &str) -> Result<Option<(pipe::Receiver, OwnedFd)>> {
    let what = format!("opening {path} for standard input");
    if !is_fifo(path).attempt(&what)? {
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
    if !is_fifo(path).attempt(&what)? {
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

#[derive(Default)]
struct Input {
    /// The writing end.
    held: Option<OwnedFd>,
    pump: Option<(JoinHandle<()>, Feed)>,
}

struct Output {
    stream: Stream,
    pump: JoinHandle<()>,
    meter: Meter,
}

/// The streams of a process. Dropping them cuts them off.
pub struct Streams {
    /// What the agent has of them.
    pub set: StreamSet,
    input: Mutex<Input>,
    outputs: Mutex<Vec<Output>>,
    logger: Mutex<Option<Logger>>,
}

impl Streams {
    /// The end of input, after what was written so far.
    pub fn close_input(&self) {
        self.input.lock().unwrap_or_else(PoisonError::into_inner).held = None;
    }

    fn meters(&self) -> Vec<(Stream, Meter)> {
        let outputs = self.outputs.lock().unwrap_or_else(PoisonError::into_inner);
        outputs.iter().map(|output| (output.stream, output.meter.clone())).collect()
    }

    fn feed(&self) -> Option<Feed> {
        let input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
        input.pump.as_ref().map(|(_, feed)| feed.clone())
    }

    /// Holds them, or lets them go on: of input no more is sent, and of output what was sent is taken in.
    pub fn hold(&self, held: bool) {
        self.feed().iter().for_each(|feed| feed.hold(held));
        self.meters().iter().for_each(|(_, meter)| meter.hold(held));
    }

    /// Of streams that are held: how much input was sent, and whether its end was. None, if they have no input.
    pub async fn sent(&self) -> Option<(u64, bool)> {
        let feed = self.feed()?;
        Some(feed.stillness().await)
    }

    /// Whether the process has been sent input, or its end.
    pub fn is_fed(&self) -> bool {
        self.feed().is_some_and(|feed| feed.has_moved())
    }

    /// Returns when so much of an output has been taken in.
    pub async fn arrived(&self, stream: Stream, bytes: u64) {
        for (_, meter) in self.meters().iter().filter(|(own, _)| *own == stream) {
            meter.arrived(bytes).await;
        }
    }

    /// Returns when all that an exited process has written is where the client wants it, or after a deadline.
    pub async fn drain(&self) {
        for (_, meter) in self.meters() {
            let _ = timeout(deadlines::DRAIN, meter.drained(Some(deadlines::IDLE))).await;
        }
    }

    /// Ends them. What the process has written is waited for, but not for ever.
    pub async fn close(&self) {
        let input = std::mem::take(&mut *self.input.lock().unwrap_or_else(PoisonError::into_inner));
        if let Some((pump, _)) = input.pump {
            pump.abort();
        }
        let all = async {
            for (_, meter) in self.meters() {
                meter.drained(None).await;
            }
        };
        let _ = timeout(deadlines::DRAIN + Duration::from_secs(1), all).await;
        let outputs = std::mem::take(&mut *self.outputs.lock().unwrap_or_else(PoisonError::into_inner));
        for Output { pump, .. } in outputs {
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
        let input = self.input.get_mut().unwrap_or_else(PoisonError::into_inner).pump.take();
        let outputs = std::mem::take(self.outputs.get_mut().unwrap_or_else(PoisonError::into_inner));
        let outputs = outputs.into_iter().map(|output| output.pump);
        for pump in input.into_iter().map(|(pump, _)| pump).chain(outputs) {
            pump.abort();
        }
    }
}

#[cfg(test)]
mod tests;
