//! What of a host's processor a saved guest depends on, and what of it another host lacks.

use serde::{Deserialize, Serialize};

use super::{CpuModel, CpuidLeaf, cpuid};

/// A register that CPUID answers in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

use Register::{Eax, Ebx, Ecx, Edx};

impl Register {
    fn of(self, leaf: &CpuidLeaf) -> u32 {
        match self {
            Eax => leaf.eax,
            Ebx => leaf.ebx,
            Ecx => leaf.ecx,
            Edx => leaf.edx,
        }
    }
}

/// Registers of which each bit is a feature.
const FEATURES: [(u32, u32, Register); 18] = [
    (1, 0, Ecx),
    (1, 0, Edx),
    (7, 0, Ebx),
    (7, 0, Ecx),
    (7, 0, Edx),
    (7, 1, Eax),
    (7, 1, Ebx),
    (7, 1, Ecx),
    (7, 1, Edx),
    (7, 2, Edx),
    (0xd, 1, Eax),
    (0x4000_0001, 0, Eax),
    (0x8000_0001, 0, Ecx),
    (0x8000_0001, 0, Edx),
    (0x8000_0007, 0, Edx),
    (0x8000_0008, 0, Ebx),
    (0x8000_000a, 0, Edx),
    (0x8000_0021, 0, Eax),
];

/// Bits that say what the system has turned on, not what the processor can do: OSXSAVE and OSPKE.
const STATUS: [(u32, u32, Register, u32); 2] = [(1, 0, Ecx, 1 << 27), (7, 0, Ecx, 1 << 4)];

/// Features that people know by name, as Linux spells them.
#[rustfmt::skip]
const NAMES: &[(u32, u32, Register, u32, &str)] = &[
    (1, 0, Ecx, 0, "sse3"), (1, 0, Ecx, 1, "pclmulqdq"), (1, 0, Ecx, 5, "vmx"), (1, 0, Ecx, 9, "ssse3"),
    (1, 0, Ecx, 12, "fma"), (1, 0, Ecx, 13, "cx16"), (1, 0, Ecx, 17, "pcid"), (1, 0, Ecx, 19, "sse4_1"),
    (1, 0, Ecx, 20, "sse4_2"), (1, 0, Ecx, 21, "x2apic"), (1, 0, Ecx, 22, "movbe"), (1, 0, Ecx, 23, "popcnt"),
    (1, 0, Ecx, 24, "tsc_deadline_timer"), (1, 0, Ecx, 25, "aes"), (1, 0, Ecx, 26, "xsave"), (1, 0, Ecx, 28, "avx"),
    (1, 0, Ecx, 29, "f16c"), (1, 0, Ecx, 30, "rdrand"),
    (1, 0, Edx, 4, "tsc"), (1, 0, Edx, 6, "pae"), (1, 0, Edx, 8, "cx8"), (1, 0, Edx, 9, "apic"), (1, 0, Edx, 11, "sep"),
    (1, 0, Edx, 12, "mtrr"), (1, 0, Edx, 13, "pge"), (1, 0, Edx, 15, "cmov"), (1, 0, Edx, 16, "pat"),
    (1, 0, Edx, 19, "clflush"), (1, 0, Edx, 23, "mmx"), (1, 0, Edx, 24, "fxsr"), (1, 0, Edx, 25, "sse"),
    (1, 0, Edx, 26, "sse2"),
    (7, 0, Ebx, 0, "fsgsbase"), (7, 0, Ebx, 1, "tsc_adjust"), (7, 0, Ebx, 3, "bmi1"), (7, 0, Ebx, 4, "hle"),
    (7, 0, Ebx, 5, "avx2"), (7, 0, Ebx, 7, "smep"), (7, 0, Ebx, 8, "bmi2"), (7, 0, Ebx, 9, "erms"),
    (7, 0, Ebx, 10, "invpcid"), (7, 0, Ebx, 11, "rtm"), (7, 0, Ebx, 14, "mpx"), (7, 0, Ebx, 16, "avx512f"),
    (7, 0, Ebx, 17, "avx512dq"), (7, 0, Ebx, 18, "rdseed"), (7, 0, Ebx, 19, "adx"), (7, 0, Ebx, 20, "smap"),
    (7, 0, Ebx, 21, "avx512ifma"), (7, 0, Ebx, 23, "clflushopt"), (7, 0, Ebx, 24, "clwb"),
    (7, 0, Ebx, 28, "avx512cd"), (7, 0, Ebx, 29, "sha_ni"), (7, 0, Ebx, 30, "avx512bw"), (7, 0, Ebx, 31, "avx512vl"),
    (7, 0, Ecx, 1, "avx512vbmi"), (7, 0, Ecx, 2, "umip"), (7, 0, Ecx, 3, "pku"), (7, 0, Ecx, 5, "waitpkg"),
    (7, 0, Ecx, 6, "avx512_vbmi2"), (7, 0, Ecx, 7, "shstk"), (7, 0, Ecx, 8, "gfni"), (7, 0, Ecx, 9, "vaes"),
    (7, 0, Ecx, 10, "vpclmulqdq"), (7, 0, Ecx, 11, "avx512_vnni"), (7, 0, Ecx, 12, "avx512_bitalg"),
    (7, 0, Ecx, 14, "avx512_vpopcntdq"), (7, 0, Ecx, 16, "la57"), (7, 0, Ecx, 22, "rdpid"),
    (7, 0, Ecx, 24, "bus_lock_detect"), (7, 0, Ecx, 25, "cldemote"), (7, 0, Ecx, 27, "movdiri"), (7, 0, Ecx, 28, "movdir64b"),
    (7, 0, Edx, 4, "fsrm"), (7, 0, Edx, 8, "avx512_vp2intersect"), (7, 0, Edx, 10, "md_clear"),
    (7, 0, Edx, 14, "serialize"), (7, 0, Edx, 20, "ibt"), (7, 0, Edx, 22, "amx_bf16"), (7, 0, Edx, 23, "avx512_fp16"),
    (7, 0, Edx, 24, "amx_tile"), (7, 0, Edx, 25, "amx_int8"), (7, 0, Edx, 26, "spec_ctrl"),
    (7, 0, Edx, 27, "intel_stibp"), (7, 0, Edx, 28, "flush_l1d"), (7, 0, Edx, 29, "arch_capabilities"),
    (7, 0, Edx, 31, "spec_ctrl_ssbd"),
    (7, 1, Eax, 4, "avx_vnni"), (7, 1, Eax, 5, "avx512_bf16"), (7, 1, Eax, 23, "avx_ifma"),
    (0xd, 1, Eax, 0, "xsaveopt"), (0xd, 1, Eax, 1, "xsavec"), (0xd, 1, Eax, 2, "xgetbv1"), (0xd, 1, Eax, 3, "xsaves"),
    (0x4000_0001, 0, Eax, 0, "kvmclock (old)"), (0x4000_0001, 0, Eax, 3, "kvmclock"),
    (0x4000_0001, 0, Eax, 4, "kvm async page faults"), (0x4000_0001, 0, Eax, 5, "kvm steal time"),
    (0x4000_0001, 0, Eax, 6, "kvm pv eoi"), (0x4000_0001, 0, Eax, 7, "kvm pv unhalt"),
    (0x4000_0001, 0, Eax, 9, "kvm pv tlb flush"), (0x4000_0001, 0, Eax, 11, "kvm pv send ipi"),
    (0x4000_0001, 0, Eax, 12, "kvm poll control"), (0x4000_0001, 0, Eax, 13, "kvm pv sched yield"),
    (0x4000_0001, 0, Eax, 14, "kvm async page fault interrupts"), (0x4000_0001, 0, Eax, 24, "a stable kvmclock"),
    (0x8000_0001, 0, Ecx, 0, "lahf_lm"), (0x8000_0001, 0, Ecx, 2, "svm"), (0x8000_0001, 0, Ecx, 5, "abm"),
    (0x8000_0001, 0, Ecx, 6, "sse4a"), (0x8000_0001, 0, Ecx, 8, "3dnowprefetch"), (0x8000_0001, 0, Ecx, 11, "xop"),
    (0x8000_0001, 0, Ecx, 16, "fma4"), (0x8000_0001, 0, Ecx, 21, "tbm"),
    (0x8000_0001, 0, Edx, 11, "syscall"), (0x8000_0001, 0, Edx, 20, "nx"), (0x8000_0001, 0, Edx, 22, "mmxext"),
    (0x8000_0001, 0, Edx, 25, "fxsr_opt"), (0x8000_0001, 0, Edx, 26, "pdpe1gb"), (0x8000_0001, 0, Edx, 27, "rdtscp"),
    (0x8000_0001, 0, Edx, 29, "lm"),
    (0x8000_0007, 0, Edx, 8, "invariant tsc"),
    (0x8000_0008, 0, Ebx, 0, "clzero"), (0x8000_0008, 0, Ebx, 4, "rdpru"), (0x8000_0008, 0, Ebx, 9, "wbnoinvd"),
    (0x8000_0008, 0, Ebx, 12, "ibpb"), (0x8000_0008, 0, Ebx, 14, "ibrs"), (0x8000_0008, 0, Ebx, 15, "stibp"),
    (0x8000_0008, 0, Ebx, 24, "amd_ssbd"), (0x8000_0008, 0, Ebx, 25, "virt_ssbd"),
];

/// The components of the XSAVE area, by their bit in XCR0.
const COMPONENTS: [&str; 19] = [
    "x87",
    "sse",
    "avx",
    "bndregs",
    "bndcsr",
    "opmask",
    "zmm_hi256",
    "hi16_zmm",
    "pt",
    "pkru",
    "pasid",
    "cet_u",
    "cet_s",
    "hdc",
    "uintr",
    "lbr",
    "hwp",
    "xtilecfg",
    "xtiledata",
];

/// By so much two frequencies may differ and still be taken for the same, in millionths: what KVM allows before
/// it scales, since the kernel measures anew at each start of the host.
pub const TSC_TOLERANCE_PPM: u64 = 250;

/// Whether a guest with a TSC of `wanted` kHz keeps time with one of `found` kHz.
pub fn same_frequency(wanted: u32, found: u32) -> bool {
    u64::from(wanted.abs_diff(found)) * 1_000_000 <= u64::from(found) * TSC_TOLERANCE_PPM
}

/// What the list of CPUID does not say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// The hypervisor's name: states are its own.
    pub backend: String,
    /// Bytes that a processor's XSAVE area has.
    pub xsave_size: u32,
    /// Frequency of the TSC.
    pub tsc_khz: u32,
    /// Whether a guest may be given a TSC of another frequency.
    pub tsc_scales: bool,
    /// Size of a page of the host's memory.
    pub page_size: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Word {
    leaf: u32,
    subleaf: u32,
    register: Register,
    bits: u32,
}

/// What of a host's processor a saved guest depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    vendor: String,
    family: u32,
    model: u32,
    stepping: u32,
    features: Vec<Word>,
    xcr0: u64,
    physical_bits: u32,
    host: Host,
}

impl Fingerprint {
    /// Of what guests are shown of the processor, and the rest of the host.
    pub fn new(model: &CpuModel, host: Host) -> Self {
        let shown = cpuid::policy(model, 0, 1);
        let answer = |leaf, subleaf| {
            shown
                .iter()
                .find(|a| a.leaf == leaf && a.subleaf.unwrap_or(0) == subleaf)
                .copied()
                .unwrap_or_default()
        };
        let name = answer(0, 0);
        let vendor: Vec<u8> =
            [name.ebx, name.edx, name.ecx].iter().flat_map(|word| word.to_le_bytes()).collect();
        let (family, model, stepping) = signature(answer(1, 0).eax);
        let features = FEATURES
            .iter()
            .map(|&(leaf, subleaf, register)| {
                let status: u32 = STATUS
                    .iter()
                    .filter(|status| (status.0, status.1, status.2) == (leaf, subleaf, register))
                    .map(|status| status.3)
                    .sum();
                Word { leaf, subleaf, register, bits: register.of(&answer(leaf, subleaf)) & !status }
            })
            .collect();
        let xsave = answer(0xd, 0);
        Self {
            vendor: String::from_utf8_lossy(&vendor).into_owned(),
            family,
            model,
            stepping,
            features,
            xcr0: u64::from(xsave.edx) << 32 | u64::from(xsave.eax),
            physical_bits: answer(0x8000_0008, 0).eax & 0xff,
            host,
        }
    }

    /// What a guest saved on a host with this one misses on `host`; nothing, if it can go on there. In words.
    ///
    /// Another model of processor is missed even if it has all features, since a kernel chooses its mitigations and
    /// workarounds by model, and once. Another stepping is not.
    pub fn missing_on(&self, host: &Self) -> Vec<String> {
        let mut missing = Vec::new();
        if self.host.backend != host.host.backend {
            missing
                .push(format!("the hypervisor {} (this host has {})", self.host.backend, host.host.backend));
        }
        if self.vendor != host.vendor {
            missing.push(format!("a processor of {} (this host's is of {})", self.vendor, host.vendor));
        } else if (self.family, self.model) != (host.family, host.model) {
            missing.push(format!(
                "a processor of family {:#x}, model {:#x} (this host's is of family {:#x}, model {:#x})",
                self.family, self.model, host.family, host.model
            ));
        }
        for word in &self.features {
            let there = host.features.iter().find(|other| word.is_like(other)).map_or(0, |other| other.bits);
            let lacking = word.bits & !there;
            missing.extend((0..u32::BITS).filter(|bit| lacking >> bit & 1 == 1).map(|bit| word.name(bit)));
        }
        let components = self.xcr0 & !host.xcr0;
        missing.extend((0..u64::BITS).filter(|bit| components >> bit & 1 == 1).map(|bit| {
            let name = COMPONENTS.get(bit as usize).map_or_else(|| format!("{bit}"), ToString::to_string);
            format!("component {name} of the XSAVE area")
        }));
        if self.host.xsave_size > host.host.xsave_size {
            missing.push(format!(
                "an XSAVE area of {} bytes (this host's has {})",
                self.host.xsave_size, host.host.xsave_size
            ));
        }
        if self.physical_bits > host.physical_bits {
            missing.push(format!(
                "physical addresses of {} bits (this host has {})",
                self.physical_bits, host.physical_bits
            ));
        }
        if !host.host.tsc_scales && !same_frequency(self.host.tsc_khz, host.host.tsc_khz) {
            missing.push(format!(
                "a TSC of {} kHz (this host has {} and cannot scale)",
                self.host.tsc_khz, host.host.tsc_khz
            ));
        }
        if self.host.page_size != host.host.page_size {
            missing.push(format!(
                "pages of {} bytes (this host's have {})",
                self.host.page_size, host.host.page_size
            ));
        }
        missing
    }
}

impl Word {
    fn is_like(&self, other: &Self) -> bool {
        (self.leaf, self.subleaf, self.register) == (other.leaf, other.subleaf, other.register)
    }

    fn name(&self, bit: u32) -> String {
        let known = NAMES.iter().find(|(leaf, subleaf, register, number, _)| {
            (*leaf, *subleaf, *register, *number) == (self.leaf, self.subleaf, self.register, bit)
        });
        known.map_or_else(
            || format!("CPUID {:#x}.{} {:?} bit {bit}", self.leaf, self.subleaf, self.register),
            |(.., name)| (*name).to_string(),
        )
    }
}

/// Family, model and stepping, of which the first two are in two places each.
fn signature(eax: u32) -> (u32, u32, u32) {
    let base = eax >> 8 & 0xf;
    let family = if base == 0xf { base + (eax >> 20 & 0xff) } else { base };
    let model = if matches!(base, 6 | 0xf) { eax >> 4 & 0xf | eax >> 12 & 0xf0 } else { eax >> 4 & 0xf };
    (family, model, eax & 0xf)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Host {
        Host {
            backend: "kvm".into(),
            xsave_size: 4096,
            tsc_khz: 2_400_000,
            tsc_scales: false,
            page_size: 4096,
        }
    }

    fn leaf(leaf: u32, subleaf: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidLeaf {
        CpuidLeaf { leaf, subleaf: Some(subleaf), eax, ebx, ecx, edx }
    }

    /// An Intel processor of family 6, model 0x55, with all features and XCR0 = 0xe7.
    fn leaves() -> Vec<CpuidLeaf> {
        const ALL: [u32; 4] = [u32::MAX; 4];
        vec![
            leaf(0, 0, [0x16, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
            leaf(1, 0, [0x5_0654, 0, u32::MAX, u32::MAX]),
            leaf(7, 0, ALL),
            leaf(7, 1, ALL),
            leaf(0xd, 0, [0xe7, 2696, 2696, 0]),
            leaf(0xd, 1, ALL),
            leaf(0x4000_0001, 0, ALL),
            leaf(0x8000_0001, 0, ALL),
            leaf(0x8000_0008, 0, [0x302e, u32::MAX, 0, 0]),
        ]
    }

    fn fingerprint(leaves: &[CpuidLeaf], host: Host) -> Fingerprint {
        Fingerprint::new(&CpuModel { cpuid: leaves.to_vec() }, host)
    }

    #[test]
    fn the_same_host_misses_nothing() {
        let own = fingerprint(&leaves(), host());
        assert_eq!(own.missing_on(&own.clone()), Vec::<String>::new());
        assert_eq!((own.vendor.as_str(), own.family, own.model, own.stepping), ("GenuineIntel", 6, 0x55, 4));
        assert_eq!((own.xcr0, own.physical_bits), (0xe7, 46));
    }

    fn change(leaves: &mut [CpuidLeaf], leaf: u32, subleaf: u32, register: Register, and: u32, or: u32) {
        let leaf = leaves.iter_mut().find(|l| (l.leaf, l.subleaf) == (leaf, Some(subleaf))).unwrap();
        let word = match register {
            Eax => &mut leaf.eax,
            Ebx => &mut leaf.ebx,
            Ecx => &mut leaf.ecx,
            Edx => &mut leaf.edx,
        };
        *word = *word & and | or;
    }

    /// A register of the second host's CPUID, what of it stays and what is added, and what the guest misses there.
    type Case = (u32, u32, Register, u32, u32, &'static [&'static str]);

    #[test]
    fn what_is_missed_is_named() {
        let cases: &[Case] = &[
            (7, 0, Ebx, !(1 << 16), 0, &["avx512f"]),
            (1, 0, Ecx, !(1 << 25 | 1 << 28), 0, &["aes", "avx"]),
            (7, 1, Edx, !(1 << 31), 0, &["CPUID 0x7.1 Edx bit 31"]),
            (0x4000_0001, 0, Eax, !(1 << 3), 0, &["kvmclock"]),
            (0xd, 0, Eax, !(1 << 6), 0, &["component zmm_hi256 of the XSAVE area"]),
            (0x8000_0008, 0, Eax, 0xffff_ff00, 39, &["physical addresses of 46 bits (this host has 39)"]),
            (
                0,
                0,
                Ecx,
                0,
                u32::from_le_bytes(*b"tell"),
                &["a processor of GenuineIntel (this host's is of GenuineItell)"],
            ),
            (
                1,
                0,
                Eax,
                0,
                0x6_06a6,
                &["a processor of family 0x6, model 0x55 (this host's is of family 0x6, model 0x6a)"],
            ),
            // A stepping, what the system has turned on, and what guests are not shown.
            (1, 0, Eax, !0xf, 7, &[]),
            (1, 0, Ecx, !(1 << 27), 0, &[]),
            (7, 0, Ecx, !(1 << 4), 0, &[]),
            (1, 0, Ecx, !(1 << 15), 0, &[]),
        ];
        let guest = fingerprint(&leaves(), host());
        for &(leaf, subleaf, register, and, or, expected) in cases {
            let mut other = leaves();
            change(&mut other, leaf, subleaf, register, and, or);
            let missing = guest.missing_on(&fingerprint(&other, host()));
            assert_eq!(missing, *expected, "{leaf:#x} {register:?}");
        }
    }

    #[test]
    fn more_than_the_guest_uses_is_no_hindrance() {
        let mut poor = leaves();
        for leaf in &mut poor {
            match (leaf.leaf, leaf.subleaf) {
                (0xd, Some(0)) => leaf.eax = 3,
                (7, _) => leaf.ebx = 0,
                (0x8000_0008, _) => leaf.eax = 0x3027,
                _ => {}
            }
        }
        let small = Host { xsave_size: 832, ..host() };
        assert_eq!(
            fingerprint(&poor, small).missing_on(&fingerprint(&leaves(), host())),
            Vec::<String>::new()
        );
    }

    #[test]
    fn hosts_differ_beyond_cpuid() {
        let cases: &[(Host, &[&str])] = &[
            (Host { backend: "hvf".into(), ..host() }, &["the hypervisor kvm (this host has hvf)"]),
            (Host { xsave_size: 1088, ..host() }, &["an XSAVE area of 4096 bytes (this host's has 1088)"]),
            (
                Host { tsc_khz: 3_000_000, ..host() },
                &["a TSC of 2400000 kHz (this host has 3000000 and cannot scale)"],
            ),
            (Host { tsc_khz: 3_000_000, tsc_scales: true, ..host() }, &[]),
            (Host { tsc_khz: 2_400_600, ..host() }, &[]),
            (
                Host { tsc_khz: 2_400_602, ..host() },
                &["a TSC of 2400000 kHz (this host has 2400602 and cannot scale)"],
            ),
            (Host { page_size: 16384, ..host() }, &["pages of 4096 bytes (this host's have 16384)"]),
        ];
        let guest = fingerprint(&leaves(), host());
        for (other, expected) in cases {
            assert_eq!(guest.missing_on(&fingerprint(&leaves(), other.clone())), *expected, "{other:?}");
        }
    }

    #[test]
    fn names_are_of_registers_that_are_looked_at() {
        for (leaf, subleaf, register, bit, name) in NAMES {
            assert!(FEATURES.contains(&(*leaf, *subleaf, *register)), "{name}");
            assert!(*bit < 32, "{name}");
        }
        for (i, (.., name)) in NAMES.iter().enumerate() {
            assert!(NAMES[..i].iter().all(|(.., other)| other != name), "{name} is there twice");
        }
    }
}
