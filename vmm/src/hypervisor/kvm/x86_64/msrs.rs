//! Which MSRs are a processor's state, and reading and writing them.
//!
//! All that KVM lists for its processors are, with two changes. [`UNLISTED`] are, though KVM does not list them.
//! [`APART`] are not, each for the reason given there. Of the rest some may not exist for a guest, by its CPUID: KVM
//! refuses user space only what it refuses the guest too, so what cannot be read holds nothing. [`ALWAYS`] are the
//! exception: each guest has them, and a KVM that does not give them is an error.
//!
//! Some are read-only for user space as well. Where such a one holds what it should, it needs no writing; where it
//! does not, the host is another and that is an error. Banks of machine checks are left out: nothing but user space
//! raises a machine check, and this one does not.

use std::ops::RangeInclusive;

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};

use super::super::super::{Error, Vcpu};
use super::super::KvmVcpu;
use crate::arch::x86_64::Msr;

pub(super) const IA32_TSC: u32 = 0x10;
pub(super) const IA32_TSC_DEADLINE: u32 = 0x6e0;

/// The ranges of memory types. KVM has them for every guest, and leaves them to those who know.
const UNLISTED: &[RangeInclusive<u32>] =
    &[0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f, 0x2ff..=0x2ff];

const APART: &[RangeInclusive<u32>] = &[
    // Written by way of its offset, so that all processors agree.
    IA32_TSC..=IA32_TSC,
    // Written last, when there are a clock and an APIC to compare it and to fire.
    IA32_TSC_DEADLINE..=IA32_TSC_DEADLINE,
    // KVM_WALL_CLOCK, old and new: writing them is an order to write the time into memory that the guest may have put
    // to another use since.
    0x11..=0x11,
    0x4b56_4d00..=0x4b56_4d00,
    // Hyper-V's, which no guest is offered; reading one makes KVM set up what serves them.
    0x4000_0000..=0x4000_01ff,
];

/// What system calls, memory types and the kernel's own data hang on.
const ALWAYS: [u32; 11] = [
    0x174,       // IA32_SYSENTER_CS
    0x175,       // IA32_SYSENTER_ESP
    0x176,       // IA32_SYSENTER_EIP
    0x277,       // IA32_PAT
    0x2ff,       // IA32_MTRR_DEF_TYPE
    0x1a0,       // IA32_MISC_ENABLE
    0xc000_0081, // STAR
    0xc000_0082, // LSTAR
    0xc000_0083, // CSTAR
    0xc000_0084, // SFMASK
    0xc000_0102, // KERNEL_GS_BASE
];

/// So many go into one call.
const BATCH: usize = KVM_MAX_MSR_ENTRIES;

/// The ones to save, of those that KVM lists.
fn saved(listed: &[u32]) -> Vec<u32> {
    let among = |ranges: &[RangeInclusive<u32>], index| ranges.iter().any(|range| range.contains(&index));
    let mut saved: Vec<_> = listed.iter().copied().filter(|&index| !among(APART, index)).collect();
    saved.extend(ALWAYS.iter().copied().chain(UNLISTED.iter().cloned().flatten()));
    saved.sort_unstable();
    saved.dedup();
    saved
}

/// All that are state.
pub(super) fn save(vcpu: &KvmVcpu) -> Result<Vec<Msr>, Error> {
    let indices = saved(&vcpu.vm.arch.msrs);
    let mut found = Vec::with_capacity(indices.len());
    let mut left = &indices[..];
    while !left.is_empty() {
        let asked = &left[..left.len().min(BATCH)];
        let got = get(vcpu, asked)?;
        let done = got.len();
        found.extend(got);
        left = &left[done..];
        if let (true, Some((refused, rest))) = (done < asked.len(), left.split_first()) {
            if ALWAYS.contains(refused) {
                return Err(partial(
                    vcpu,
                    "KVM_GET_MSRS",
                    found.len(),
                    indices.len(),
                    format!("MSR {refused:#x}"),
                ));
            }
            left = rest;
        }
    }
    Ok(found)
}

/// One that has to be there.
pub(super) fn read(vcpu: &KvmVcpu, index: u32) -> Result<u64, Error> {
    match get(vcpu, &[index])?.first() {
        Some(msr) => Ok(msr.value),
        None => Err(partial(vcpu, "KVM_GET_MSRS", 0, 1, format!("MSR {index:#x}"))),
    }
}

/// Those up to the first that KVM does not give.
fn get(vcpu: &KvmVcpu, indices: &[u32]) -> Result<Vec<Msr>, Error> {
    let entries: Vec<_> =
        indices.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut list = Msrs::from_entries(&entries)
        .map_err(|_| partial(vcpu, "KVM_GET_MSRS", 0, indices.len(), "more than KVM takes".into()))?;
    let done = vcpu.call("KVM_GET_MSRS", vcpu.fd().get_msrs(&mut list))?;
    Ok(list.as_slice().iter().take(done).map(|m| Msr { index: m.index, value: m.data }).collect())
}

/// Writes what was saved.
pub(super) fn restore(vcpu: &KvmVcpu, msrs: &[Msr]) -> Result<(), Error> {
    let mut left = msrs;
    while !left.is_empty() {
        let batch = &left[..left.len().min(BATCH)];
        let done = put(vcpu, batch)?;
        left = &left[done..];
        if let (true, Some((refused, rest))) = (done < batch.len(), left.split_first()) {
            if get(vcpu, &[refused.index])? != [*refused] {
                return Err(refusal(vcpu, msrs, msrs.len() - left.len()));
            }
            left = rest;
        }
    }
    Ok(())
}

/// Takes back what a processor that has run has asked of page faults that are served later, before it becomes what it was
/// when `msrs` were saved: KVM then forgets those under way, of which that one has not heard.
pub(super) fn forget_async_faults(vcpu: &KvmVcpu, msrs: &[Msr]) -> Result<(), Error> {
    const KVM_ASYNC_PF_EN: u32 = 0x4b56_4d02;
    match msrs.iter().find(|msr| msr.index == KVM_ASYNC_PF_EN) {
        Some(_) => set(vcpu, &[Msr { index: KVM_ASYNC_PF_EN, value: 0 }]),
        None => Ok(()),
    }
}

/// Writes all of these, of which there are few.
pub(super) fn set(vcpu: &KvmVcpu, msrs: &[Msr]) -> Result<(), Error> {
    let done = put(vcpu, msrs)?;
    if done < msrs.len() { Err(refusal(vcpu, msrs, done)) } else { Ok(()) }
}

/// Writes until KVM refuses one, and says how many it took.
fn put(vcpu: &KvmVcpu, msrs: &[Msr]) -> Result<usize, Error> {
    if msrs.is_empty() {
        return Ok(0);
    }
    let entries: Vec<_> =
        msrs.iter().map(|m| kvm_msr_entry { index: m.index, data: m.value, ..Default::default() }).collect();
    let list = Msrs::from_entries(&entries).map_err(|_| refusal(vcpu, msrs, 0))?;
    vcpu.call("KVM_SET_MSRS", vcpu.fd().set_msrs(&list))
}

fn refusal(vcpu: &KvmVcpu, msrs: &[Msr], done: usize) -> Error {
    let next = msrs.get(done).map_or_else(String::new, |m| format!("MSR {:#x} = {:#x}", m.index, m.value));
    partial(vcpu, "KVM_SET_MSRS", done, msrs.len(), next)
}

fn partial(vcpu: &KvmVcpu, call: &'static str, done: usize, given: usize, next: String) -> Error {
    Error::Partial { call, object: format!("vcpu {}", vcpu.id()), done, given, next }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_kvm_lists_is_saved_but_for_what_stands_apart() {
        let listed =
            [0x10, 0x11, 0x12, 0x3b, 0x6e0, 0x4000_0000, 0x4000_0118, 0x4b56_4d00, 0x4b56_4d01, 0xda0];
        let saved = saved(&listed);
        for (index, expected) in [
            (0x10, false),
            (0x11, false),
            (0x12, true),
            (0x3b, true),
            (0x6e0, false),
            (0x4000_0000, false),
            (0x4000_0118, false),
            (0x4b56_4d00, false),
            (0x4b56_4d01, true),
            (0xda0, true),
            // Not listed.
            (0x200, true),
            (0x20f, true),
            (0x210, false),
            (0x2ff, true),
            (0xc000_0082, true),
            (0x400, false),
        ] {
            assert_eq!(saved.contains(&index), expected, "{index:#x}");
        }
        assert!(saved.is_sorted_by(|a, b| a < b), "each once");
    }
}
