//! One vCPU: KVM_RUN and what its exits mean.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use kvm_bindings::{
    KVM_INTERNAL_ERROR_EMULATION, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN,
    kvm_run,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::super::{Crash, Error, Exit, Kick, SystemEvent, Vcpu};
use super::kick::Kicker;
use super::vm::{self as kvm_vm, VmShare};
use super::{Attempt, KvmVm, ahead, arch};
use crate::arch::native;

/// A processor of KVM.
pub struct KvmVcpu {
    id: u32,
    fd: VcpuFd,
    kicker: Arc<Kicker>,
    /// Size of the mapping that `kvm_run` is the head of.
    #[cfg(target_arch = "x86_64")]
    mapped: usize,
    /// How often in a row KVM did not get at the instruction that it was to emulate.
    unread: u32,
    /// A call whose answer has not been given: [`arch::finish_call`] is due.
    #[cfg(target_arch = "aarch64")]
    call: Option<u64>,
    /// Whether it has left the state in which it was made.
    has_run: bool,
    /// The fd keeps the kernel's VM, this keeps the RAM that the VM maps.
    pub(super) vm: VmShare,
    // Not Send: it belongs to the thread that made it.
    _thread: PhantomData<*const ()>,
}

impl fmt::Debug for KvmVcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KvmVcpu({})", self.id)
    }
}

/// So often in a row an instruction may be out of KVM's reach. Each time the guest has the chance to fetch its page.
const UNREAD_MAX: u32 = 100;

/// An exit without its data, which stays in `kvm_run` until [`KvmVcpu::deliver`] borrows it.
enum Reason {
    #[cfg(target_arch = "x86_64")]
    Port,
    Mmio,
    #[cfg(target_arch = "aarch64")]
    Call {
        is_smc: bool,
    },
    Halted,
    Shutdown,
    SystemEvent(u32),
    Interrupted,
    /// Nothing to do but run again.
    Again,
    InternalError,
    Crash(String),
}

impl KvmVcpu {
    pub(super) fn new(vm: &KvmVm, id: u32) -> Result<Self, Error> {
        let fd = kvm_vm::call("KVM_CREATE_VCPU", vm.fd().create_vcpu(u64::from(id)))?;
        let kicker = Arc::new(Kicker::new(&fd)?);
        let vcpu = Self {
            id,
            fd,
            kicker,
            #[cfg(target_arch = "x86_64")]
            mapped: vm.fd().run_size(),
            unread: 0,
            #[cfg(target_arch = "aarch64")]
            call: None,
            has_run: false,
            vm: vm.share(),
            _thread: PhantomData,
        };
        arch::begin_vcpu(&vcpu)?;
        Ok(vcpu)
    }

    pub(super) fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    #[cfg(target_arch = "x86_64")]
    pub(super) fn has_run(&self) -> bool {
        self.has_run
    }

    pub(super) fn call<T>(&self, call: &'static str, result: Attempt<T>) -> Result<T, Error> {
        result.map_err(|errno| Error::Call {
            call,
            object: format!("vcpu {}", self.id),
            source: errno.into(),
        })
    }

    fn enter(&mut self) -> Result<Reason, Error> {
        match self.fd.run() {
            Ok(exit) => Ok(reason(&exit)),
            Err(errno) => match errno.errno() {
                libc::EINTR => Ok(Reason::Interrupted),
                // A processor that waits for its start-up IPI has been woken.
                libc::EAGAIN => Ok(Reason::Again),
                // What the guest brings about, such as running where no memory is, is its crash and not
                // an error of the monitor.
                libc::EFAULT => Ok(Reason::Crash(
                    "KVM_RUN: bad address: the guest runs or walks page tables where there is no memory"
                        .into(),
                )),
                libc::ENOSYS => {
                    Ok(Reason::Crash("KVM_RUN: an access that KVM cannot decode for the monitor".into()))
                }
                _ => Err(Error::Call {
                    call: "KVM_RUN",
                    object: format!("vcpu {}", self.id),
                    source: errno.into(),
                }),
            },
        }
    }

    /// What became of an instruction that KVM did not emulate.
    ///
    /// Where the processor does not say how long an instruction is, KVM reads even a CPUID from the guest's memory to
    /// step over it. If another processor has just taken the page away, there is nothing to read: as on a machine of
    /// metal, the guest is to have a page fault there, which it has when it runs the instruction again.
    fn not_emulated(&mut self) -> Result<Option<String>, Error> {
        let suberror = suberror(self.fd.get_kvm_run());
        let again = suberror == KVM_INTERNAL_ERROR_EMULATION
            && self.unread < UNREAD_MAX
            && arch::may_run_again(self)?;
        self.unread += 1;
        Ok((!again).then(|| format!("KVM_EXIT_INTERNAL_ERROR {suberror}")))
    }

    /// Says that a saved state cannot be this vCPU's.
    pub(super) fn unfit(&self, why: impl Into<String>) -> Error {
        Error::State { object: format!("vcpu {}", self.id), why: why.into() }
    }

    fn crash(&self, reason: String) -> Exit<'static> {
        Exit::Crash(Box::new(Crash { vcpu: self.id, reason, registers: self.registers().ok() }))
    }
}

fn reason(exit: &VcpuExit<'_>) -> Reason {
    match exit {
        #[cfg(target_arch = "x86_64")]
        VcpuExit::IoIn(..) | VcpuExit::IoOut(..) => Reason::Port,
        VcpuExit::MmioRead(..) | VcpuExit::MmioWrite(..) => Reason::Mmio,
        #[cfg(target_arch = "aarch64")]
        VcpuExit::Hypercall(exit) => {
            // The lower half of the flags is what x86 calls long mode.
            Reason::Call { is_smc: exit.longmode & kvm_bindings::KVM_HYPERCALL_EXIT_SMC != 0 }
        }
        VcpuExit::Hlt => Reason::Halted,
        VcpuExit::Shutdown => Reason::Shutdown,
        VcpuExit::SystemEvent(kind, _) => Reason::SystemEvent(*kind),
        VcpuExit::Intr => Reason::Interrupted,
        VcpuExit::IrqWindowOpen | VcpuExit::SetTpr => Reason::Again,
        VcpuExit::FailEntry(code, cpu) => Reason::Crash(format!(
            "KVM_EXIT_FAIL_ENTRY: the processor refused the guest's state, code {code:#x} on host cpu {cpu}"
        )),
        VcpuExit::InternalError => Reason::InternalError,
        VcpuExit::MemoryFault { flags, gpa, size } => {
            Reason::Crash(format!("KVM_EXIT_MEMORY_FAULT: {size:#x} bytes at {gpa:#x}, flags {flags:#x}"))
        }
        other => Reason::Crash(format!("an exit this monitor did not ask for: {other:?}")),
    }
}

fn suberror(run: &mut kvm_run) -> u32 {
    // SAFETY: the caller has seen KVM_EXIT_INTERNAL_ERROR, for which this is the member that the kernel filled; all
    // of its bit patterns are values.
    unsafe { run.__bindgen_anon_1.internal.suberror }
}

/// The buffer of an access to memory, and whether the guest stores.
fn mmio(run: &mut kvm_run) -> (u64, bool, &mut [u8]) {
    // SAFETY: the caller has seen KVM_EXIT_MMIO, for which this is the member that the kernel filled;
    // all of its bit patterns are values.
    let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
    let len = (mmio.len as usize).min(mmio.data.len());
    (mmio.phys_addr, mmio.is_write != 0, &mut mmio.data[..len])
}

impl Vcpu for KvmVcpu {
    type State = arch::VcpuState;

    fn id(&self) -> u32 {
        self.id
    }

    fn hardware_id(&self) -> Result<u64, Error> {
        arch::hardware_id(self)
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.kicker) as Arc<dyn Kick>
    }

    fn enter_at(&mut self, entry: &native::Entry) -> Result<(), Error> {
        #[cfg(target_arch = "aarch64")]
        {
            if std::mem::take(&mut self.has_run) {
                arch::init_vcpu(self)?;
            }
            // The caller it was is no more.
            self.call = None;
        }
        arch::enter_at(self, entry)
    }

    fn run(&mut self) -> Result<Exit<'_>, Error> {
        self.has_run = true;
        #[cfg(target_arch = "aarch64")]
        if let Some(answer) = self.call.take() {
            arch::finish_call(self, answer)?;
        }
        loop {
            let reason = self.enter()?;
            if !matches!(reason, Reason::InternalError) {
                self.unread = 0;
            }
            match reason {
                Reason::Again => {}
                Reason::InternalError => {
                    if let Some(why) = self.not_emulated()? {
                        return Ok(self.crash(why));
                    }
                }
                #[cfg(target_arch = "x86_64")]
                Reason::Port => {
                    let mapped = self.mapped;
                    return Ok(match arch::port(self.fd.get_kvm_run(), mapped) {
                        (port, size, true, data) => Exit::PortWrite { port, size, data },
                        (port, size, false, data) => Exit::PortRead { port, size, data },
                    });
                }
                Reason::Mmio => {
                    return Ok(match mmio(self.fd.get_kvm_run()) {
                        (addr, true, data) => Exit::MmioWrite { addr, data },
                        (addr, false, data) => Exit::MmioRead { addr, data },
                    });
                }
                #[cfg(target_arch = "aarch64")]
                Reason::Call { is_smc } => {
                    let x = arch::begin_call(self, is_smc)?;
                    return Ok(Exit::Call { x, answer: self.call.insert(0) });
                }
                Reason::Halted => return Ok(Exit::Halted),
                Reason::Shutdown => return Ok(Exit::System(SystemEvent::TripleFault)),
                Reason::SystemEvent(kind) => {
                    return Ok(match kind {
                        KVM_SYSTEM_EVENT_SHUTDOWN => Exit::System(SystemEvent::PowerOff),
                        KVM_SYSTEM_EVENT_RESET => Exit::System(SystemEvent::Reset),
                        KVM_SYSTEM_EVENT_CRASH => Exit::System(SystemEvent::Crash),
                        other => self.crash(format!("KVM_EXIT_SYSTEM_EVENT of unknown kind {other}")),
                    });
                }
                Reason::Interrupted => {
                    self.kicker.acknowledge();
                    return Ok(Exit::Kicked);
                }
                Reason::Crash(reason) => return Ok(self.crash(reason)),
            }
        }
    }

    fn save(&mut self) -> Result<arch::VcpuState, Error> {
        // The caller sees the answer in its register when it goes on, here or elsewhere.
        #[cfg(target_arch = "aarch64")]
        if let Some(answer) = self.call.take() {
            arch::finish_call(self, answer)?;
        }
        arch::VcpuState::save(self)
    }

    fn restore(&mut self, state: &arch::VcpuState) -> Result<(), Error> {
        #[cfg(target_arch = "aarch64")]
        {
            // A timer's interrupt that it was handling stays active otherwise: once a processor has run, KVM ignores what
            // the GIC's registers are told of interrupts that have a physical one below.
            if self.has_run {
                arch::init_vcpu(self)?;
            }
            // It is no more as it was made: its next entry is a reset.
            self.has_run = true;
            self.call = None;
        }
        state.restore(self)
    }

    fn stood_still(&mut self) -> Result<(), Error> {
        arch::stood_still(self)
    }

    fn map_ahead(&mut self, addr: u64, len: u64) -> Result<bool, Error> {
        ahead::map(self, addr, len)
    }

    fn registers(&self) -> Result<native::Registers, Error> {
        arch::registers(self)
    }
}
