//! From kernel and initrd files to processors that are ready to run them.

use std::io::{Cursor, Read};

use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryError};

use super::pvh::{self, Module};
use super::{CpuModel, Entry, Msr, acpi, cpuid, elf, layout};
use crate::kernel::{EM_X86_64, Error, Format, Image};
use crate::memory::{self, GuestRam};
use crate::slots::SlotMap;

/// What this machine boots, for messages.
const WANTED: &str = "an uncompressed vmlinux or a bzImage for x86_64, with PVH (CONFIG_PVH=y)";

/// IA32_MISC_ENABLE with fast string operations.
const MISC_ENABLE: Msr = Msr { index: 0x1a0, value: 1 };
/// IA32_MTRR_DEF_TYPE: on, and all memory is write-back.
const MTRR_DEF_TYPE: Msr = Msr { index: 0x2ff, value: 1 << 11 | 6 };

/// A kernel in guest RAM, with its initrd.
#[derive(Debug)]
pub struct Loaded {
    kernel: elf::Loaded,
    initrd: Option<Module>,
}

/// Loads the files. Needs nothing of the machine but its memory.
pub fn load(ram: &GuestRam, mut kernel: Image, initrd: Option<Image>) -> Result<Loaded, Error> {
    let format = Format::of(&kernel.head()?);
    let loaded = match format {
        Format::Elf { machine: EM_X86_64 } => elf::load(ram, &mut kernel.file),
        Format::BzImage => {
            let mut image = Vec::new();
            kernel.file.read_to_end(&mut image).map_err(|error| kernel.unreadable(error))?;
            let elf = super::bzimage::extract(&image).map_err(|why| kernel.damaged(why))?;
            elf::load(ram, &mut Cursor::new(elf))
        }
        other => return Err(kernel.not(other, WANTED)),
    };
    let loaded = loaded.map_err(|error| match error {
        elf::Error::Damaged(why) => kernel.damaged(why),
        elf::Error::TooLarge { needed, room } => kernel.too_large(needed, room),
        elf::Error::NoPvh => Error::Format {
            path: kernel.path.clone(),
            found: "a kernel without a PVH entry".into(),
            wanted: WANTED,
        },
    })?;
    let initrd = initrd.map(|initrd| load_initrd(ram, loaded.end, initrd)).transpose()?;
    Ok(Loaded { kernel: loaded, initrd })
}

fn load_initrd(ram: &GuestRam, floor: u64, mut initrd: Image) -> Result<Module, Error> {
    let len = initrd.len;
    let Some(base) = pvh::initrd_base(ram, floor, len) else {
        let end = (ram.last_addr().raw_value() + 1).min(layout::HOLE_START);
        return Err(initrd.too_large(len, end.saturating_sub(floor)));
    };
    ram.read_exact_volatile_from(GuestAddress(base), &mut initrd.file, len as usize)
        .map_err(|error| initrd.unreadable(std::io::Error::other(error)))?;
    Ok(Module { base, len })
}

/// What the guest has to be told.
#[derive(Debug)]
pub struct Platform<'a> {
    /// Kernel command line, shorter than [`layout::COMMAND_LINE_MAX`].
    pub command_line: &'a str,
    /// The hypervisor's name of each processor, by its number. Here they are the same.
    pub hardware_ids: &'a [u64],
    /// Its devices.
    pub slots: &'a SlotMap,
    /// What the host's processor can do.
    pub model: &'a CpuModel,
    /// Randomness for the guest's first generator, for which the PVH protocol has no place.
    pub seed: &'a [u8; 64],
}

/// The tables could not be put into guest RAM.
#[derive(Debug, thiserror::Error)]
#[error("cannot put the boot tables into guest RAM: {0}")]
pub struct TableError(#[from] GuestMemoryError);

/// Writes the tables and says where each processor starts. The first runs the kernel, the others
/// wait for it.
pub fn finish(
    ram: &GuestRam,
    loaded: &Loaded,
    platform: &Platform<'_>,
) -> Result<Vec<Option<Entry>>, TableError> {
    // Nobody makes a machine with 2^32 processors.
    let vcpus = platform.hardware_ids.len() as u32;
    let rsdp = acpi::write(ram, vcpus, platform.slots)?;
    pvh::write_start_info(ram, memory::size(ram), platform.command_line, loaded.initrd, rsdp)?;
    let entry = |id| {
        Some(Entry {
            cpuid: cpuid::policy(platform.model, id, vcpus),
            msrs: vec![MISC_ENABLE, MTRR_DEF_TYPE],
            registers: (id == 0).then(|| pvh::registers(loaded.kernel.entry)),
        })
    };
    Ok((0..vcpus).map(entry).collect())
}
