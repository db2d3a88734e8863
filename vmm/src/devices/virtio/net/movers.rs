//! The threads of a device's queue pairs. One begins when there is something to move: the cable is in, and the driver uses
//! the pair. A machine has more network devices than most containers need, and more pairs than processors use.

use std::fmt;
use std::io;
use std::sync::Arc;

use super::super::VirtQueue;
use super::pair::{Pair, Running};
use crate::standstill::Standstill;

/// A pair that nothing moves yet, with its queues.
pub struct Waiting {
    /// What it will work with.
    pub pair: Pair,
    /// Packets to the guest.
    pub rx: VirtQueue,
    /// Packets from the guest.
    pub tx: VirtQueue,
    /// What its thread will follow.
    pub standstill: Arc<Standstill>,
}

/// The pairs of an active device.
#[derive(Default)]
pub struct Movers {
    waiting: Vec<Waiting>,
    running: Vec<Running>,
}

impl fmt::Debug for Movers {
    // A pair leads back to the device.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Movers({} waiting, {} running)", self.waiting.len(), self.running.len())
    }
}

impl Movers {
    /// Has one more, which waits.
    pub fn add(&mut self, waiting: Waiting) {
        self.waiting.push(waiting);
    }

    /// Has those run that the driver uses. After an error the driver finds its device in need of a reset.
    pub fn wake(&mut self) -> io::Result<()> {
        while let Some(index) = self.waiting.iter().position(|waiting| waiting.pair.port.is_on()) {
            let Waiting { pair, rx, tx, standstill } = self.waiting.remove(index);
            let signals = Arc::clone(&pair.signals);
            let running = pair.spawn(rx, tx, &standstill).inspect_err(|_| signals.needs_reset());
            self.running.push(running?);
        }
        Ok(())
    }

    /// None, until the driver is ready.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// How many there are threads for.
    #[cfg(test)]
    pub fn running(&self) -> usize {
        self.running.len()
    }
}
