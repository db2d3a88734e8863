//! One task for each stream, that takes bytes from one side to the other.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use log::warn;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

use super::sink::Sink;

/// As much as is on its way at once.
const BUFFER: usize = 32 << 10;
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
}

impl Meter {
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
}

/// Marks the end, also of a task that is aborted.
struct Ending(Meter);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.0.done.store(true, Ordering::Release);
        self.0.0.changed.notify_waiters();
    }
}

/// From the process to the client.
pub(super) async fn pump_out(mut from: UnixStream, mut to: Sink, meter: Meter) {
    // First dropped is `to`: the client sees the end before anybody is told of it.
    let ending = Ending(meter);
    let meter = &ending.0.0;
    let mut buffer = vec![0; BUFFER];
    let mut broken = false;
    loop {
        let length = match from.read(&mut buffer).await {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) => {
                warn!("a stream of output broke: {error}");
                break;
            }
        };
        meter.moved.fetch_add(length as u64, Ordering::AcqRel);
        if broken {
            continue;
        }
        meter.writing.store(true, Ordering::Release);
        let (back, done) = to.write(buffer, length).await;
        buffer = back;
        buffer.resize(BUFFER, 0);
        meter.writing.store(false, Ordering::Release);
        if let Err(error) = done {
            // A process is not stopped because its reader is gone.
            warn!("output is dropped, as it cannot be written: {error}");
            broken = true;
        }
    }
    drop(to);
}

/// From the client to the process.
pub(super) async fn pump_in(mut from: pipe::Receiver, mut to: UnixStream) {
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.read(&mut buffer).await {
            Ok(0) => break,
            Ok(length) => {
                if to.write_all(&buffer[..length]).await.is_err() {
                    // Nobody reads any more.
                    return;
                }
            }
            Err(error) => {
                warn!("the stream of input broke: {error}");
                break;
            }
        }
    }
    let _ = to.shutdown().await;
}
