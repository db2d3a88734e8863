//! The register file of a virtual processor, in no hypervisor's terms.

use std::fmt;

use serde::{Deserialize, Serialize};

/// General registers at EL1.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    /// X0 to X30.
    pub x: [u64; 31],
    /// SP_EL0: the stack of user space.
    pub sp_el0: u64,
    /// SP_EL1: the stack of the kernel.
    pub sp_el1: u64,
    /// Program counter.
    pub pc: u64,
    /// PSTATE in the layout of SPSR.
    pub pstate: u64,
}

impl fmt::Display for Registers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "pc={:#x} pstate={:#x} sp_el1={:#x} sp_el0={:#x}",
            self.pc, self.pstate, self.sp_el1, self.sp_el0
        )?;
        for (i, x) in self.x.iter().enumerate() {
            write!(f, " x{i}={x:#x}")?;
        }
        Ok(())
    }
}

/// Where a processor starts. Processors that wait for PSCI CPU_ON have no entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// First instruction.
    pub pc: u64,
    /// X0: the device tree, by the Linux boot protocol.
    pub x0: u64,
}

/// What the host's processor can do for guests. The hypervisor shows a guest the feature registers of
/// the host, so there is nothing to choose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuModel;
