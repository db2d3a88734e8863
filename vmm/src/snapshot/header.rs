//! What a snapshot says about itself.

use serde::{Deserialize, Serialize};

use super::Base;

/// The format that this build writes, and the only one that it reads.
pub const EPOCH: u32 = 6;

/// What a snapshot is, and what a host must be like for it to go on there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The architecture of host and guest, as Rust calls it.
    pub architecture: String,
    /// The hypervisor that wrote the state of processors and machine.
    pub hypervisor: String,
    /// The monitor that made it.
    pub build: String,
    /// When, in seconds since 1970.
    pub created: u64,
    /// Bytes of a page of the host.
    pub page_size: u64,
    /// Processors.
    pub vcpus: u32,
    /// Bytes of RAM that the guest has booted with.
    pub memory: u64,
    /// Bytes of RAM to which it can grow.
    pub memory_max: u64,
    /// The virtio devices, in the order of their slots.
    pub devices: Vec<Slot>,
    /// The processor of the host: an encoded [`Fingerprint`](crate::arch::native::Fingerprint) of the architecture.
    pub fingerprint: Vec<u8>,
    /// Length of the memory's file.
    pub memory_len: u64,
    /// Bytes of its pages that are not all zeroes.
    pub memory_data: u64,
    /// CRC-32 of those, page by page, each with its place before it.
    pub memory_crc: u32,
    /// What the memory lies over: parts of it only are its own.
    pub base: Option<Base>,
}

impl Header {
    /// The file from which all comes that is in no other one: its own, or that of its base.
    pub fn lowest(&self) -> Base {
        self.base.unwrap_or(Base { len: self.memory_len, data: self.memory_data, crc: self.memory_crc })
    }
}

/// A device in its slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot {
    /// Its name.
    pub id: String,
    /// Its device id, as virtio counts them.
    pub kind: u32,
}
