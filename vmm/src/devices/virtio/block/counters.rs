//! What a disk has been asked for.

use std::sync::atomic::{AtomicU64, Ordering};

/// Requests by kind. Written by the device's thread, read by any.
#[derive(Debug, Default)]
pub struct Counters {
    reads: AtomicU64,
    read_bytes: AtomicU64,
    writes: AtomicU64,
    written_bytes: AtomicU64,
    others: AtomicU64,
    failures: AtomicU64,
}

/// What a disk has counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counts {
    /// Reads that were done.
    pub reads: u64,
    /// Their bytes.
    pub read_bytes: u64,
    /// Writes that were done.
    pub writes: u64,
    /// Their bytes.
    pub written_bytes: u64,
    /// Other requests that were done: flushes, discards.
    pub others: u64,
    /// Requests that were answered with an error.
    pub failures: u64,
}

fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}

impl Counters {
    pub(super) fn read(&self, bytes: u64) {
        add(&self.reads, 1);
        add(&self.read_bytes, bytes);
    }

    pub(super) fn wrote(&self, bytes: u64) {
        add(&self.writes, 1);
        add(&self.written_bytes, bytes);
    }

    pub(super) fn other(&self) {
        add(&self.others, 1);
    }

    pub(super) fn failed(&self) {
        add(&self.failures, 1);
    }

    /// The counts so far.
    pub fn get(&self) -> Counts {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            reads: of(&self.reads),
            read_bytes: of(&self.read_bytes),
            writes: of(&self.writes),
            written_bytes: of(&self.written_bytes),
            others: of(&self.others),
            failures: of(&self.failures),
        }
    }
}
