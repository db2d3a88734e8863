//! Guest to host: to a sink, to whoever has attached, and into the back-log.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::pipe::{self, Pipe};
use super::{LineScanner, Marker};

/// How much of the past is kept for those who come later.
pub const BACKLOG: usize = 64 * 1024;
/// More than this many at a time look at nothing new.
const ATTACHED_MAX: usize = 4;

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
    /// None once it is closed.
    sink: Option<Pipe>,
    attached: Vec<Pipe>,
    backlog: VecDeque<u8>,
    scanner: LineScanner,
    on_marker: OnMarker,
    stats: OutputStats,
}

/// Where a serial port puts its bytes. Closing or dropping it writes what is left.
pub struct Output(Mutex<State>);

impl std::fmt::Debug for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Output({:?})", self.stats())
    }
}

impl Output {
    /// Writes to `sink` from a thread of its own, and reports markers from the thread of whoever
    /// pushes; `on_marker` must not block, nor ask this output anything.
    pub fn new(
        sink: impl Write + Send + 'static,
        markers: Vec<Marker>,
        on_marker: OnMarker,
    ) -> io::Result<Self> {
        Ok(Self(Mutex::new(State {
            sink: Some(Pipe::new(sink)?),
            attached: Vec::new(),
            backlog: VecDeque::new(),
            scanner: LineScanner::new(markers),
            on_marker,
            stats: OutputStats::default(),
        })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is whole between any two statements that change it, also if a panic came between.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes bytes from the guest. Never waits.
    pub fn push(&self, bytes: &[u8]) {
        let mut state = self.lock();
        let State { sink, attached, backlog, scanner, on_marker, stats } = &mut *state;
        scanner.scan(bytes, on_marker);
        stats.bytes += bytes.len() as u64;
        stats.dropped += (bytes.len() - sink.as_ref().map_or(0, |sink| sink.push(bytes))) as u64;
        // One that did not keep up has lost its place in the stream, and is let go of.
        attached.retain(|pipe| {
            let keeps_up = pipe.push(bytes) == bytes.len();
            if !keeps_up {
                pipe.abandon();
            }
            keeps_up
        });
        let bytes = &bytes[bytes.len().saturating_sub(BACKLOG)..];
        let surplus = (backlog.len() + bytes.len()).saturating_sub(BACKLOG);
        backlog.drain(..surplus);
        backlog.extend(bytes);
    }

    /// Writes everything from now on to `sink` too, and before it, if `replay`, the back-log. The sink
    /// is closed when it fails, when it falls behind by more than a buffer, and at the end.
    pub fn attach(&self, sink: impl Write + Send + 'static, replay: bool) -> io::Result<()> {
        let pipe = Pipe::new(sink)?;
        let mut state = self.lock();
        if state.sink.is_none() {
            return Err(io::Error::other("the machine is going away"));
        }
        state.attached.retain(|pipe| !pipe.is_ended());
        if state.attached.len() >= ATTACHED_MAX {
            return Err(io::Error::other(format!(
                "{ATTACHED_MAX} are attached to the console; let one of them go first"
            )));
        }
        if replay {
            let (old, new) = state.backlog.as_slices();
            // The buffer is empty and as large as the back-log.
            pipe.push(old);
            pipe.push(new);
        }
        state.attached.push(pipe);
        Ok(())
    }

    /// Writes what is left, if the sinks take it in time, and closes them. Whoever still has the port
    /// keeps nothing open.
    pub fn close(&self) {
        let mut state = self.lock();
        let lost = state.sink.as_ref().map_or(0, Pipe::lost);
        state.stats.dropped += lost;
        let pipes = (state.sink.take(), std::mem::take(&mut state.attached));
        drop(state);
        drop(pipes);
    }

    /// The last bytes that the guest wrote.
    pub fn backlog(&self) -> Vec<u8> {
        self.lock().backlog.iter().copied().collect()
    }

    /// What happened so far.
    pub fn stats(&self) -> OutputStats {
        let state = self.lock();
        let lost = state.sink.as_ref().map_or(0, Pipe::lost);
        OutputStats { dropped: state.stats.dropped + lost, ..state.stats }
    }
}

/// A replayed back-log fits into an empty buffer.
const _: () = assert!(BACKLOG <= pipe::CAPACITY);

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;
    use std::time::{Duration, Instant};

    use super::pipe::CAPACITY;
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
        while !output.lock().sink.as_ref().unwrap().is_ended() {
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

    #[test]
    fn a_sink_that_hangs_does_not_keep_the_machine_from_ending() {
        let (sink, gets, _leaves) = slow();
        let output = Output::new(sink, vec![], Box::new(|_| {})).unwrap();
        output.push(b"first");
        gets.recv().unwrap();
        let start = Instant::now();
        drop(output);
        assert!(start.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn who_attaches_sees_the_past_and_what_comes_and_who_falls_behind_is_let_go() {
        let output = Output::new(io::sink(), vec![], Box::new(|_| {})).unwrap();
        output.push(b"before ");
        let file = std::env::temp_dir().join(format!("vmm-attached-{}", std::process::id()));
        output.attach(std::fs::File::create(&file).unwrap(), true).unwrap();
        let (sink, gets, leaves) = slow();
        output.attach(sink, false).unwrap();
        output.push(b"after");
        assert_eq!(gets.recv().unwrap(), b"after");
        for _ in 0..=(CAPACITY / 1024) {
            output.push(&[b'x'; 1024]);
            // The other one keeps up.
            thread::sleep(Duration::from_millis(1));
        }
        leaves.send(()).unwrap();
        assert!(gets.recv().is_err(), "its sink is closed");
        assert_eq!(output.stats().dropped, 0, "the machine's own sink lost nothing");
        let backlog = output.backlog();
        assert_eq!((backlog.len(), backlog[0]), (BACKLOG, b'x'));
        drop(output);
        assert!(std::fs::read(&file).unwrap().starts_with(b"before afterxxx"));
        std::fs::remove_file(&file).unwrap();
    }
}
