//! Guest to host: a bounded buffer with a thread behind it.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use super::{LineScanner, Marker};

/// What may wait to be written. A console at 115200 baud fills it in six seconds.
const CAPACITY: usize = 64 * 1024;

/// How much went through, and how much did not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OutputStats {
    /// Bytes the guest wrote.
    pub bytes: u64,
    /// Bytes of these that were dropped, because the buffer was full or the sink had failed.
    pub dropped: u64,
}

/// Takes a marker's id.
pub type OnMarker = Box<dyn FnMut(u32) + Send>;

struct State {
    buffer: VecDeque<u8>,
    scanner: LineScanner,
    on_marker: OnMarker,
    stats: OutputStats,
    closed: bool,
    // The sink took an error: nothing will be written any more.
    broken: bool,
}

struct Shared {
    state: Mutex<State>,
    wake: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is whole between any two statements that change it, also if a panic came between.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where a serial port puts its bytes. Dropping it writes what is left.
pub struct Output {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Output({:?})", self.stats())
    }
}

impl Output {
    /// Writes to `sink` from a thread of its own, and reports markers from the thread of whoever
    /// pushes; `on_marker` must not block.
    pub fn new(
        mut sink: impl Write + Send + 'static,
        markers: Vec<Marker>,
        on_marker: OnMarker,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                buffer: VecDeque::new(),
                scanner: LineScanner::new(markers),
                on_marker,
                stats: OutputStats::default(),
                closed: false,
                broken: false,
            }),
            wake: Condvar::new(),
        });
        let behind = Arc::clone(&shared);
        let writer = thread::Builder::new()
            .name("console".into())
            .stack_size(128 * 1024)
            .spawn(move || write_out(&behind, &mut sink))?;
        Ok(Self { shared, writer: Some(writer) })
    }

    /// Takes bytes from the guest. Never waits.
    pub fn push(&self, bytes: &[u8]) {
        let mut state = self.shared.lock();
        let State { scanner, on_marker, .. } = &mut *state;
        scanner.scan(bytes, on_marker);
        let room = if state.broken { 0 } else { CAPACITY - state.buffer.len() };
        let taken = bytes.len().min(room);
        state.stats.bytes += bytes.len() as u64;
        state.stats.dropped += (bytes.len() - taken) as u64;
        let was_empty = state.buffer.is_empty();
        state.buffer.extend(&bytes[..taken]);
        drop(state);
        if was_empty && taken > 0 {
            self.shared.wake.notify_one();
        }
    }

    /// What happened so far.
    pub fn stats(&self) -> OutputStats {
        self.shared.lock().stats
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.wake.notify_one();
        if let Some(writer) = self.writer.take() {
            // A panic of the sink has been reported by the panic itself.
            let _ = writer.join();
        }
    }
}

fn write_out(shared: &Shared, sink: &mut impl Write) {
    loop {
        let mut state = shared.lock();
        while state.buffer.is_empty() && !state.closed {
            state = shared.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.buffer.is_empty() {
            return;
        }
        let bytes: Vec<u8> = state.buffer.drain(..).collect();
        drop(state);
        if let Err(error) = sink.write_all(&bytes).and_then(|()| sink.flush()) {
            log::warn!("the console's sink failed, its output is dropped from here on: {error}");
            let mut state = shared.lock();
            state.broken = true;
            state.stats.dropped += bytes.len() as u64 + state.buffer.len() as u64;
            state.buffer = VecDeque::new();
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// A sink that tells what it got, and waits for leave to go on.
    struct Slow {
        got: mpsc::Sender<Vec<u8>>,
        leave: mpsc::Receiver<()>,
    }

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.got.send(bytes.to_vec()).unwrap();
            self.leave.recv().map_err(|_| io::Error::other("gone"))?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn slow() -> (Slow, mpsc::Receiver<Vec<u8>>, mpsc::Sender<()>) {
        let ((got, gets), (leaves, leave)) = (mpsc::channel(), mpsc::channel());
        (Slow { got, leave }, gets, leaves)
    }

    #[test]
    fn a_sink_that_hangs_costs_a_bounded_buffer_and_no_waiting() {
        let (sink, gets, leaves) = slow();
        let output = Output::new(sink, vec![], Box::new(|_| {})).unwrap();
        output.push(b"first");
        assert_eq!(gets.recv().unwrap(), b"first");
        for _ in 0..(2 * CAPACITY / 1024) {
            output.push(&[b'x'; 1024]);
        }
        let stats = output.stats();
        assert_eq!(stats.bytes, 5 + 2 * CAPACITY as u64);
        assert_eq!(stats.dropped, CAPACITY as u64);
        leaves.send(()).unwrap();
        assert_eq!(gets.recv().unwrap().len(), CAPACITY);
        leaves.send(()).unwrap();
    }

    #[test]
    fn a_sink_that_fails_is_left_alone() {
        let (sink, gets, leaves) = slow();
        let output = Output::new(sink, vec![], Box::new(|_| {})).unwrap();
        output.push(b"first");
        gets.recv().unwrap();
        drop(leaves);
        // The writer ends; until it does, bytes go to the buffer that it drops.
        while !output.shared.lock().broken {
            thread::yield_now();
        }
        output.push(b"second");
        assert_eq!(output.stats(), OutputStats { bytes: 11, dropped: 11 });
    }

    #[test]
    fn markers_are_reported_when_the_bytes_come_and_all_is_written_at_the_end() {
        let (found, finds) = mpsc::channel();
        let file = std::env::temp_dir().join(format!("vmm-console-{}", std::process::id()));
        let sink = std::fs::File::create(&file).unwrap();
        let markers = vec![Marker { id: 7, text: b"ready".to_vec() }];
        let output = Output::new(sink, markers, Box::new(move |id| found.send(id).unwrap())).unwrap();
        output.push(b"I am rea");
        output.push(b"dy\nbye");
        assert_eq!(finds.try_recv(), Ok(7));
        drop(output);
        assert_eq!(std::fs::read(&file).unwrap(), b"I am ready\nbye");
        std::fs::remove_file(&file).unwrap();
    }
}
