//! The registers that KVM lists for a processor, by number.
//!
//! All of them are state but for the two counters, which belong to the machine: they run on while somebody reads one
//! register after the other, and writing them for one processor moves those of all.
//!
//! Identification registers are among them, and KVM takes them only if they say what this host's processor can do
//! (some kernels: exactly what it says); so a state from a host that can do more fails here, if not before.

use kvm_bindings::{KVM_REG_SIZE_MASK, KVM_REG_SIZE_SHIFT, KVMIO, kvm_reg_list};
use serde::{Deserialize, Serialize};
use vmm_sys_util::ioctl::ioctl_with_mut_ptr;
use vmm_sys_util::ioctl_iowr_nr;

use super::super::super::{Error, Vcpu};
use super::super::{KvmErrno, KvmVcpu};
use super::system_register;

ioctl_iowr_nr!(KVM_GET_REG_LIST, KVMIO, 0xb0, kvm_reg_list);

/// CNTVCT_EL0. By accident, and for ever, KVM has its number and that of CNTV_CVAL_EL0 the wrong way round.
pub(super) const TIMER_CNT: u64 = system_register(3, 3, 14, 3, 2);
/// CNTPCT_EL0.
pub(super) const PTIMER_CNT: u64 = system_register(3, 3, 14, 0, 1);

/// More than any processor has, whatever its extensions.
const MAX: usize = 4096;
/// KVM's largest: a vector register of SVE.
const MAX_SIZE: usize = 256;

/// Numbers, and the values one behind the other: their sizes are in the numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Registers {
    ids: Vec<u64>,
    values: Vec<u8>,
}

/// Bytes in register `id`. None is no size of KVM's.
fn size(id: u64) -> Option<usize> {
    let size = 1usize.checked_shl(((id & KVM_REG_SIZE_MASK) >> KVM_REG_SIZE_SHIFT) as u32)?;
    (size <= MAX_SIZE).then_some(size)
}

fn is_state(id: u64) -> bool {
    id != TIMER_CNT && id != PTIMER_CNT
}

impl Registers {
    pub(super) fn save(vcpu: &KvmVcpu) -> Result<Self, Error> {
        let mut saved = Self { ids: list(vcpu)?, values: Vec::new() };
        saved.ids.retain(|&id| is_state(id));
        for &id in &saved.ids {
            let mut value = [0; MAX_SIZE];
            let Some(value) = size(id).and_then(|size| value.get_mut(..size)) else {
                return Err(vcpu.unfit(format!("KVM lists register {id:#x}, of a size nobody knows")));
            };
            get(vcpu, id, value)?;
            saved.values.extend_from_slice(value);
        }
        Ok(saved)
    }

    pub(super) fn restore(&self, vcpu: &KvmVcpu) -> Result<(), Error> {
        let registers = self.split().ok_or_else(|| {
            vcpu.unfit(format!("{} registers with {} bytes in all", self.ids.len(), self.values.len()))
        })?;
        for (id, value) in registers {
            let done = vcpu.fd().set_one_reg(id, value);
            let Err(refused) = done else { continue };
            // What is so already needs no writing, which is how those come through that cannot be written.
            let mut current = [0; MAX_SIZE];
            let current = &mut current[..value.len()];
            if get(vcpu, id, current).is_err() || current != value {
                return Err(Error::Partial {
                    call: "KVM_SET_ONE_REG",
                    object: format!("vcpu {}", vcpu.id()),
                    done: self.ids.iter().take_while(|other| **other != id).count(),
                    given: self.ids.len(),
                    next: format!("register {id:#x} = {value:02x?} ({refused}; here it is {current:02x?})"),
                });
            }
        }
        Ok(())
    }

    /// Each with its value, if all have one and nothing is left.
    fn split(&self) -> Option<Vec<(u64, &[u8])>> {
        let mut left = &self.values[..];
        let mut registers = Vec::with_capacity(self.ids.len());
        for &id in &self.ids {
            let (value, rest) = left.split_at_checked(size(id)?)?;
            registers.push((id, value));
            left = rest;
        }
        left.is_empty().then_some(registers)
    }
}

/// KVM says how many there are where there is no room for them.
fn list(vcpu: &KvmVcpu) -> Result<Vec<u64>, Error> {
    let mut room = 0;
    loop {
        // `struct kvm_reg_list`: how many, and they.
        let mut list = vec![0; 1 + room];
        list[0] = room as u64;
        // SAFETY: the kernel writes no more ids than the first word says, for which there is room behind it.
        let done = unsafe { ioctl_with_mut_ptr(vcpu.fd(), KVM_GET_REG_LIST(), list.as_mut_ptr()) };
        let found = usize::try_from(list[0]).unwrap_or(usize::MAX);
        if done == 0 {
            list.truncate(1 + found);
            list.remove(0);
            return Ok(list);
        }
        let errno = KvmErrno::last();
        if errno.errno() != libc::E2BIG || found <= room || found > MAX {
            return vcpu.call("KVM_GET_REG_LIST", Err(errno));
        }
        room = found;
    }
}

fn get(vcpu: &KvmVcpu, id: u64, value: &mut [u8]) -> Result<(), Error> {
    vcpu.call("KVM_GET_ONE_REG", vcpu.fd().get_one_reg(id, value)).map(drop)
}

/// For tests of those that have such registers.
#[cfg(test)]
impl Registers {
    pub(super) fn change(&mut self, id: u64, value: &[u8]) {
        let at: usize = self.ids.iter().take_while(|other| **other != id).map(|id| size(*id).unwrap()).sum();
        assert!(self.ids.contains(&id) && size(id) == Some(value.len()), "{id:#x}");
        self.values[at..at + value.len()].copy_from_slice(value);
    }

    pub(super) fn spoil_values(&mut self) {
        self.values.push(0);
    }

    /// Gives the last register, of 64 bits, another number.
    pub(super) fn spoil_id(&mut self, id: u64) {
        let last = self.ids.iter_mut().rfind(|other| size(**other) == size(id)).unwrap();
        *last = id;
    }

    pub(super) fn differences(&self, other: &Self) -> Vec<String> {
        let (here, there) = (self.split().unwrap(), other.split().unwrap());
        let pairs = here.iter().zip(&there).filter(|(a, b)| a != b);
        let mut found: Vec<_> = pairs.map(|(a, b)| format!("{a:x?} is not {b:x?}")).collect();
        if here.len() != there.len() {
            found.push(format!("{} are not {}", here.len(), there.len()));
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const U32: u64 = 2 << KVM_REG_SIZE_SHIFT;
    const U64: u64 = 3 << KVM_REG_SIZE_SHIFT;
    const U2048: u64 = 8 << KVM_REG_SIZE_SHIFT;

    #[test]
    fn the_counters_are_not_saved_but_the_deadlines_are() {
        for (id, expected) in [
            (0x6030_0000_0013_df1a, false), // KVM_REG_ARM_TIMER_CNT
            (0x6030_0000_0013_df01, false), // KVM_REG_ARM_PTIMER_CNT
            (0x6030_0000_0013_df02, true),  // KVM_REG_ARM_TIMER_CVAL
            (0x6030_0000_0013_df19, true),  // KVM_REG_ARM_TIMER_CTL
            (0x6030_0000_0013_c005, true),
        ] {
            assert_eq!(is_state(id), expected, "{id:#x}");
        }
    }

    #[test]
    fn values_are_taken_apart_by_the_sizes_in_the_numbers_or_not_at_all() {
        // Sizes as ids, bytes there are, whether that fits.
        for (ids, len, fits) in [
            (&[U32, U64][..], 12, true),
            (&[U2048], 256, true),
            (&[], 0, true),
            (&[U32, U64], 11, false),
            (&[U32, U64], 13, false),
            (&[9 << KVM_REG_SIZE_SHIFT], 512, false),
            (&[15 << KVM_REG_SIZE_SHIFT], 1 << 15, false),
            (&[u64::MAX], 8, false),
        ] {
            let values: Vec<u8> = (0..len).map(|i: usize| i as u8).collect();
            let registers = Registers { ids: ids.to_vec(), values: values.clone() };
            let split = registers.split();
            assert_eq!(split.is_some(), fits, "{ids:x?} {len}");
            if let Some(split) = split {
                assert_eq!(split.iter().map(|(id, _)| *id).collect::<Vec<_>>(), ids);
                assert_eq!(split.iter().flat_map(|(_, value)| value.to_vec()).collect::<Vec<_>>(), values);
            }
        }
    }
}
