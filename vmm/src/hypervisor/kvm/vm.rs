//! The machine: memory slots, interrupt controller, and the order in which they come.

use std::sync::Arc;

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, VmFd};
use vm_memory::{Address, GuestMemory, GuestMemoryRegion};

use super::super::{Error, IrqLine, Trigger, Vm, VmPlan};
use super::{Attempt, Kvm, KvmVcpu, arch, irq, kick};
use crate::event::Event;
use crate::memory::{self, GuestRam};
use crate::registers;

/// A machine of KVM.
#[derive(Debug)]
pub struct KvmVm {
    fd: Arc<VmFd>,
    plan: VmPlan,
    shared: Arc<arch::Shared>,
    /// Made when the machine is sealed.
    #[cfg(target_arch = "aarch64")]
    pub(super) gic: std::sync::OnceLock<kvm_ioctls::DeviceFd>,
}

impl KvmVm {
    /// Memory slots come before the interrupt controller and before any eventfd: a slot added after
    /// the first in-kernel device waits for two grace periods, milliseconds instead of microseconds.
    pub(super) fn new(kvm: &Kvm, plan: &VmPlan) -> Result<Self, Error> {
        kick::install_handler()?;
        let fd = kvm.call("KVM_CREATE_VM", retry_interrupted(|| arch::create_vm(kvm, &plan.ram)))?;
        let vm = Self {
            fd: Arc::new(fd),
            plan: plan.clone(),
            shared: Arc::new(arch::Shared::new(kvm, plan)?),
            #[cfg(target_arch = "aarch64")]
            gic: std::sync::OnceLock::new(),
        };
        vm.map_ram()?;
        vm.map_registers()?;
        arch::prepare(&vm)?;
        Ok(vm)
    }

    fn map_ram(&self) -> Result<(), Error> {
        let slots = self.fd.check_extension_int(Cap::NrMemslots).max(0).cast_unsigned();
        for (slot, region) in (0u32..).zip(self.plan.ram.iter()) {
            let refuse = |why| Error::Ram { base: region.start_addr().raw_value(), len: region.len(), why };
            if slot >= slots {
                return Err(refuse("KVM has no memory slot left"));
            }
            let host = region
                .get_host_address(vm_memory::MemoryRegionAddress(0))
                .map_err(|_| refuse("the region has no host address"))?;
            let slot = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: host as u64,
            };
            // SAFETY: `host` is the start of a mapping of `region.len()` bytes, which `self.plan.ram`
            // keeps for as long as this VM, and with it the slot, exists: the VM fd is shared only
            // with vCPUs and lines, and each of them holds a share of the RAM too.
            let set = unsafe { self.fd.set_user_memory_region(slot) };
            call("KVM_SET_USER_MEMORY_REGION", set)?;
        }
        Ok(())
    }

    /// Loads from the registers of devices find what is in this process, and stores to them stay exits.
    fn map_registers(&self) -> Result<(), Error> {
        let Some(registers) = &self.plan.registers else { return Ok(()) };
        // RAM has the first slots.
        let slot = self.plan.ram.num_regions();
        let slots = usize::try_from(self.fd.check_extension_int(Cap::NrMemslots)).unwrap_or(0);
        let fits = registers.base().is_multiple_of(memory::page_size()) && slot < slots;
        if !fits || !self.fd.check_extension(Cap::ReadonlyMem) {
            return Ok(());
        }
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: registers.base(),
            memory_size: registers.size(),
            userspace_addr: registers.host() as u64,
        };
        // SAFETY: it is a mapping of that length, which `self.plan`, and each share of the VM, keeps for as long as the slot
        // exists. The guest cannot write to it, and what this process writes there it writes as what others read meanwhile.
        let set = unsafe { self.fd.set_user_memory_region(region) };
        call("KVM_SET_USER_MEMORY_REGION", set)
    }

    pub(super) fn fd(&self) -> &Arc<VmFd> {
        &self.fd
    }

    pub(super) fn plan(&self) -> &VmPlan {
        &self.plan
    }

    pub(super) fn shared(&self) -> &arch::Shared {
        &self.shared
    }

    pub(super) fn share(&self) -> VmShare {
        VmShare {
            fd: Arc::clone(&self.fd),
            _ram: Arc::clone(&self.plan.ram),
            _registers: self.plan.registers.clone(),
            arch: Arc::clone(&self.shared),
        }
    }
}

/// Says which call on the VM it was that failed.
pub(super) fn call<T>(call: &'static str, result: Attempt<T>) -> Result<T, Error> {
    result.map_err(|errno| Error::Call { call, object: "the VM".into(), source: errno.into() })
}

/// Says that a saved state cannot be the VM's.
pub(super) fn unfit(why: impl Into<String>) -> Error {
    Error::State { object: "the VM".into(), why: why.into() }
}

impl Vm for KvmVm {
    type Vcpu = KvmVcpu;
    type State = arch::VmState;

    fn create_vcpu(&self, id: u32) -> Result<KvmVcpu, Error> {
        KvmVcpu::new(self, id)
    }

    fn seal(&self) -> Result<(), Error> {
        #[cfg(target_arch = "aarch64")]
        arch::seal(self)?;
        Ok(())
    }

    fn irq_line(&self, line: u32, trigger: Trigger) -> Result<Arc<dyn IrqLine>, Error> {
        irq::line(self, line, trigger)
    }

    fn doorbell(&self, addr: u64, value: u32, event: &Event) -> Result<bool, Error> {
        irq::doorbell(self, addr, value, event).map(|()| true)
    }

    fn save(&self) -> Result<arch::VmState, Error> {
        arch::VmState::save(self)
    }

    fn restore(&self, state: &arch::VmState) -> Result<(), Error> {
        state.restore(self)
    }

    fn rewind(&self) -> Result<(), Error> {
        arch::rewind(self);
        Ok(())
    }
}

/// What keeps the kernel's VM, and the memory it maps, from going away.
#[derive(Debug, Clone)]
pub(super) struct VmShare {
    pub(super) fd: Arc<VmFd>,
    _ram: Arc<GuestRam>,
    _registers: Option<Arc<registers::Pages>>,
    /// What its processors have to know of the machine and of each other.
    pub(super) arch: Arc<arch::Shared>,
}

/// KVM_CREATE_VM answers EINTR when a signal arrives while it waits for other processors.
fn retry_interrupted<T>(mut make: impl FnMut() -> Attempt<T>) -> Attempt<T> {
    const ATTEMPTS: u32 = 8;
    for _ in 1..ATTEMPTS {
        match make() {
            Err(errno) if errno.errno() == libc::EINTR => {}
            done => return done,
        }
    }
    make()
}

#[cfg(test)]
mod tests {
    use super::super::KvmErrno;
    use super::*;

    #[test]
    fn an_interrupted_creation_is_tried_again_but_not_for_ever() {
        let mut left = 3;
        let made = retry_interrupted(|| {
            left -= 1;
            if left > 0 { Err(KvmErrno::new(libc::EINTR)) } else { Ok(()) }
        });
        assert!(made.is_ok());

        let mut calls = 0;
        let made: Attempt<()> = retry_interrupted(|| {
            calls += 1;
            Err(KvmErrno::new(libc::EINTR))
        });
        assert!(made.is_err());
        assert_eq!(calls, 8);
    }
}
