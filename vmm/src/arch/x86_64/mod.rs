//! x86_64: names are those of the Intel SDM and the AMD APM.

mod acpi;
pub mod boot;
mod bzimage;
mod cpuid;
mod elf;
mod fingerprint;
pub mod layout;
mod pvh;
mod state;

pub use cpuid::CpuModel;
pub use fingerprint::{Fingerprint, Host, same_frequency};
pub use state::{
    CR0_ET, CR0_PE, CpuidLeaf, DescriptorTable, Entry, Msr, RFLAGS_RESERVED, Registers, Segment,
    SpecialRegisters,
};

/// Which processors are on: the hypervisor knows.
pub type PowerState = ();
