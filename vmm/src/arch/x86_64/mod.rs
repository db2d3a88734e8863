//! x86_64: names are those of the Intel SDM and the AMD APM.

mod state;

pub use state::{
    CR0_ET, CR0_PE, CpuidLeaf, DescriptorTable, Entry, Msr, RFLAGS_RESERVED, Registers, Segment,
    SpecialRegisters,
};
