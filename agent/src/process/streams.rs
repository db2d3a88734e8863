//! A standard stream: on one side the process's pipe or terminal, on the other whichever connection of the shim's is
//! attached.
//!
//! One task for each stream holds at most one buffer of bytes, and reads on only when that has been passed on. When a
//! connection breaks, the bytes that it did not take stay, and the process waits, until another is attached.
//!
//! A stream can be held, for the machine to be saved: then nothing of it is on its way between the two sides of the
//! machine. Output waits on this one; of input, what the shim has sent is taken in, and kept. What a stream keeps is
//! in the machine that is restored, whose connections are all broken, as much as in the one that was saved.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use agent_api::DRAIN_DEADLINE;
use agent_api::stdio::Stream;
use anyhow::{Context, Result};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout};
use tokio_vsock::VsockStream;

use crate::polled;

/// As much as is on its way at once, beside pipes and sockets.
const BUFFER: usize = 64 * 1024;
/// What is kept of input that is taken in while nobody reads it: more than pipes and sockets hold on the way.
const KEPT_MAX: usize = 4 << 20;

/// Where a connection waits for the stream, and the stream for a connection.
#[derive(Default)]
pub struct Line {
    waiting: Mutex<Option<VsockStream>>,
    came: Notify,
    attached: AtomicBool,
    /// Since when it is to end.
    finish: watch::Sender<Option<Instant>>,
    ended: AtomicBool,
    /// Whether it has begun.
    begun: AtomicBool,
    hold: watch::Sender<Hold>,
    still: watch::Sender<bool>,
    /// Bytes that went over the connection that is attached.
    moved: AtomicU64,
}

/// Whether a stream is held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Hold {
    /// It is not.
    #[default]
    No,
    /// It is. Input is taken in.
    Yes,
    /// It is, and of input so much was sent: it stands still when it is here.
    Until(Sent),
}

/// What the shim has sent of an input.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sent {
    /// Bytes, over the connection that is attached.
    pub bytes: u64,
    /// And then its end.
    pub ended: bool,
}

impl Line {
    /// Attaches a connection, in the place of any other.
    pub fn attach(&self, connection: VsockStream) {
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = Some(connection);
        self.attached.store(true, Ordering::Relaxed);
        self.came.notify_waiters();
    }

    /// Whether there ever was one.
    pub fn is_attached(&self) -> bool {
        self.attached.load(Ordering::Relaxed)
    }

    /// Waits until there is one.
    pub async fn attachment(&self) {
        loop {
            let came = self.came.notified();
            if self.is_attached() {
                return;
            }
            came.await;
        }
    }

    /// Whether all has been said.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    /// To end when all that was written has been taken, or [`DRAIN_DEADLINE`] is over.
    pub fn finish(&self) {
        self.finish.send_if_modified(|since| since.replace(since.unwrap_or_else(Instant::now)).is_none());
    }

    /// Resolves when it is to end.
    async fn finishing(&self) -> Instant {
        let mut finish = self.finish.subscribe();
        match finish.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(since)) => *since,
            // The sender is this line's own.
            _ => Instant::now(),
        }
    }

    /// Resolves when it was to end so long ago that it is cut off.
    async fn expired(&self) {
        let since = self.finishing().await;
        tokio::time::sleep_until(since + DRAIN_DEADLINE).await;
    }

    /// The next connection, in the place of any other.
    async fn take(&self) -> VsockStream {
        loop {
            let came = self.came.notified();
            if let Some(connection) = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).take() {
                self.moved.store(0, Ordering::Relaxed);
                return connection;
            }
            came.await;
        }
    }

    /// Holds it, or lets it go on.
    pub fn hold(&self, hold: Hold) {
        // Whether an input stood still before says nothing of this one; it looks again when it is told.
        if matches!(hold, Hold::Until(_)) && !self.has_ended() {
            self.still.send_replace(false);
        }
        self.hold.send_replace(hold);
    }

    /// Returns when a stream that is held stands still; says how many bytes went over its connection.
    pub async fn stillness(&self) -> u64 {
        let mut still = self.still.subscribe();
        // The sender is this line's own.
        if self.begun.load(Ordering::Relaxed) {
            let _ = still.wait_for(|still| *still).await;
        }
        self.moved.load(Ordering::Relaxed)
    }

    /// Waits as long as it is held. In the meantime a connection is taken: that is all a held stream does.
    async fn going(&self, hold: &mut watch::Receiver<Hold>, connection: &mut Option<VsockStream>) {
        while *hold.borrow_and_update() != Hold::No {
            self.still.send_replace(true);
            tokio::select! {
                _ = hold.changed() => {}
                new = self.take() => *connection = Some(new),
            }
        }
        self.still.send_replace(false);
    }

    fn count(&self, bytes: usize) {
        self.moved.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// The agent's end of a process's stream.
pub enum Side {
    /// Of a pipe.
    Pipe(OwnedFd),
    /// The master of a terminal, which has other users.
    Terminal(OwnedFd),
}

/// A pipe for `stream`: the agent's end, which does not block, and the process's.
pub fn pipe(stream: Stream) -> Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC).context("making a pipe for a stream")?;
    Ok(if stream == Stream::Stdin { (writer, reader) } else { (reader, writer) })
}

/// Lets a stream run, in a task of its own, until it ends.
pub fn run(line: &Arc<Line>, stream: Stream, side: Side) {
    let line = Arc::clone(line);
    line.begun.store(true, Ordering::Relaxed);
    tokio::spawn(async move {
        let moved = async {
            match (Local::new(side), stream) {
                (Ok(local), Stream::Stdin) => input(&line, local).await,
                (Ok(local), _) => output(&line, local).await,
                (Err(error), _) => log::error!("a stream: {error:#}"),
            }
        };
        moved.await;
        line.ended.store(true, Ordering::Relaxed);
        line.still.send_replace(true);
    });
}

/// The process's side, without waiting.
struct Local {
    fd: AsyncFd<std::fs::File>,
    terminal: bool,
}

impl Local {
    fn new(side: Side) -> Result<Self> {
        let (fd, terminal) = match side {
            Side::Pipe(fd) => (fd, false),
            Side::Terminal(fd) => (fd, true),
        };
        fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok(Self { fd: polled(fd.into())?, terminal })
    }

    /// What there is, or 0 at the end.
    async fn read(&self, buffer: &mut [u8]) -> usize {
        loop {
            let Ok(mut ready) = self.fd.readable().await else { return 0 };
            match ready.try_io(|fd| (&mut fd.get_ref()).read(buffer)) {
                Ok(Ok(length)) => return length,
                Ok(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
                // A terminal that nobody has open any more says so with an error.
                Ok(Err(_)) => return 0,
                Err(_would_block) => {}
            }
        }
    }

    /// What there is now, if there is anything.
    fn read_now(&self, buffer: &mut [u8]) -> usize {
        (&mut self.fd.get_ref()).read(buffer).unwrap_or(0)
    }

    /// Writes some, unless nobody reads any more. Nothing is written where this is not waited for.
    async fn write(&self, bytes: &[u8]) -> Option<usize> {
        loop {
            let Ok(mut ready) = self.fd.writable().await else { return None };
            match ready.try_io(|fd| (&mut fd.get_ref()).write(bytes)) {
                Ok(Ok(length)) => return Some(length),
                Ok(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
                Ok(Err(_)) => return None,
                Err(_would_block) => {}
            }
        }
    }
}

async fn output(line: &Line, local: Local) {
    let mut buffer = vec![0; BUFFER];
    let mut connection = None;
    let mut hold = line.hold.subscribe();
    loop {
        line.going(&mut hold, &mut connection).await;
        let length = tokio::select! {
            length = local.read(&mut buffer) => length,
            new = line.take() => {
                connection = Some(new);
                continue;
            }
            _ = hold.changed() => continue,
            _ = line.finishing() => break,
        };
        if length == 0 {
            end(connection, line).await;
            return;
        }
        tokio::select! {
            () = pass_on(line, &mut hold, &mut connection, &buffer[..length]) => {}
            () = line.expired() => return,
        }
    }
    // The process is gone, and whoever else holds its pipe has had their time.
    let rest = async {
        loop {
            let length = local.read_now(&mut buffer);
            if length == 0 {
                break;
            }
            pass_on(line, &mut hold, &mut connection, &buffer[..length]).await;
        }
        end(connection.take(), line).await;
    };
    tokio::select! {
        () = rest => {}
        () = line.expired() => {}
    }
}

/// Gives the bytes to whoever is attached, and to who comes after them what they did not take.
async fn pass_on(
    line: &Line,
    hold: &mut watch::Receiver<Hold>,
    connection: &mut Option<VsockStream>,
    mut bytes: &[u8],
) {
    while !bytes.is_empty() {
        line.going(hold, connection).await;
        let Some(current) = connection.as_mut() else {
            tokio::select! {
                new = line.take() => *connection = Some(new),
                _ = hold.changed() => {}
            }
            continue;
        };
        tokio::select! {
            written = AsyncWriteExt::write(current, bytes) => match written {
                Ok(length) if length > 0 => {
                    line.count(length);
                    bytes = &bytes[length..];
                }
                _ => *connection = None,
            },
            new = line.take() => *connection = Some(new),
            _ = hold.changed() => {}
        }
    }
}

/// Tells whoever is attached that this was all; waits for one who was announced.
async fn end(connection: Option<VsockStream>, line: &Line) {
    line.still.send_replace(true);
    let finish = async {
        let mut connection = match connection {
            Some(connection) => connection,
            None => line.take().await,
        };
        let _ = connection.shutdown(std::net::Shutdown::Write);
        // Until the other side has closed its end, this one stays: what is closed at once may be cut off.
        let _ = timeout(DRAIN_DEADLINE, AsyncReadExt::read(&mut connection, &mut [0])).await;
    };
    tokio::select! {
        () = finish => {}
        () = line.expired() => {}
    }
}

/// What of an input is here and not written yet, and what is still to come.
#[derive(Default)]
struct Kept {
    bytes: Vec<u8>,
    ended: bool,
}

async fn input(line: &Line, local: Local) {
    let mut buffer = vec![0; BUFFER];
    let mut connection = None;
    let mut kept = Kept::default();
    let mut hold = line.hold.subscribe();
    loop {
        let held = *hold.borrow_and_update();
        let complete = match held {
            Hold::No => false,
            Hold::Yes => connection.is_none(),
            Hold::Until(sent) => {
                let here = Sent { bytes: line.moved.load(Ordering::Relaxed), ended: kept.ended };
                connection.is_none() || here.bytes >= sent.bytes && (here.ended || !sent.ended)
            }
        };
        line.still.send_replace(complete);
        let most = if held == Hold::No { 1 } else { KEPT_MAX };
        let reads = !complete && !kept.ended && kept.bytes.len() < most;
        if held == Hold::No && kept.bytes.is_empty() && kept.ended {
            // Nobody types any more; the terminal stays.
            if !local.terminal {
                return;
            }
            kept.ended = false;
            connection = None;
        }
        tokio::select! {
            read = receive(&mut connection, &mut buffer), if reads => match read {
                Ok(0) => kept.ended = true,
                Ok(length) => {
                    line.count(length);
                    kept.bytes.extend_from_slice(&buffer[..length]);
                }
                Err(_) => connection = None,
            },
            written = local.write(&kept.bytes), if held == Hold::No && !kept.bytes.is_empty() => match written {
                Some(length) => drop(kept.bytes.drain(..length)),
                None => return,
            },
            new = line.take() => {
                connection = Some(new);
                kept.ended &= !local.terminal;
            }
            _ = hold.changed() => {}
            _ = line.finishing() => return,
            () = unread(&local) => return,
        }
    }
}

/// Never, if there is no connection.
async fn receive(connection: &mut Option<VsockStream>, buffer: &mut [u8]) -> std::io::Result<usize> {
    match connection {
        Some(connection) => AsyncReadExt::read(connection, buffer).await,
        None => std::future::pending().await,
    }
}

/// Resolves when nobody can read what is written any more.
async fn unread(local: &Local) {
    if local.terminal {
        return std::future::pending().await;
    }
    match local.fd.ready(tokio::io::Interest::ERROR).await {
        Ok(_) => {}
        Err(_) => std::future::pending().await,
    }
}
