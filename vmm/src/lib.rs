//! The monitor under supermachine: one value of this crate's machine type is one microVM.
//!
//! From the metal up: [`hypervisor`] is the seam to whatever runs guest instructions, [`arch`]
//! holds what differs between processors (register files, memory layout, boot protocol),
//! [`memory`] is the guest's RAM, [`bus`] finds the device at an address, [`slots`] says which
//! address that is, [`devices`] are what the guest finds there, [`console`] is the host's side of
//! the serial port, [`snapshot`] a machine on disk, [`control`] the socket on which a machine is
//! driven, [`jail`] and [`seccomp`] what the process may still do then.
//!
//! Nothing here is process-wide: two machines in one process do not know of each other.

pub mod arch;
pub mod bus;
pub mod console;
pub mod control;
pub mod devices;
pub mod entropy;
pub mod event;
pub mod hypervisor;
#[cfg(target_os = "linux")]
pub mod jail;
pub mod kernel;
#[cfg(not(loom))]
pub mod machine;
pub mod memory;
mod mend;
pub mod registers;
#[cfg(target_os = "linux")]
pub mod seccomp;
pub mod slots;
#[cfg(not(loom))]
pub mod snapshot;
pub mod standstill;
pub mod vcpu;
