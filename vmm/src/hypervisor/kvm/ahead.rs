//! Pages that are mapped into a guest before it asks for them.

use kvm_bindings::{KVMIO, kvm_pre_fault_memory};
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;

use super::super::Error;
use super::{Attempt, KvmErrno, KvmVcpu};

ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, KVMIO, 0xd5, kvm_pre_fault_memory);

/// Maps `len` bytes from `addr`. False where this kernel cannot: before Linux 6.11, and on aarch64.
pub(super) fn map(vcpu: &KvmVcpu, addr: u64, len: u64) -> Result<bool, Error> {
    let mut range = kvm_pre_fault_memory { gpa: addr, size: len, ..kvm_pre_fault_memory::default() };
    while range.size > 0 {
        // SAFETY: the kernel reads and writes a structure of this type, which is borrowed for the call; what it maps is RAM
        // that the machine has already.
        if unsafe { ioctl_with_mut_ref(vcpu.fd(), KVM_PRE_FAULT_MEMORY(), &mut range) } == 0 {
            continue;
        }
        match KvmErrno::last() {
            // What is left is in the structure.
            errno if matches!(errno.errno(), libc::EINTR | libc::EAGAIN) => {}
            errno if matches!(errno.errno(), libc::ENOTTY | libc::EOPNOTSUPP | libc::EINVAL) => {
                return Ok(false);
            }
            errno => return vcpu.call("KVM_PRE_FAULT_MEMORY", Attempt::Err(errno)),
        }
    }
    Ok(true)
}
