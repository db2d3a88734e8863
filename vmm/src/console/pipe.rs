//! A bounded buffer with a thread behind it that writes.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{io, thread};

/// What may wait to be written. A console at 115200 baud fills it in six seconds.
pub(super) const CAPACITY: usize = 64 * 1024;
/// How long the end of a machine waits for a sink that does not take its last words.
const LAST_WORDS: Duration = Duration::from_secs(2);

#[derive(Default)]
struct State {
    buffer: VecDeque<u8>,
    /// Bytes that the sink had in hand when it failed.
    lost: u64,
    closed: bool,
    /// Nobody waits for what is left.
    abandoned: bool,
    /// The thread is gone, because all is written or because the sink took an error: nothing will be
    /// written any more.
    ended: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is whole between any two statements that change it, also if a panic came between.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The way to one sink. Dropping it writes what is left, if the sink takes it in time.
pub(super) struct Pipe(Arc<Shared>);

impl Pipe {
    /// Writes to `sink` from a thread of its own.
    pub(super) fn new(mut sink: impl Write + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let behind = Arc::clone(&shared);
        thread::Builder::new().name("console".into()).stack_size(128 * 1024).spawn(move || {
            if let Err(error) = write_out(&behind, &mut sink) {
                log::warn!("the console's sink failed, its output is dropped from here on: {error}");
            }
            // The sink is closed first: who waits for the end finds it so.
            drop(sink);
            behind.lock().ended = true;
            behind.changed.notify_all();
        })?;
        Ok(Self(shared))
    }

    /// Takes what fits, and says how many bytes that were. Never waits.
    pub(super) fn push(&self, bytes: &[u8]) -> usize {
        let mut state = self.0.lock();
        let room = if state.ended { 0 } else { CAPACITY - state.buffer.len() };
        let taken = bytes.len().min(room);
        let was_empty = state.buffer.is_empty();
        state.buffer.extend(&bytes[..taken]);
        drop(state);
        if was_empty && taken > 0 {
            self.0.changed.notify_all();
        }
        taken
    }

    /// Gives up what is left, so that dropping it waits for nothing.
    pub(super) fn abandon(&self) {
        let mut state = self.0.lock();
        state.abandoned = true;
        state.lost += state.buffer.len() as u64;
        state.buffer = VecDeque::new();
    }

    /// Whether its sink takes nothing any more.
    pub(super) fn is_ended(&self) -> bool {
        self.0.lock().ended
    }

    /// Bytes that were taken and got lost, because the sink failed.
    pub(super) fn lost(&self) -> u64 {
        self.0.lock().lost
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.closed = true;
        self.0.changed.notify_all();
        // A sink that hangs keeps its thread, which ends with the process: better than that a guest, or
        // a stopped terminal, keeps a machine from ending.
        let _ =
            self.0.changed.wait_timeout_while(state, LAST_WORDS, |state| !state.ended && !state.abandoned);
    }
}

fn write_out(shared: &Shared, sink: &mut impl Write) -> io::Result<()> {
    loop {
        let mut state = shared.lock();
        while state.buffer.is_empty() && !state.closed {
            state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.buffer.is_empty() {
            return Ok(());
        }
        let bytes: Vec<u8> = state.buffer.drain(..).collect();
        drop(state);
        if let Err(error) = sink.write_all(&bytes).and_then(|()| sink.flush()) {
            let mut state = shared.lock();
            state.lost += bytes.len() as u64 + state.buffer.len() as u64;
            state.buffer = VecDeque::new();
            state.ended = true;
            return Err(error);
        }
    }
}
