//! One task for each stream, that takes bytes from one side to the other.
//!
//! A stream can be held, for the machine to be saved: then nothing of it is on its way through the monitor. Of input,
//! what the client had written is sent, and nothing more; of output, what was sent is taken in, also where its reader does not take it yet.

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use log::warn;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout};

use super::ear::Ear;
use super::sink::Sink;

/// As much as is on its way at once.
const BUFFER: usize = 32 << 10;
/// As much as a pipe can hold. Of input that is held no more is taken in.
const FIFO_MAX: usize = 1 << 20;
/// What is taken in of output that is held and nobody reads: more than sockets hold on the way.
const KEPT_MAX: usize = 8 << 20;
/// How often is looked whether something moves.
const LOOK: Duration = Duration::from_millis(50);

/// How far a stream of output is.
#[derive(Debug, Clone, Default)]
pub(super) struct Meter(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// Bytes that have been read.
    moved: AtomicU64,
    /// Whether some of them have not been written.
    writing: AtomicBool,
    done: AtomicBool,
    changed: Notify,
    held: watch::Sender<bool>,
    ear: Option<Ear>,
}

impl Meter {
    /// Of a stream that this one hears.
    pub(super) fn of(ear: Option<Ear>) -> Self {
        Self(Arc::new(Inner { ear, ..Inner::default() }))
    }

    /// Returns when the stream has ended; or, if nothing comes for `idle` and all is written, then.
    pub(super) async fn drained(&self, idle: Option<Duration>) {
        let (mut moved, mut since) = (self.0.moved.load(Ordering::Acquire), Instant::now());
        loop {
            let changed = self.0.changed.notified();
            if self.0.done.load(Ordering::Acquire) {
                return;
            }
            let now = self.0.moved.load(Ordering::Acquire);
            if now != moved || self.0.writing.load(Ordering::Acquire) {
                (moved, since) = (now, Instant::now());
            } else if idle.is_some_and(|idle| since.elapsed() >= idle) {
                return;
            }
            let _ = timeout(LOOK, changed).await;
        }
    }

    /// Takes in what comes, whether it is read or not.
    pub(super) fn hold(&self, held: bool) {
        self.0.held.send_replace(held);
    }

    /// Returns when so many bytes have been taken in.
    pub(super) async fn arrived(&self, bytes: u64) {
        loop {
            let changed = self.0.changed.notified();
            if self.0.done.load(Ordering::Acquire) || self.0.moved.load(Ordering::Acquire) >= bytes {
                return;
            }
            let _ = timeout(LOOK, changed).await;
        }
    }

    fn moved(&self, bytes: &[u8]) {
        if let Some(ear) = &self.0.ear {
            ear.hear(bytes);
        }
        self.0.moved.fetch_add(bytes.len() as u64, Ordering::AcqRel);
        self.0.changed.notify_waiters();
    }
}

/// Marks the end, also of a task that is aborted.
struct Ending(Meter);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.0.done.store(true, Ordering::Release);
        self.0.0.changed.notify_waiters();
    }
}

/// How far a stream of input is.
#[derive(Debug, Clone, Default)]
pub(super) struct Feed(Arc<Fed>);

#[derive(Debug, Default)]
struct Fed {
    sent: AtomicU64,
    /// Whether the end was sent, too.
    ended: AtomicBool,
    held: watch::Sender<bool>,
    still: watch::Sender<bool>,
}

impl Feed {
    /// Sends nothing more, or goes on.
    pub(super) fn hold(&self, held: bool) {
        self.0.held.send_replace(held);
    }

    /// Whether anything was sent.
    pub(super) fn has_moved(&self) -> bool {
        self.0.sent.load(Ordering::Acquire) > 0 || self.0.ended.load(Ordering::Acquire)
    }

    /// Returns when a stream that is held stands still: how many bytes were sent, and whether their end was.
    pub(super) async fn stillness(&self) -> (u64, bool) {
        let mut still = self.0.still.subscribe();
        // The sender is this one's own.
        let _ = still.wait_for(|still| *still).await;
        (self.0.sent.load(Ordering::Acquire), self.0.ended.load(Ordering::Acquire))
    }
}

/// Nothing moves any more, also of a task that is aborted.
struct Stopping(Feed);

impl Drop for Stopping {
    fn drop(&mut self) {
        self.0.0.still.send_replace(true);
    }
}

/// From the process to the client, after what it is told first.
pub(super) async fn pump_out(mut from: UnixStream, mut to: Sink, meter: Meter, first: Vec<u8>) {
    // First dropped is `to`: the client sees the end before anybody is told of it.
    let ending = Ending(meter);
    let meter = &ending.0;
    let mut held = meter.0.held.subscribe();
    let mut ready = first.len();
    let mut buffer = if ready == 0 { vec![0; BUFFER] } else { first };
    let mut broken = false;
    let mut open = true;
    while open {
        let told = std::mem::take(&mut ready);
        let length = match told {
            0 => from.read(&mut buffer).await.unwrap_or_else(|error| {
                warn!("a stream of output broke: {error}");
                0
            }),
            length => length,
        };
        if length == 0 {
            break;
        }
        meter.0.writing.store(!broken, Ordering::Release);
        if told == 0 {
            meter.moved(&buffer[..length]);
        }
        if broken {
            continue;
        }
        let mut part = (buffer, length);
        let mut kept = Vec::new();
        loop {
            let (back, done) = {
                let writing = to.write(part.0, part.1);
                tokio::pin!(writing);
                loop {
                    let takes = open && *held.borrow_and_update() && kept.len() < KEPT_MAX;
                    kept.reserve(if takes { BUFFER } else { 0 });
                    tokio::select! {
                        done = &mut writing => break done,
                        read = from.read_buf(&mut kept), if takes => {
                            let length = read.unwrap_or_else(|error| {
                                warn!("a stream of output broke: {error}");
                                0
                            });
                            open = length > 0;
                            meter.moved(&kept[kept.len() - length..]);
                        }
                        _ = held.changed() => {}
                    }
                }
            };
            buffer = back;
            if let Err(error) = done {
                // A process is not stopped because its reader is gone.
                warn!("output is dropped, as it cannot be written: {error}");
                broken = true;
                break;
            }
            if kept.is_empty() {
                break;
            }
            let length = kept.len();
            part = (std::mem::take(&mut kept), length);
        }
        buffer.resize(BUFFER, 0);
        buffer.shrink_to(BUFFER);
        meter.0.writing.store(false, Ordering::Release);
    }
    drop(to);
}

/// From the client to the process.
pub(super) async fn pump_in(mut from: pipe::Receiver, mut to: UnixStream, feed: Feed) {
    let stopping = Stopping(feed);
    let feed = &stopping.0.0;
    let mut held = feed.held.subscribe();
    let mut buffer = vec![0; BUFFER];
    let mut taken = 0;
    loop {
        let is_held = *held.borrow_and_update();
        let read = if is_held && taken < FIFO_MAX {
            // What the client has written by now belongs to the process, also if nobody has read it yet.
            from.try_read(&mut buffer)
        } else if is_held {
            Err(ErrorKind::WouldBlock.into())
        } else {
            taken = 0;
            feed.still.send_replace(false);
            tokio::select! {
                read = from.read(&mut buffer) => read,
                _ = held.changed() => continue,
            }
        };
        if is_held && read.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock) {
            // Who has seen it still and is held again at once finds that as much was sent as before.
            taken = FIFO_MAX;
            feed.still.send_replace(true);
            // The sender is the feed's own.
            let _ = held.changed().await;
            continue;
        }
        match read {
            Ok(0) => break,
            Ok(length) => {
                if to.write_all(&buffer[..length]).await.is_err() {
                    // Nobody reads any more.
                    return;
                }
                feed.sent.fetch_add(length as u64, Ordering::AcqRel);
                taken += if is_held { length } else { 0 };
            }
            Err(error) => {
                warn!("the stream of input broke: {error}");
                break;
            }
        }
    }
    let _ = to.shutdown().await;
    feed.ended.store(true, Ordering::Release);
}
