//! Booting by the x86/HVM direct boot ABI (Xen's `docs/misc/pvh.pandoc`), which Linux has called PVH
//! since 4.20: the kernel's ELF note names a 32-bit entry, and EBX points to what it must know.

use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryError};

use super::layout;
use super::{CR0_ET, CR0_PE, DescriptorTable, RFLAGS_RESERVED, Registers, Segment, SpecialRegisters};
use crate::memory::GuestRam;

const START_MAGIC: u32 = 0x336e_c578;
/// The version that brought the memory map.
const VERSION: u32 = 1;

const MAP_RAM: u32 = 1;
const MAP_RESERVED: u32 = 2;

/// An initrd in guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Module {
    /// Guest-physical address.
    pub base: u64,
    /// Length.
    pub len: u64,
}

/// Writes `struct hvm_start_info` and all that hangs on it.
///
/// The command line must be shorter than [`layout::COMMAND_LINE_MAX`] and `size` is that of all RAM.
pub fn write_start_info(
    ram: &GuestRam,
    size: u64,
    command_line: &str,
    initrd: Option<Module>,
    rsdp: u64,
) -> Result<(), GuestMemoryError> {
    let map = layout::memory_map(size);

    let mut info = Vec::with_capacity(56);
    for word in [START_MAGIC, VERSION, 0, u32::from(initrd.is_some())] {
        info.extend_from_slice(&word.to_le_bytes());
    }
    let modules = if initrd.is_some() { layout::MODULES } else { 0 };
    for word in [modules, layout::COMMAND_LINE, rsdp, layout::MEMORY_MAP] {
        info.extend_from_slice(&word.to_le_bytes());
    }
    for word in [map.len() as u32, 0] {
        info.extend_from_slice(&word.to_le_bytes());
    }
    ram.write_slice(&info, GuestAddress(layout::START_INFO))?;

    if let Some(initrd) = initrd {
        // struct hvm_modlist_entry, without a command line of its own.
        let entry: Vec<u8> = [initrd.base, initrd.len, 0, 0].iter().flat_map(|w| w.to_le_bytes()).collect();
        ram.write_slice(&entry, GuestAddress(layout::MODULES))?;
    }

    let mut entries = Vec::with_capacity(map.len() * 24);
    for (base, len, usable) in map {
        entries.extend_from_slice(&base.to_le_bytes());
        entries.extend_from_slice(&len.to_le_bytes());
        entries.extend_from_slice(&(if usable { MAP_RAM } else { MAP_RESERVED }).to_le_bytes());
        entries.extend_from_slice(&[0; 4]);
    }
    ram.write_slice(&entries, GuestAddress(layout::MEMORY_MAP))?;

    let mut line = command_line.as_bytes().to_vec();
    line.push(0);
    ram.write_slice(&line, GuestAddress(layout::COMMAND_LINE))
}

/// The state that the ABI wants at the entry: protected mode, flat segments, no paging.
pub fn registers(entry: u64) -> (Registers, SpecialRegisters) {
    let code = Segment::flat_code(0x8);
    let data = Segment::flat_data(0x10);
    let general =
        Registers { rip: entry, rbx: layout::START_INFO, rflags: RFLAGS_RESERVED, ..Registers::default() };
    let special = SpecialRegisters {
        cs: code,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: Segment::busy_tss(0x18),
        gdt: DescriptorTable::default(),
        idt: DescriptorTable::default(),
        cr0: CR0_PE | CR0_ET,
        cr3: 0,
        cr4: 0,
        efer: 0,
    };
    (general, special)
}

/// The highest place below the hole, on a page, for `len` bytes that must stay above `floor`.
pub fn initrd_base(ram: &GuestRam, floor: u64, len: u64) -> Option<u64> {
    let end = (ram.last_addr().raw_value() + 1).min(layout::HOLE_START);
    let base = end.checked_sub(len)? & !0xfff;
    (base >= floor).then_some(base)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    const MIB: u64 = 1 << 20;

    fn word(ram: &GuestRam, at: u64) -> u64 {
        ram.read_obj(GuestAddress(at)).unwrap()
    }

    #[test]
    fn the_start_info_is_laid_out_as_the_abi_has_it() {
        let size = 16 * MIB;
        let ram = memory::anonymous(&layout::ram(size)).unwrap();
        write_start_info(&ram, size, "quiet", Some(Module { base: 0x80_0000, len: 5 }), 0xe_0000).unwrap();
        let base = layout::START_INFO;
        assert_eq!(word(&ram, base), u64::from(START_MAGIC) | 1 << 32);
        assert_eq!(word(&ram, base + 8), 1 << 32, "no flags, one module");
        assert_eq!(word(&ram, base + 16), layout::MODULES);
        assert_eq!(word(&ram, base + 24), layout::COMMAND_LINE);
        assert_eq!(word(&ram, base + 32), 0xe_0000);
        assert_eq!(word(&ram, base + 40), layout::MEMORY_MAP);
        assert_eq!(word(&ram, base + 48), 3);
        assert_eq!(word(&ram, layout::MODULES), 0x80_0000);
        assert_eq!(word(&ram, layout::MODULES + 8), 5);
        assert_eq!(word(&ram, layout::MEMORY_MAP + 16), 1);
        assert_eq!(word(&ram, layout::MEMORY_MAP + 24 + 16), 2);
        assert_eq!(word(&ram, layout::MEMORY_MAP + 48), MIB);
        let mut line = [0xff; 6];
        ram.read_slice(&mut line, GuestAddress(layout::COMMAND_LINE)).unwrap();
        assert_eq!(&line, b"quiet\0");
    }

    #[test]
    fn an_initrd_goes_to_the_top_and_never_into_the_kernel() {
        for (size, floor, len, expected) in [
            (64 * MIB, 32 * MIB, 5, Some(64 * MIB - 4096)),
            (64 * MIB, 32 * MIB, 32 * MIB, Some(32 * MIB)),
            (64 * MIB, 32 * MIB, 32 * MIB + 1, None),
            (64 * MIB, 32 * MIB, u64::MAX, None),
            (4096 * MIB, 32 * MIB, MIB, Some(3071 * MIB)),
        ] {
            let ram = memory::anonymous(&layout::ram(size)).unwrap();
            assert_eq!(initrd_base(&ram, floor, len), expected, "{size:#x} {len:#x}");
        }
    }
}
