//! From kernel and initrd files to processors that are ready to run them.

use vm_memory::{Bytes, GuestAddress};

pub use super::image::{Loaded, load};

use super::fdt::Tree;
use super::{CpuModel, Entry};
use crate::memory::{self, GuestRam};
use crate::slots::SlotMap;

/// What the guest has to be told.
#[derive(Debug)]
pub struct Platform<'a> {
    /// Kernel command line.
    pub command_line: &'a str,
    /// MPIDR_EL1 of each processor, by its number.
    pub hardware_ids: &'a [u64],
    /// Its devices.
    pub slots: &'a SlotMap,
    /// What the host's processor can do.
    pub model: &'a CpuModel,
    /// Randomness for the guest's first generator.
    pub seed: &'a [u8; 64],
}

/// The device tree could not be written.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// It could not be made.
    #[error("cannot make the device tree: {0}")]
    Make(#[from] vm_fdt::Error),
    /// It could not be put into guest RAM.
    #[error("cannot put the device tree into guest RAM: {0}")]
    Put(#[from] vm_memory::GuestMemoryError),
}

/// Writes the device tree and says where each processor starts: the first at the kernel, the others
/// nowhere, until the guest turns them on.
pub fn finish(
    ram: &GuestRam,
    loaded: &Loaded,
    platform: &Platform<'_>,
) -> Result<Vec<Option<Entry>>, TreeError> {
    let tree = Tree {
        ram: memory::size(ram),
        command_line: platform.command_line,
        initrd: loaded.initrd,
        mpidrs: platform.hardware_ids,
        slots: platform.slots,
        seed: platform.seed,
    };
    ram.write_slice(&tree.write()?, GuestAddress(loaded.fdt))?;
    let first = Entry { pc: loaded.kernel.start, x0: loaded.fdt };
    let mut entries = vec![None; platform.hardware_ids.len()];
    if let Some(entry) = entries.first_mut() {
        *entry = Some(first);
    }
    Ok(entries)
}
