//! The counter of a machine: one offset between it and the host's.
//!
//! A guest has two counters, virtual and physical. On Linux 6.4 and later both are given the same offset, from the
//! beginning, so that both count from when the machine was made and go on from where they were when it is restored.
//! Earlier kernels know an offset of the virtual counter only, which is that of all processors and is set by writing
//! the counter of one; there a guest that looks at its physical counter sees the host's, and a leap.

use std::sync::Mutex;

use kvm_bindings::{KVMIO, kvm_arm_counter_offset};
use kvm_ioctls::{Cap, VmFd};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::super::super::Error;
use super::super::vm::{call, unfit};
use super::super::{KvmErrno, KvmVcpu, KvmVm, lock};
use super::registers::{PTIMER_CNT, TIMER_CNT};
use super::{get, set};

ioctl_iow_nr!(KVM_ARM_SET_COUNTER_OFFSET, KVMIO, 0xb5, kvm_arm_counter_offset);

/// What the processors of a machine find out together.
#[derive(Debug, Default)]
pub(super) struct Counter(Mutex<Offsets>);

#[derive(Debug, Default)]
struct Offsets {
    /// What the host counted when the first processor was made.
    born: Option<u64>,
    /// The offset that KVM has been given.
    given: u64,
    /// How the machine goes on, once a processor has been restored.
    resumed: Option<Resumed>,
}

#[derive(Debug, Clone, Copy)]
enum Resumed {
    /// With this offset, which KVM has yet to be given.
    At(u64),
    /// The counter has been written.
    Already,
}

impl Counter {
    /// Takes down when the machine began. Kernels that know one offset only do not show the physical counter either.
    pub(super) fn look(&self, vcpu: &KvmVcpu) -> Result<(), Error> {
        let mut offsets = lock(&self.0);
        if offsets.born.is_none() && has_offset(&vcpu.vm.fd) {
            offsets.born = Some(get(vcpu, PTIMER_CNT)?);
        }
        Ok(())
    }

    /// To be called when no vCPU is in use.
    pub(super) fn begin(&self, vm: &KvmVm) -> Result<(), Error> {
        let mut offsets = lock(&self.0);
        let Some(born) = offsets.born else { return Ok(()) };
        set_offset(vm, born)?;
        offsets.given = born;
        Ok(())
    }

    /// The next to be restored says anew.
    pub(super) fn rewind(&self) {
        lock(&self.0).resumed = None;
    }

    /// The first to be restored says from where the machine's counter goes on, `count`; all have stood still when
    /// theirs was read, so it is later than any that a guest has seen.
    pub(super) fn resume(&self, vcpu: &KvmVcpu, count: u64) -> Result<(), Error> {
        let mut offsets = lock(&self.0);
        if offsets.resumed.is_none() {
            offsets.resumed = Some(if has_offset(&vcpu.vm.fd) {
                let host = get(vcpu, PTIMER_CNT)?.wrapping_add(offsets.given);
                Resumed::At(host.wrapping_sub(count))
            } else {
                set(vcpu, TIMER_CNT, count)?;
                Resumed::Already
            });
        }
        Ok(())
    }

    /// To be called when all processors have been restored and none is in use.
    pub(super) fn settle(&self, vm: &KvmVm) -> Result<(), Error> {
        let mut offsets = lock(&self.0);
        match offsets.resumed {
            None => return Err(unfit("none of its processors has been restored")),
            Some(Resumed::Already) => {}
            Some(Resumed::At(offset)) => {
                set_offset(vm, offset)?;
                offsets.given = offset;
            }
        }
        Ok(())
    }
}

fn has_offset(vm: &VmFd) -> bool {
    vm.check_extension(Cap::CounterOffset)
}

fn set_offset(vm: &KvmVm, counter_offset: u64) -> Result<(), Error> {
    let offset = kvm_arm_counter_offset { counter_offset, reserved: 0 };
    // SAFETY: the kernel reads a structure of exactly this type.
    let done = unsafe { ioctl_with_ref(&**vm.fd(), KVM_ARM_SET_COUNTER_OFFSET(), &offset) };
    call("KVM_ARM_SET_COUNTER_OFFSET", if done == 0 { Ok(()) } else { Err(KvmErrno::last()) })
}
