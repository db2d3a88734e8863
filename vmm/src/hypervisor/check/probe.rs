//! A guest of a few instructions, run through the seam.
//!
//! It stores a byte where no memory is, loads one from there, stores what it loaded and turns
//! itself off: enough to know that instructions run, that accesses reach the monitor with their
//! data, and that answers reach the guest.

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::super::{Error, Exit, Hypervisor, Kick, PsciBy, SystemEvent, Vcpu, Vm, VmPlan};
use crate::arch::native;
use crate::memory;

/// Real processors need microseconds, emulated ones milliseconds.
const DEADLINE: Duration = Duration::from_secs(10);
/// How long a processor may take to come out after a kick.
const GRACE: Duration = Duration::from_secs(2);

const STORED: u8 = 0x53;
const ANSWER: u8 = 0x4d;

#[cfg(target_arch = "x86_64")]
mod guest {
    use super::native::{Entry, RFLAGS_RESERVED, Registers, SpecialRegisters};

    pub const RAM: (u64, u64) = (0, 0x2000);
    pub const START: u64 = 0x1000;
    pub const MMIO: u64 = 0x8000;
    pub const PORT: u16 = 0x3f8;
    /// In real mode, with all segments at 0.
    pub const CODE: &[u8] = &[
        0xba, 0xf8, 0x03, // mov dx, PORT
        0xb0, 0x53, // mov al, STORED
        0xee, // out dx, al
        0xa2, 0x00, 0x80, // mov [MMIO], al
        0xa0, 0x01, 0x80, // mov al, [MMIO + 1]
        0xa2, 0x00, 0x80, // mov [MMIO], al
        0xf4, // hlt
    ];

    pub fn entry() -> Entry {
        let registers = Registers { rip: START, rflags: RFLAGS_RESERVED, ..Registers::default() };
        Entry {
            cpuid: Vec::new(),
            msrs: Vec::new(),
            registers: Some((registers, SpecialRegisters::real_mode())),
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod guest {
    use super::native::Entry;

    pub const RAM: (u64, u64) = (0x4000_0000, 0x1_0000);
    pub const START: u64 = 0x4000_1000;
    pub const MMIO: u64 = 0x0900_0000;
    pub const CODE: &[u8] = &[
        0x61, 0x0a, 0x80, 0x52, // mov w1, #STORED
        0x01, 0x00, 0x00, 0x39, // strb w1, [x0]
        0x02, 0x04, 0x40, 0x39, // ldrb w2, [x0, #1]
        0x02, 0x00, 0x00, 0x39, // strb w2, [x0]
        0x00, 0x01, 0x80, 0x52, // mov w0, #8
        0x00, 0x80, 0xb0, 0x72, // movk w0, #0x8400, lsl #16    PSCI SYSTEM_OFF
        0x02, 0x00, 0x00, 0xd4, // hvc #0
    ];

    pub fn entry() -> Entry {
        Entry { pc: START, x0: MMIO }
    }
}

/// The probe guest did not do what it must.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// It could not be built or run.
    #[error(transparent)]
    Hypervisor(#[from] Error),
    /// It got no memory.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// Its memory took no code.
    #[error("its code could not be written: {0}")]
    Load(#[from] vm_memory::GuestMemoryError),
    /// It ran, but not as it must.
    #[error("at step {step} it should {expected}, but came out with {found}")]
    Unexpected {
        /// Counted from 1.
        step: usize,
        /// What the guest is made to do.
        expected: &'static str,
        /// What it did.
        found: String,
    },
    /// It ran too long, and stopped when it was told to.
    #[error("it did not finish within {} s", DEADLINE.as_secs())]
    Deadline,
    /// It ran too long and could not be stopped.
    #[error("it could not be stopped: the hypervisor did not answer a kick within {} s", GRACE.as_secs())]
    Stuck,
    /// The host gave no thread.
    #[error("no thread to run it on: {0}")]
    Thread(std::io::Error),
}

/// Runs the guest and judges each of its exits.
pub fn run<H: Hypervisor>(hypervisor: &H) -> Result<(), ProbeError> {
    let ram = Arc::new(memory::anonymous(&[guest::RAM])?);
    ram.write_slice(guest::CODE, GuestAddress(guest::START))?;
    let vm = hypervisor.create_vm(&VmPlan {
        ram,
        vcpus: 1,
        interrupt_controller: false,
        registers: None,
        psci: PsciBy::default(),
    })?;

    let (kickers, kicker) = mpsc::channel();
    let (verdicts, verdict) = mpsc::channel();
    // Detached on purpose: a hypervisor that does not let go of the thread must not hold us as well.
    thread::Builder::new()
        .name("probe".into())
        .spawn(move || {
            let _ = verdicts.send(run_vcpu(&vm, &kickers));
        })
        .map_err(ProbeError::Thread)?;

    if let Ok(result) = verdict.recv_timeout(DEADLINE) {
        return result;
    }
    if let Ok(kicker) = kicker.try_recv() {
        kicker.kick();
    }
    match verdict.recv_timeout(GRACE) {
        Ok(Err(other)) if !matches!(other, ProbeError::Unexpected { .. }) => Err(other),
        Ok(_) => Err(ProbeError::Deadline),
        Err(_) => Err(ProbeError::Stuck),
    }
}

/// What the guest must do next.
#[derive(Debug, Clone, Copy)]
enum Step {
    #[cfg(target_arch = "x86_64")]
    Out(u8),
    Store(u8),
    Load,
    End,
}

#[cfg(target_arch = "x86_64")]
const STEPS: &[Step] = &[Step::Out(STORED), Step::Store(STORED), Step::Load, Step::Store(ANSWER), Step::End];
#[cfg(target_arch = "aarch64")]
const STEPS: &[Step] = &[Step::Store(STORED), Step::Load, Step::Store(ANSWER), Step::End];

impl Step {
    fn expected(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Out(_) => "write a byte to a port",
            Self::Store(_) => "store a byte where no memory is",
            Self::Load => "load a byte from where no memory is",
            Self::End => "come to its end",
        }
    }

    /// Takes the exit, answers it, and says whether it is the one wanted.
    fn judge(self, exit: Exit<'_>) -> Result<(), String> {
        match (self, exit) {
            #[cfg(target_arch = "x86_64")]
            (Self::Out(byte), Exit::PortWrite { port: guest::PORT, size: 1, data }) if data == [byte] => {
                Ok(())
            }
            (Self::Store(byte), Exit::MmioWrite { addr: guest::MMIO, data }) if data == [byte] => Ok(()),
            (Self::Load, Exit::MmioRead { addr, data: [answer] }) if addr == guest::MMIO + 1 => {
                *answer = ANSWER;
                Ok(())
            }
            (Self::End, Exit::Halted | Exit::System(SystemEvent::PowerOff)) => Ok(()),
            (_, Exit::Crash(crash)) => Err(crash.to_string()),
            (_, other) => Err(format!("{other:?}")),
        }
    }
}

fn run_vcpu<V: Vm>(vm: &V, kickers: &mpsc::Sender<Arc<dyn Kick>>) -> Result<(), ProbeError> {
    let mut vcpu = vm.create_vcpu(0)?;
    vm.seal()?;
    // The receiver lives until the verdict, so this fails only when nobody cares any more.
    let _ = kickers.send(vcpu.kicker());
    vcpu.enter_at(&guest::entry())?;
    for (step, wanted) in (1..).zip(STEPS) {
        wanted.judge(vcpu.run()?).map_err(|found| ProbeError::Unexpected {
            step,
            expected: wanted.expected(),
            found,
        })?;
    }
    vcpu.kicker().kick();
    match vcpu.run()? {
        Exit::Kicked => Ok(()),
        other => Err(ProbeError::Unexpected {
            step: STEPS.len() + 1,
            expected: "come out because it was kicked",
            found: format!("{other:?}"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_takes_its_exit_and_no_other() {
        assert!(Step::Store(1).judge(Exit::MmioWrite { addr: guest::MMIO, data: &[1] }).is_ok());
        assert!(Step::Store(1).judge(Exit::MmioWrite { addr: guest::MMIO, data: &[2] }).is_err());
        assert!(Step::Store(1).judge(Exit::MmioWrite { addr: guest::MMIO + 1, data: &[1] }).is_err());
        assert!(Step::Store(1).judge(Exit::MmioWrite { addr: guest::MMIO, data: &[1, 0] }).is_err());
        let mut data = [0];
        assert!(Step::Load.judge(Exit::MmioRead { addr: guest::MMIO + 1, data: &mut data }).is_ok());
        assert_eq!(data, [ANSWER]);
        assert!(Step::End.judge(Exit::Halted).is_ok());
        assert!(Step::End.judge(Exit::Kicked).is_err());
    }
}
