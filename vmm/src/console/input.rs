//! Host to guest, with back-pressure.

use std::io::{self, Read};
use std::sync::{Condvar, Mutex, PoisonError};

/// A serial port that takes input.
pub trait InputPort: Send + Sync {
    /// Takes as many bytes as fit and says how many that were.
    fn offer(&self, bytes: &[u8]) -> usize;
    /// Where whoever offers waits until the guest took something.
    fn gate(&self) -> &InputGate;
}

/// Tells a reader that its port has room again.
#[derive(Debug, Default)]
pub struct InputGate {
    state: Mutex<Gate>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Gate {
    openings: u64,
    closed: bool,
}

impl InputGate {
    /// The guest took input: offering is worth another try.
    pub fn open(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).openings += 1;
        self.changed.notify_all();
    }

    /// The machine is going away: nobody will take anything any more.
    pub fn close(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
        self.changed.notify_all();
    }

    fn openings(&self) -> u64 {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).openings
    }

    /// Waits for an opening after the `seen`th. False when the gate has been closed.
    fn wait_after(&self, seen: u64) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let state = self
            .changed
            .wait_while(state, |gate| gate.openings == seen && !gate.closed)
            .unwrap_or_else(PoisonError::into_inner);
        !state.closed
    }
}

/// Reads `source` to its end and hands everything to `port`, no faster than the guest takes it.
pub fn feed(source: &mut impl Read, port: &dyn InputPort) -> io::Result<()> {
    let mut buffer = [0; 256];
    loop {
        let mut rest = match source.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => &buffer[..count],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        while !rest.is_empty() {
            // Counted before the offer: an opening between the two is not slept through.
            let seen = port.gate().openings();
            let taken = port.offer(rest);
            rest = &rest[taken..];
            if taken == 0 && !port.gate().wait_after(seen) {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    #[derive(Default)]
    struct Port {
        queue: Mutex<Vec<u8>>,
        gate: InputGate,
    }

    impl InputPort for Port {
        fn offer(&self, bytes: &[u8]) -> usize {
            let mut queue = self.queue.lock().unwrap();
            let taken = bytes.len().min(4 - queue.len());
            queue.extend_from_slice(&bytes[..taken]);
            taken
        }
        fn gate(&self) -> &InputGate {
            &self.gate
        }
    }

    #[test]
    fn everything_arrives_in_order_through_a_port_of_four_bytes() {
        let port = Arc::new(Port::default());
        let sent: Vec<u8> = (0..=255).cycle().take(1000).collect();
        let reader = {
            let (port, sent) = (Arc::clone(&port), sent.clone());
            thread::spawn(move || feed(&mut sent.as_slice(), &*port).unwrap())
        };
        let mut got = Vec::new();
        while got.len() < sent.len() {
            let mut taken = std::mem::take(&mut *port.queue.lock().unwrap());
            got.append(&mut taken);
            port.gate.open();
        }
        reader.join().unwrap();
        assert_eq!(got, sent);
    }

    #[test]
    fn a_reader_that_waits_ends_with_the_machine() {
        let port = Arc::new(Port::default());
        let reader = {
            let port = Arc::clone(&port);
            thread::spawn(move || feed(&mut [0u8; 100].as_slice(), &*port))
        };
        while port.queue.lock().unwrap().len() < 4 {
            thread::yield_now();
        }
        port.gate.close();
        reader.join().unwrap().unwrap();
    }
}
