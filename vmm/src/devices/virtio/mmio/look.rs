//! How far a device and its driver have come, for people who wonder why a guest does not go on.

use std::sync::atomic::Ordering;

use virtio_queue::QueueT;

use super::super::queue::Position;
use super::{QueueState, Transport};

/// What is to be seen of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sight {
    /// The status register.
    pub status: u32,
    /// What the driver was interrupted for and may not have heard of.
    pub unheard: u32,
    /// The queues that the driver uses.
    pub queues: Vec<QueueSight>,
}

/// What is to be seen of a queue: counts that run on around 65,536.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueSight {
    /// Which one.
    pub index: usize,
    /// Requests that the driver has offered, where that can be read.
    pub offered: Option<u16>,
    /// Of them, those that the device has taken.
    pub taken: u16,
    /// Of them, those that it has given back.
    pub given: u16,
}

impl Transport {
    /// Looks at it, on a machine that stands still.
    pub fn look(&self) -> Sight {
        let inner = self.lock();
        let queues = inner.queues.iter().zip(&self.tracks).enumerate();
        let ready = queues.filter(|(_, (queue, _))| queue.ready());
        let queues = ready.map(|(index, (queue, track))| {
            let Position { taken, given, .. } = track.get();
            let offered = queue.avail_idx(&*self.ram, Ordering::Acquire).ok().map(|index| index.0);
            QueueSight { index, offered, taken, given }
        });
        let queues = queues.collect();
        let states = inner.queues.iter().zip(&self.tracks);
        let states: Vec<_> = states.map(|(queue, track)| QueueState::of(queue, track.get())).collect();
        let unheard = self.unheard(self.signals.interrupt_status(), inner.driver_features, &states);
        Sight { status: inner.status, unheard, queues }
    }
}
