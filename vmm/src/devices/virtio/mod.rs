//! Virtio devices (OASIS virtio 1.2) on the MMIO transport, version 2.
//!
//! The transport owns what the specification calls common: features, status, queue addresses,
//! interrupts. A device says what it is and, once the driver is ready, is handed its queues and
//! serves them on threads of its own. What the guest says is believed nowhere: a driver that breaks
//! the rules finds its device in need of a reset, and everybody else undisturbed.

pub mod balloon;
pub mod block;
pub mod fs;
pub mod limit;
pub mod mem;
pub mod mmio;
#[cfg(target_os = "linux")]
pub mod net;
mod queue;
pub mod rng;
#[cfg(target_os = "linux")]
mod scatter;
mod signals;
mod state;
#[cfg(test)]
mod testing;
pub mod vsock;
mod worker;

use std::sync::Arc;

use crate::memory::GuestRam;
use crate::standstill::Standstill;

pub use queue::{Broken, VirtQueue};
pub use signals::{Counters, Counts, Signals, USED_BUFFER};
pub(crate) use state::at_most;
pub use worker::{AtOnce, Serve, Worker};

/// VIRTIO_F_VERSION_1: the one version of the interface that is spoken.
pub const F_VERSION_1: u64 = 1 << 32;
/// VIRTIO_F_EVENT_IDX: both sides say when they want to be notified.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_INDIRECT_DESC: descriptors may be in tables of their own.
pub const F_INDIRECT_DESC: u64 = 1 << 28;

/// What every device offers, because the transport and the queues do it.
pub const F_COMMON: u64 = F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC;

/// Everything that a device needs while its driver is at work.
#[derive(Debug)]
pub struct Activation {
    /// Guest RAM.
    pub ram: Arc<GuestRam>,
    /// All queues; one that the driver left alone is not ready.
    pub queues: Vec<VirtQueue>,
    /// The way to the driver.
    pub signals: Arc<Signals>,
    /// What the device's threads follow, by a [`Leash`](crate::standstill::Leash) each: a paused machine
    /// is one in which nothing touches the guest.
    pub standstill: Arc<Standstill>,
    /// The features that both sides have agreed on.
    pub features: u64,
}

/// The device could not begin its work.
#[derive(Debug, thiserror::Error)]
#[error("{device} could not start: {source}")]
pub struct ActivateError {
    /// Which device.
    pub device: &'static str,
    /// Why not.
    pub source: std::io::Error,
}

/// A device's state could not be saved, or is none that it can go on from: what stands against it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct StateError(pub String);

/// A kind of device. Its methods are called by the transport, one at a time.
pub trait Device: Send {
    /// The device id, section 5.
    fn kind(&self) -> u32;

    /// Features beyond [`F_COMMON`].
    fn features(&self) -> u64 {
        0
    }

    /// The largest size of each queue, powers of two.
    fn queues(&self) -> &[u16];

    /// Whether another device may have the same interrupt: one of which a machine has many, and a guest uses few.
    fn shares_wire(&self) -> bool {
        false
    }

    /// Whether nothing is asked of it before the host has given it something, so that its doorbells may take the long way
    /// until [`Machine::engage`](crate::machine::Machine::engage).
    fn is_idle(&self) -> bool {
        false
    }

    /// How many of the queues, the last ones, are served where the driver rings ([`Device::rung`]): they have no doorbell.
    fn served_at_once(&self) -> usize {
        0
    }

    /// The driver has rung for queue `index`, one of those that are served at once. Must come to an end by itself, and soon: a
    /// processor of the guest waits.
    fn rung(&mut self, _index: usize) {}

    /// The device's configuration space; what lies behind it is zero. It is asked for after each store of the driver's to a
    /// register. What changes while the driver is at work is told with [`Signals::config_changed`].
    fn configuration(&self) -> Vec<u8> {
        Vec::new()
    }

    /// A store to the configuration space. Most have nothing that can be written.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver is ready. Must not block; work begins on other threads.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// What has to be known, beside its queues and what the transport keeps, to go on elsewhere. Called while
    /// the machine stands still, so no request is under way. Devices of which nothing more is to be known say
    /// nothing.
    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        Ok(Vec::new())
    }

    /// Becomes what was saved, on a machine that stands still. Comes before [`Device::activate`], which follows
    /// if the driver was at work; a device that was made for something else than was saved refuses.
    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        if state.is_empty() { Ok(()) } else { Err(StateError("it has no state, but some was saved".into())) }
    }

    /// Its machine goes back in place to where it was saved: what it was given since then goes. Comes between
    /// [`Device::reset`] and [`Device::restore`].
    fn rest(&mut self) {}

    /// The driver wants to start over, or is gone. When this returns, nothing of the device touches
    /// guest RAM any more. May be called on a device that is not active.
    fn reset(&mut self);
}
