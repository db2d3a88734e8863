//! One microVM, from its parts to its end.

mod board;
mod build;
mod config;
mod generation;
mod life;
mod look;
mod ram;
mod reset;
mod save;
mod shell;

pub use board::BoardState;
pub use config::{Config, Restore, VCPUS_MAX};
pub use life::{DeviceCounts, Machine, Notice, Observer, Outcome, Phases, Status};
pub use look::Look;
pub use ram::MemoryStatus;

use std::time::Duration;

use crate::{bus, devices, hypervisor, kernel, memory, slots, snapshot, vcpu};

/// Which processors are on, where that is the monitor's business.
pub type PowerState = crate::arch::native::PowerState;

/// A machine could not be built, or did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No machine has that many processors.
    #[error("{0} processors: a machine has 1 to {VCPUS_MAX}")]
    Vcpus(u32),
    /// No machine has that much memory, or so little.
    #[error("{bytes} bytes of memory: {why}")]
    Memory {
        /// What was asked for.
        bytes: u64,
        /// What stands against it.
        why: &'static str,
    },
    /// The kernel's command line cannot be handed over.
    #[error("the kernel's command line {why}")]
    CommandLine {
        /// What stands against it.
        why: String,
    },
    /// From the hypervisor.
    #[error(transparent)]
    Hypervisor(#[from] hypervisor::Error),
    /// From guest RAM.
    #[error(transparent)]
    Ram(#[from] memory::Error),
    /// From kernel or initrd.
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
    /// From the tables that the guest boots by.
    #[error("{0}")]
    Tables(String),
    /// From the slots.
    #[error(transparent)]
    Slots(#[from] slots::Error),
    /// From a device's transport.
    #[error("device {id}: {source}")]
    Transport {
        /// Which device.
        id: slots::SlotId,
        /// What went wrong.
        source: devices::virtio::mmio::Error,
    },
    /// From the pages of their registers.
    #[error(transparent)]
    Registers(#[from] crate::registers::Error),
    /// From a bus.
    #[error(transparent)]
    Bus(#[from] bus::Error),
    /// The host gave no thread, or no randomness.
    #[error("cannot {what}: {source}")]
    Host {
        /// What was wanted of it.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// A processor's thread is gone before its time.
    #[error(
        "the thread of vcpu {0} ended, or did not answer, while the machine was being built, saved or reset"
    )]
    Thread(u32),
    /// From the snapshot.
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
    /// The machine and the snapshot have other devices.
    #[error("cannot go on with device {id}: {why}")]
    Device {
        /// Which device.
        id: slots::SlotId,
        /// What is wrong, and the mend.
        why: &'static str,
    },
    /// A device could not be saved.
    #[error("cannot save device {id}: {source}; the machine stays paused")]
    SaveDevice {
        /// Which device.
        id: slots::SlotId,
        /// Why not.
        source: devices::virtio::StateError,
    },
    /// A device could not become what was saved of it.
    #[error("cannot go on with device {id}: {source}")]
    RestoreDevice {
        /// Which device.
        id: slots::SlotId,
        /// Why not.
        source: devices::virtio::StateError,
    },
    /// Only where a machine came from is a way back to.
    #[error(
        "cannot reset the machine to this snapshot: it came from another one; restore a machine from it instead"
    )]
    Origin,
    /// That takes a snapshot from which it came.
    #[error("cannot {0} a machine that has booted: it takes one that was restored from a snapshot")]
    Booted(&'static str),
    /// Not in this state.
    #[error("cannot {what} a machine that is {status}")]
    Order {
        /// What was asked.
        what: &'static str,
        /// What the machine is.
        status: Status,
    },
    /// Not all processors and devices stopped in time. The machine goes on as it was.
    #[error("the machine was not paused within {within:?}: {source}; it goes on running")]
    Pause {
        /// The deadline.
        within: Duration,
        /// Who was late.
        source: vcpu::Deadline,
    },
    /// There is no power button on this machine.
    #[error("this machine has no power button; tell its init in another way")]
    NoButton,
}

/// Devices are told of on the way to their slots.
pub(crate) type OnSystemEvent = devices::power::OnSystemEvent;
