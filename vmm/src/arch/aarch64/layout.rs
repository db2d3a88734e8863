//! Where things are in the guest-physical address space.
//!
//! The guest learns all of it from the device tree, so nothing outside this crate depends on the
//! numbers; snapshots do, which is why they are here and nowhere else.

/// Distributor of the GICv3.
pub const GICD_BASE: u64 = 0x0800_0000;
/// Its size.
pub const GICD_SIZE: u64 = 0x1_0000;
/// First redistributor; one follows the other, a processor each.
pub const GICR_BASE: u64 = 0x080a_0000;
/// Size of one redistributor: the RD frame and the SGI frame.
pub const GICR_SIZE: u64 = 0x2_0000;
/// Number of the first shared peripheral interrupt.
pub const SPI_BASE: u32 = 32;
/// How many shared peripheral interrupts the distributor implements.
pub const SPI_COUNT: u32 = 128;
/// Start of RAM.
pub const RAM_BASE: u64 = 0x4000_0000;
