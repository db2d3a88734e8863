//! What the CPUID instruction tells a guest: all that the host can do for it, less what a machine
//! does not have, plus where each processor stands among the others.
//!
//! The topology is flat: one package, one thread a core, processor number as APIC id.

use super::CpuidLeaf;

/// What the host can do for guests, before any policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuModel {
    /// The hypervisor's list.
    pub cpuid: Vec<CpuidLeaf>,
}

const ECX_PDCM: u32 = 1 << 15;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
const EAX_ARAT: u32 = 1 << 2;
const ECX_CMP_LEGACY: u32 = 1 << 1;
/// Performance counters of AMD processors: core, northbridge, last level cache.
const ECX_AMD_COUNTERS: u32 = 1 << 23 | 1 << 24 | 1 << 28;

const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// The answers of processor `id` of `count`.
pub fn policy(model: &CpuModel, id: u32, count: u32) -> Vec<CpuidLeaf> {
    // Bits of an APIC id.
    let bits = count.max(1).next_power_of_two().trailing_zeros();
    let mut leaves: Vec<_> = model
        .cpuid
        .iter()
        .filter(|leaf| !matches!(leaf.leaf, 0xb | 0x1f))
        .map(|leaf| {
            let mut leaf = *leaf;
            adjust(&mut leaf, id, count, bits);
            leaf
        })
        .collect();
    leaves.extend(topology(id, count, bits));
    leaves
}

fn adjust(leaf: &mut CpuidLeaf, id: u32, count: u32, bits: u32) {
    let several = count > 1;
    match leaf.leaf {
        1 => {
            leaf.ebx = leaf.ebx & 0xffff | (count & 0xff) << 16 | (id & 0xff) << 24;
            // KVM offers the deadline timer by a capability of its own, which is required.
            leaf.ecx = leaf.ecx & !ECX_PDCM | ECX_TSC_DEADLINE | ECX_HYPERVISOR;
            leaf.edx = if several { leaf.edx | EDX_HTT } else { leaf.edx & !EDX_HTT };
        }
        // Caches: the last level is shared by all, the others by nobody.
        4 | 0x8000_001d => {
            let level = leaf.eax >> 5 & 7;
            let sharing = if level >= 3 { (1 << bits) - 1 } else { 0 };
            leaf.eax = leaf.eax & !0x03ff_c000 | sharing << 14;
            if leaf.leaf == 4 && leaf.eax & 0x1f != 0 {
                leaf.eax = leaf.eax & 0x03ff_ffff | ((1 << bits) - 1) << 26;
            }
        }
        // Power management is the host's.
        6 => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (leaf.eax & EAX_ARAT, 0, 0, 0),
        // No performance counters: their state would be the host's too.
        0xa | 0x8000_0022 => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
        0x8000_0001 => {
            leaf.ecx &= !ECX_AMD_COUNTERS;
            leaf.ecx = if several { leaf.ecx | ECX_CMP_LEGACY } else { leaf.ecx & !ECX_CMP_LEGACY };
        }
        0x8000_0008 => leaf.ecx = leaf.ecx & !0xf0ff | (count - 1) & 0xff | bits << 12,
        0x8000_001e => (leaf.eax, leaf.ebx, leaf.ecx) = (id, id & 0xff, 0),
        _ => {}
    }
}

fn topology(id: u32, count: u32, bits: u32) -> [CpuidLeaf; 3] {
    let level = |subleaf: u32, shift, processors, kind: u32| CpuidLeaf {
        leaf: 0xb,
        subleaf: Some(subleaf),
        eax: shift,
        ebx: processors,
        ecx: subleaf | kind << 8,
        edx: id,
    };
    [level(0, 0, 1, LEVEL_THREAD), level(1, bits, count, LEVEL_CORE), level(2, 0, 0, 0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(leaf: u32, eax: u32, ecx: u32) -> CpuidLeaf {
        CpuidLeaf { leaf, eax, ebx: 0xffff_ffff, ecx, edx: 0xffff_ffff, subleaf: None }
    }

    fn answer(model: &[CpuidLeaf], id: u32, count: u32, leaf: u32, subleaf: Option<u32>) -> CpuidLeaf {
        let answers = policy(&CpuModel { cpuid: model.to_vec() }, id, count);
        let mut found = answers.into_iter().filter(|a| a.leaf == leaf && a.subleaf == subleaf);
        let answer = found.next().unwrap();
        assert_eq!(found.next(), None);
        answer
    }

    #[test]
    fn each_processor_has_its_own_number() {
        for (id, count) in [(0, 1), (0, 2), (1, 2), (5, 7), (31, 32)] {
            let model = [leaf(1, 0, 0xffff_ffff), leaf(0x8000_001e, 9, 9), leaf(0xb, 1, 1)];
            let first = answer(&model, id, count, 1, None);
            assert_eq!((first.ebx >> 24, first.ebx >> 16 & 0xff), (id, count));
            assert_eq!(first.edx & EDX_HTT != 0, count > 1);
            assert_eq!(answer(&model, id, count, 0x8000_001e, None).eax, id);
            let core = answer(&model, id, count, 0xb, Some(1));
            assert_eq!((core.edx, core.ebx), (id, count));
            assert!(1 << core.eax >= count && (count == 1 || 1 << (core.eax - 1) < count));
        }
    }

    #[test]
    fn what_a_machine_has_not_is_not_offered() {
        let model = [leaf(1, 0, 0), leaf(6, 0xff, 0xff), leaf(0xa, 5, 5), leaf(0x8000_0001, 0, u32::MAX)];
        let first = answer(&model, 0, 1, 1, None);
        assert_eq!(first.ecx, ECX_TSC_DEADLINE | ECX_HYPERVISOR);
        let power = answer(&model, 0, 1, 6, None);
        assert_eq!((power.eax, power.ebx, power.ecx), (EAX_ARAT, 0, 0));
        assert_eq!(answer(&model, 0, 1, 0xa, None).eax, 0);
        assert_eq!(answer(&model, 0, 1, 0x8000_0001, None).ecx & (ECX_AMD_COUNTERS | ECX_CMP_LEGACY), 0);
    }

    #[test]
    fn only_the_last_cache_is_shared() {
        for (level, sharing) in [(1, 0), (2, 0), (3, 3)] {
            let cache = CpuidLeaf { subleaf: Some(level), ..leaf(4, 1 | level << 5 | 0xffff_c000, 0) };
            let answer = answer(&[cache], 1, 3, 4, Some(level));
            assert_eq!(answer.eax >> 14 & 0xfff, sharing);
            assert_eq!(answer.eax >> 26, 3);
            assert_eq!(answer.eax & 0xff, 1 | level << 5);
        }
    }
}
