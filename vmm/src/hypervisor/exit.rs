//! Why a processor came out of the guest.

use std::fmt;

use crate::arch::native;

/// What the guest wants from the monitor. Buffers are at most a register wide, except for string
/// port input, and live until the next run.
#[derive(Debug)]
pub enum Exit<'a> {
    /// A load from an address that is not RAM. The answer goes into `data`.
    MmioRead {
        /// Guest-physical address.
        addr: u64,
        /// To be filled, little endian.
        data: &'a mut [u8],
    },
    /// A store to an address that is not RAM.
    MmioWrite {
        /// Guest-physical address.
        addr: u64,
        /// What was stored, little endian.
        data: &'a [u8],
    },
    /// An `in` instruction: `data.len() / size` reads of the same port.
    #[cfg(target_arch = "x86_64")]
    PortRead {
        /// Port number.
        port: u16,
        /// Bytes of one access: 1, 2 or 4.
        size: usize,
        /// To be filled, little endian.
        data: &'a mut [u8],
    },
    /// An `out` instruction: `data.len() / size` writes of the same port.
    #[cfg(target_arch = "x86_64")]
    PortWrite {
        /// Port number.
        port: u16,
        /// Bytes of one access: 1, 2 or 4.
        size: usize,
        /// What was written, little endian.
        data: &'a [u8],
    },
    /// A call of the firmware, answered by the monitor because the plan says so.
    #[cfg(target_arch = "aarch64")]
    Call {
        /// x0 to x3.
        x: [u64; 4],
        /// What the guest finds in x0.
        answer: &'a mut u64,
    },
    /// The processor halted and nothing in the hypervisor could wake it.
    Halted,
    /// The guest asked for something that concerns the whole machine.
    System(SystemEvent),
    /// Somebody called [`Kick::kick`](super::Kick::kick). The processor is between two instructions.
    Kicked,
    /// The processor cannot go on.
    Crash(Box<Crash>),
}

/// A request about the whole machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SystemEvent {
    /// Power off.
    PowerOff,
    /// Start again.
    Reset,
    /// The guest says that it has crashed.
    Crash,
    /// On x86_64: the processor faulted while it was handling a double fault. Old systems reset
    /// this way on purpose.
    TripleFault,
}

/// The state in which a processor was given up.
#[derive(Debug, Clone)]
pub struct Crash {
    /// Which processor.
    pub vcpu: u32,
    /// What the hypervisor said, in its own words.
    pub reason: String,
    /// Registers, where they could still be read.
    pub registers: Option<native::Registers>,
}

impl fmt::Display for Crash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vcpu {} stopped: {}", self.vcpu, self.reason)?;
        match &self.registers {
            Some(registers) => write!(f, "; {registers}"),
            None => write!(f, "; its registers could not be read"),
        }
    }
}
