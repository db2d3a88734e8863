//! Where things are in the guest-physical address space.
//!
//! The guest learns all of it from the device tree, so nothing outside this crate depends on the
//! numbers; snapshots do, which is why they are here and nowhere else.

use crate::slots::Window;

/// Distributor of the GICv3.
pub const GICD_BASE: u64 = 0x0800_0000;
/// Its size.
pub const GICD_SIZE: u64 = 0x1_0000;
/// First redistributor; one follows the other, a processor each.
pub const GICR_BASE: u64 = 0x080a_0000;
/// Size of one redistributor: the RD frame and the SGI frame.
pub const GICR_SIZE: u64 = 0x2_0000;
/// INTID of the first shared peripheral interrupt.
pub const SPI_BASE: u32 = 32;
/// How many shared peripheral interrupts the distributor implements.
pub const SPI_COUNT: u32 = 128;

/// The PL011.
pub const SERIAL_BASE: u64 = 0x0900_0000;
/// Its interrupt.
pub const SERIAL_LINE: u32 = 1;
/// The interrupt that says that the generation id has changed.
pub const GENERATION_LINE: u32 = 2;
/// The generation id's page. It is memory, since drivers copy from it as they like, but none that the
/// guest may use otherwise.
pub const GENERATION_ID: u64 = 0x0c00_0000;
/// The page's size, where pages are largest.
pub const GENERATION_SIZE: u64 = 0x1_0000;
/// RAM that the guest is not told of as such.
pub const BESIDE_RAM: [(u64, u64); 1] = [(GENERATION_ID, GENERATION_SIZE)];
/// Virtio devices; the lines below are for devices that every machine has.
pub const VIRTIO: Window =
    Window { base: 0x0a00_0000, stride: 0x1000, first_line: 16, lines: 112, count: 112 };

/// Start of RAM.
pub const RAM_BASE: u64 = 0x4000_0000;
/// Room for the device tree, and its alignment: a kernel maps no more of it.
pub const FDT_MAX: u64 = 0x20_0000;
/// The largest command line that Linux has room for, with the terminating zero.
pub const COMMAND_LINE_MAX: usize = 2048;

/// RAM of the given size as (address, length).
pub fn ram(size: u64) -> Vec<(u64, u64)> {
    vec![(RAM_BASE, size)]
}

/// Where memory can be plugged: above all RAM, on a boundary that suits every kernel.
pub fn pluggable(size: u64) -> u64 {
    const ALIGN: u64 = 1 << 30;
    (RAM_BASE + size).next_multiple_of(ALIGN)
}
