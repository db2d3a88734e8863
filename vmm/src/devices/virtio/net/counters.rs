//! What a network device has moved.

use std::sync::atomic::{AtomicU64, Ordering};

/// One direction. Written by the device's threads, read by any.
#[derive(Debug, Default)]
pub struct Direction {
    packets: AtomicU64,
    bytes: AtomicU64,
    dropped: AtomicU64,
    throttled: AtomicU64,
}

impl Direction {
    pub(super) fn packet(&self, bytes: u64) {
        self.packets.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn dropped(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn throttled(&self) {
        self.throttled.fetch_add(1, Ordering::Relaxed);
    }

    fn get(&self) -> DirectionCounts {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DirectionCounts {
            packets: of(&self.packets),
            bytes: of(&self.bytes),
            dropped: of(&self.dropped),
            throttled: of(&self.throttled),
        }
    }
}

/// Both directions.
#[derive(Debug, Default)]
pub struct Counters {
    /// To the guest.
    pub(super) rx: Direction,
    /// From the guest.
    pub(super) tx: Direction,
}

/// What one direction has counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct DirectionCounts {
    /// Packets that arrived; a large one that the other side will cut up is one.
    pub packets: u64,
    /// Their bytes, without the header of this device.
    pub bytes: u64,
    /// Packets that did not: the link was down, or the other side refused them.
    pub dropped: u64,
    /// How often packets had to wait for a rate limit.
    pub throttled: u64,
}

/// What a device has counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counts {
    /// To the guest.
    pub rx: DirectionCounts,
    /// From the guest.
    pub tx: DirectionCounts,
}

impl Counters {
    /// The counts so far.
    pub fn get(&self) -> Counts {
        Counts { rx: self.rx.get(), tx: self.tx.get() }
    }
}
