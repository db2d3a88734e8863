//! The parts of a machine's state.

use serde::{Deserialize, Deserializer, Serialize};

use super::layers::{EXTENTS_MAX, REGIONS_MAX};
use crate::devices::virtio::{at_most, mmio};
use crate::hypervisor::PsciBy;
use crate::machine::{BoardState, PowerState};
use crate::memory::Region;
use crate::snapshot::Extent;

/// Everything about a machine but its RAM. What the hypervisor's backend says of processors and machine is encoded
/// by its own types, since no other backend could read it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineState {
    /// What it is made of.
    pub shape: Shape,
    /// Where its RAM is in the memory's file.
    #[serde(deserialize_with = "at_most::<REGIONS_MAX, _, _>")]
    pub ram: Vec<Region>,
    /// In which parts of that file, or of the base that it lies over, something is. All else is mapped from no file.
    #[serde(deserialize_with = "at_most::<EXTENTS_MAX, _, _>")]
    pub parts: Vec<Extent>,
    /// Which parts of that file are its own, where it lies over a base.
    #[serde(deserialize_with = "few")]
    pub over: Option<Vec<Extent>>,
    /// Each processor, by number.
    pub vcpus: Vec<Vec<u8>>,
    /// Which processors are on, where that is the monitor's business.
    pub power: Option<PowerState>,
    /// What is no processor's.
    pub vm: Vec<u8>,
    /// What is soldered on.
    pub board: BoardState,
    /// The virtio devices by name, in the order of their slots.
    pub devices: Vec<(String, mmio::State)>,
}

/// No more than there can be: an extent takes many times the memory of its bytes.
fn few<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<Extent>>, D::Error> {
    #[derive(Deserialize)]
    struct Few(#[serde(deserialize_with = "at_most::<EXTENTS_MAX, _, _>")] Vec<Extent>);

    Ok(Option::<Few>::deserialize(deserializer)?.map(|few| few.0))
}

/// What a machine is made of, beside its devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Processors.
    pub vcpus: u32,
    /// Bytes of RAM at its boot.
    pub memory: u64,
    /// Bytes of RAM to which it can grow, where it can.
    pub memory_max: Option<u64>,
    /// Who turns processors on and off.
    pub psci: PsciBy,
}
