//! The monitor under supermachine: one value of this crate's machine type is one microVM.
//!
//! From the metal up: [`hypervisor`] is the seam to whatever runs guest instructions, [`arch`]
//! holds what differs between processors (register files, memory layout, boot protocol), and
//! [`memory`] is the guest's RAM. Nothing here is process-wide: two machines in one process do
//! not know of each other.

pub mod arch;
pub mod hypervisor;
pub mod memory;
