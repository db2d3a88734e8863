//! The time stamp counter of a processor, taken down on one host and gone on with on another.
//!
//! A guest's TSC is the host's plus an offset. All processors of a machine are moved by the same distance, which the
//! first to be restored decides, so whatever lay between their counters lies between them still; and the guest sees
//! nothing of the time in between.
//!
//! Where KVM does not tell offsets (before Linux 5.16), or the restoring host has to scale its TSC, the counters are
//! written by value instead. KVM then makes those of one machine equal that are written within a second of each other,
//! and does the same to the first if it comes within a second of where a new machine stands: so the first is moved far
//! away before.

use std::sync::Mutex;

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr};
use serde::{Deserialize, Serialize};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::super::super::Error;
use super::super::{Attempt, KvmErrno, KvmVcpu, lock};
use super::msrs::{self, IA32_TSC};
use crate::arch::x86_64::{Msr, same_frequency};

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
ioctl_iow_nr!(KVM_HAS_DEVICE_ATTR, KVMIO, 0xe3, kvm_device_attr);

/// Farther from every counter than KVM takes for the same time.
const FAR: u64 = 1 << 62;

/// A processor's counter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Tsc {
    khz: u32,
    /// What it read when the host's read `host`, or a moment later.
    value: u64,
    host: u64,
    /// Between the two, where KVM says it.
    offset: Option<u64>,
}

/// How the processors of a machine come to agree: what the first of them decided.
#[derive(Debug, Default)]
pub(super) struct Resumption(Mutex<Option<Decision>>);

#[derive(Debug, Clone, Copy)]
enum Decision {
    /// Offsets grow by this.
    Distance(Distance),
    /// One has been written by value.
    Written,
}

/// How far the host's counter is behind where it was when the guest stood still, as the guest takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Distance {
    pub(super) ticks: u64,
    pub(super) khz: u32,
}

impl Resumption {
    /// The next to be restored decides anew.
    pub(super) fn rewind(&self) {
        *lock(&self.0) = None;
    }

    /// The distance, if there is one.
    pub(super) fn distance(&self) -> Option<Distance> {
        match *lock(&self.0) {
            Some(Decision::Distance(distance)) => Some(distance),
            _ => None,
        }
    }
}

#[cfg(test)]
impl Tsc {
    pub(super) fn value(&self) -> u64 {
        self.value
    }

    pub(super) fn khz(&self) -> u32 {
        self.khz
    }

    /// As a KVM that does not tell offsets saves it.
    pub(super) fn forget_offset(&mut self) {
        self.offset = None;
    }
}

impl Tsc {
    pub(super) fn save(vcpu: &KvmVcpu) -> Result<Self, Error> {
        let khz = vcpu.call("KVM_GET_TSC_KHZ", vcpu.fd().get_tsc_khz())?;
        let offset = has_offset(vcpu)
            .then(|| vcpu.call("KVM_GET_DEVICE_ATTR (TSC offset)", offset(vcpu)))
            .transpose()?;
        let host = host_tsc();
        Ok(Self { khz, value: msrs::read(vcpu, IA32_TSC)?, host, offset })
    }

    pub(super) fn restore(&self, vcpu: &KvmVcpu) -> Result<(), Error> {
        let host_khz = vcpu.call("KVM_GET_TSC_KHZ", vcpu.fd().get_tsc_khz())?;
        if self.khz != host_khz {
            vcpu.call("KVM_SET_TSC_KHZ", vcpu.fd().set_tsc_khz(self.khz))?;
        }
        let by_offset = self.offset.filter(|_| same_frequency(self.khz, host_khz) && has_offset(vcpu));
        // Held until it is done: the second may be written only after the first.
        let mut decided = lock(&vcpu.vm.arch.resumption.0);
        match (*decided, by_offset) {
            (None, Some(offset)) => {
                let ticks = self.host.wrapping_sub(host_tsc());
                *decided = Some(Decision::Distance(Distance { ticks, khz: self.khz }));
                set_offset(vcpu, offset.wrapping_add(ticks))
            }
            (Some(Decision::Distance(distance)), Some(offset)) => {
                set_offset(vcpu, offset.wrapping_add(distance.ticks))
            }
            (None, None) => {
                set_value(vcpu, self.value ^ FAR)?;
                set_value(vcpu, self.value)?;
                *decided = Some(Decision::Written);
                Ok(())
            }
            (Some(Decision::Written), None) => set_value(vcpu, self.value),
            _ => {
                Err(vcpu.unfit("the TSC of one processor was saved with its offset, that of another without"))
            }
        }
    }
}

pub(super) fn host_tsc() -> u64 {
    // SAFETY: every processor that runs 64-bit code has the instruction, and it touches no memory.
    unsafe { std::arch::x86_64::_rdtsc() }
}

fn set_value(vcpu: &KvmVcpu, value: u64) -> Result<(), Error> {
    msrs::set(vcpu, &[Msr { index: IA32_TSC, value }])
}

fn attribute(value: Option<&mut u64>) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: value.map_or(0, |value| std::ptr::from_mut(value) as u64),
    }
}

pub(super) fn has_offset(vcpu: &KvmVcpu) -> bool {
    // SAFETY: the kernel reads the structure and nothing that it points to.
    unsafe { ioctl_with_ref(vcpu.fd(), KVM_HAS_DEVICE_ATTR(), &attribute(None)) == 0 }
}

pub(super) fn offset(vcpu: &KvmVcpu) -> Attempt<u64> {
    let mut offset = 0;
    // SAFETY: the kernel reads the structure and writes the 64 bits that `addr` points to, which live until it returns.
    let done = unsafe { ioctl_with_ref(vcpu.fd(), KVM_GET_DEVICE_ATTR(), &attribute(Some(&mut offset))) };
    if done == 0 { Ok(offset) } else { Err(KvmErrno::last()) }
}

pub(super) fn set_offset(vcpu: &KvmVcpu, mut offset: u64) -> Result<(), Error> {
    // SAFETY: the kernel reads the structure and the 64 bits that `addr` points to, which live until it returns.
    let done = unsafe { ioctl_with_ref(vcpu.fd(), KVM_SET_DEVICE_ATTR(), &attribute(Some(&mut offset))) };
    vcpu.call("KVM_SET_DEVICE_ATTR (TSC offset)", if done == 0 { Ok(()) } else { Err(KvmErrno::last()) })
}
