//! Where things are in the guest-physical address space and in port space.
//!
//! Devices are found by ACPI and the boot structures by register, so nothing outside this crate
//! depends on the numbers; snapshots do, which is why they are here and nowhere else.

use crate::slots::Window;

/// PVH start info (`struct hvm_start_info`), its module list behind it.
pub const START_INFO: u64 = 0x6000;
/// The list of modules: the initrd.
pub const MODULES: u64 = 0x6100;
/// PVH memory map.
pub const MEMORY_MAP: u64 = 0x7000;
/// Kernel command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Its largest size with the terminating zero: what Linux has room for.
pub const COMMAND_LINE_MAX: usize = 2048;
/// End of the memory below the hole that the VGA adapter and firmware made.
pub const LOW_END: u64 = 0x9_fc00;
/// ACPI tables, in what used to be the BIOS: the map says reserved, so the guest leaves them alone.
pub const ACPI: u64 = 0xe_0000;
/// Room for them.
pub const ACPI_SIZE: u64 = 0x1_8000;
/// The generation id's page, behind the tables.
pub const GENERATION_ID: u64 = 0xf_8000;
/// Where memory goes on behind the hole, and where kernels may be loaded.
pub const HIGH_START: u64 = 0x10_0000;

/// The hole for devices below 4 GiB begins here.
pub const HOLE_START: u64 = 0xc000_0000;
/// And ends here, with the memory that found no room below.
pub const HOLE_END: u64 = 0x1_0000_0000;
/// The I/O APIC.
pub const IO_APIC: u32 = 0xfec0_0000;
/// The local APICs.
pub const LOCAL_APIC: u32 = 0xfee0_0000;

/// Virtio devices. Lines below 5 are taken by history (timer, cascade, serial ports), 5 is the
/// generic event device, and the I/O APIC ends at 23.
pub const VIRTIO: Window = Window { base: 0xd000_0000, stride: 0x1000, first_line: 6, lines: 18, count: 64 };

/// First serial port.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Its interrupt.
pub const SERIAL_LINE: u32 = 4;
/// [`AcpiPower`](crate::devices::power::AcpiPower).
pub const POWER_PORT: u16 = 0x600;
/// [`Panic`](crate::devices::power::Panic), where other machines have it.
pub const PANIC_PORT: u16 = 0x505;
/// The interrupt of the generic event device.
pub const POWER_LINE: u32 = 5;

/// RAM of the given size as (address, length): below the hole, and the rest above it.
pub fn ram(size: u64) -> Vec<(u64, u64)> {
    let low = size.min(HOLE_START);
    let high = size - low;
    if high == 0 { vec![(0, low)] } else { vec![(0, low), (HOLE_END, high)] }
}

/// RAM that the guest is not told of as such: none.
pub const BESIDE_RAM: [(u64, u64); 0] = [];

/// Where memory can be plugged: above all RAM, on a boundary that suits every kernel.
pub fn pluggable(size: u64) -> u64 {
    const ALIGN: u64 = 1 << 30;
    let end = ram(size).last().map_or(0, |(base, len)| base + len);
    end.max(HOLE_END).next_multiple_of(ALIGN)
}

/// What the guest is told about the first megabyte and the rest, as (address, length, usable).
pub fn memory_map(size: u64) -> Vec<(u64, u64, bool)> {
    let mut map = vec![(0, LOW_END, true), (LOW_END, HIGH_START - LOW_END, false)];
    for (base, len) in ram(size) {
        let start = base.max(HIGH_START);
        if let Some(len) = (base + len).checked_sub(start).filter(|len| *len > 0) {
            map.push((start, len, true));
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn memory_is_split_at_the_hole() {
        for (size, expected) in [
            (128 * MIB, vec![(0, 128 * MIB)]),
            (3072 * MIB, vec![(0, 3072 * MIB)]),
            (3073 * MIB, vec![(0, 3072 * MIB), (HOLE_END, MIB)]),
            (8192 * MIB, vec![(0, 3072 * MIB), (HOLE_END, 5120 * MIB)]),
        ] {
            assert_eq!(ram(size), expected);
        }
    }

    #[test]
    fn memory_is_plugged_above_all_that_is_there() {
        for (size, expected) in [(128 * MIB, 4), (3072 * MIB, 4), (3073 * MIB, 5), (8192 * MIB, 9)] {
            assert_eq!(pluggable(size), expected << 30);
        }
    }

    #[test]
    fn the_map_is_sorted_disjoint_and_leaves_the_tables_out() {
        for size in [MIB, 2 * MIB, 128 * MIB, 8192 * MIB] {
            let map = memory_map(size);
            for pair in map.windows(2) {
                assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{map:x?}");
            }
            for table in [ACPI, ACPI + ACPI_SIZE - 1, GENERATION_ID + 0xfff] {
                assert!(
                    map.iter().all(|(base, len, usable)| !usable || table < *base || table >= base + len)
                );
            }
        }
    }
}
