//! What of a host's processor a saved guest depends on, and what of it another host lacks.
//!
//! A hypervisor checks each identification register again when a processor is restored, and exactly; what is known here
//! is known without making one, and is said in words.

use serde::{Deserialize, Serialize};

/// Identification registers: ID_AA64PFR0_EL1 and so on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum IdRegister {
    Pfr0,
    Pfr1,
    Isar0,
    Isar1,
    Isar2,
    Mmfr0,
    Mmfr1,
    Mmfr2,
}

use IdRegister::{Isar0, Isar1, Isar2, Mmfr0, Mmfr1, Mmfr2, Pfr0, Pfr1};

/// Fields that guests are not shown, by the position of their lowest bit: vectors of variable length (SVE, SME),
/// memory tags, and authenticated pointers are not turned on for them.
const HIDDEN: [(IdRegister, &[u32]); 4] =
    [(Pfr0, &[32]), (Pfr1, &[8, 24]), (Isar1, &[4, 8, 24, 28]), (Isar2, &[8, 12])];

/// Fields of which 15 says that the feature is not there.
const SIGNED: [(IdRegister, &[u32]); 2] = [(Pfr0, &[16, 20]), (Mmfr0, &[24, 28])];

/// Features that people know by name, as Linux spells them.
#[rustfmt::skip]
const NAMES: &[(IdRegister, u32, &str)] = &[
    (Pfr0, 0, "aarch64 at EL0"), (Pfr0, 16, "fp"), (Pfr0, 20, "asimd"), (Pfr0, 28, "ras"), (Pfr0, 48, "dit"), (Pfr0, 56, "csv2"),
    (Pfr0, 60, "csv3"),
    (Pfr1, 0, "bti"), (Pfr1, 4, "ssbs"),
    (Isar0, 4, "aes"), (Isar0, 8, "sha1"), (Isar0, 12, "sha2"), (Isar0, 16, "crc32"), (Isar0, 20, "atomics"),
    (Isar0, 28, "asimdrdm"), (Isar0, 32, "sha3"), (Isar0, 36, "sm3"), (Isar0, 40, "sm4"), (Isar0, 44, "asimddp"),
    (Isar0, 48, "asimdfhm"), (Isar0, 52, "flagm"), (Isar0, 56, "tlbi range"), (Isar0, 60, "rng"),
    (Isar1, 0, "dcpop"), (Isar1, 12, "jscvt"), (Isar1, 16, "fcma"), (Isar1, 20, "lrcpc"), (Isar1, 32, "frint"),
    (Isar1, 36, "sb"), (Isar1, 40, "specres"), (Isar1, 44, "bf16"), (Isar1, 48, "dgh"), (Isar1, 52, "i8mm"),
    (Isar1, 56, "xs"), (Isar1, 60, "ls64"),
    (Isar2, 0, "wfxt"), (Isar2, 4, "rpres"), (Isar2, 16, "mops"), (Isar2, 20, "hbc"), (Isar2, 52, "cssc"),
    (Mmfr0, 0, "physical addresses"), (Mmfr0, 20, "pages of 16 KiB"), (Mmfr0, 24, "pages of 64 KiB"),
    (Mmfr0, 28, "pages of 4 KiB"), (Mmfr0, 60, "ecv"),
    (Mmfr1, 0, "hardware access flags"), (Mmfr1, 20, "pan"), (Mmfr1, 44, "afp"),
    (Mmfr2, 32, "uscat"),
];

/// What of a host's processor a saved guest depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    backend: String,
    midr: u64,
    registers: Vec<(IdRegister, u64)>,
    counter_hz: u64,
    ipa_bits: u32,
    page_size: u64,
}

impl Fingerprint {
    /// Of a host with this MIDR_EL1, these identification registers, CNTFRQ_EL0, and sizes of a guest's physical
    /// addresses (in bits) and of a page of the host's memory.
    pub fn new(
        backend: &str,
        midr: u64,
        registers: &[(IdRegister, u64)],
        counter_hz: u64,
        ipa_bits: u32,
        page_size: u64,
    ) -> Self {
        let shown = |&(register, value): &(IdRegister, u64)| {
            let hidden = HIDDEN.iter().filter(|(of, _)| *of == register).flat_map(|(_, fields)| *fields);
            (register, hidden.fold(value, |value, low| value & !(0xf << low)))
        };
        Self {
            backend: backend.into(),
            midr,
            registers: registers.iter().map(shown).collect(),
            counter_hz,
            ipa_bits,
            page_size,
        }
    }

    /// What a guest saved on a host with this one misses on `host`; nothing, if it can go on there. In words.
    ///
    /// Another processor, or another revision of the same, is missed even if it has all features: hypervisors show
    /// guests the number of the real one, and kernels choose their workarounds by it, once.
    pub fn missing_on(&self, host: &Self) -> Vec<String> {
        let mut missing = Vec::new();
        if self.backend != host.backend {
            missing.push(format!("the hypervisor {} (this host has {})", self.backend, host.backend));
        }
        if self.midr != host.midr {
            missing.push(format!("a processor {:#x} (this host's is {:#x})", self.midr, host.midr));
        }
        for &(register, value) in &self.registers {
            let there = host.registers.iter().find(|(of, _)| *of == register).map_or(0, |(_, value)| *value);
            missing.extend(
                (0..u64::BITS)
                    .step_by(4)
                    .filter(|&low| level(register, low, value) > level(register, low, there))
                    .map(|low| name(register, low, value, there)),
            );
        }
        if self.counter_hz != host.counter_hz {
            missing
                .push(format!("a counter of {} Hz (this host's has {})", self.counter_hz, host.counter_hz));
        }
        if self.ipa_bits > host.ipa_bits {
            missing
                .push(format!("guest addresses of {} bits (this host has {})", self.ipa_bits, host.ipa_bits));
        }
        if self.page_size != host.page_size {
            missing.push(format!("pages of {} bytes (this host's have {})", self.page_size, host.page_size));
        }
        missing
    }
}

/// How much of a feature a field says there is.
fn level(register: IdRegister, low: u32, value: u64) -> i64 {
    let field = (value >> low & 0xf).cast_signed();
    let is_signed = SIGNED.iter().any(|(of, fields)| *of == register && fields.contains(&low));
    if is_signed && field >= 8 { field - 16 } else { field }
}

fn name(register: IdRegister, low: u32, value: u64, there: u64) -> String {
    let known = NAMES.iter().find(|(of, field, _)| (*of, *field) == (register, low));
    let (wanted, found) = (value >> low & 0xf, there >> low & 0xf);
    if let Some((.., name)) = known {
        format!("{name} (level {wanted}, this host has {found})")
    } else {
        let register = format!("{register:?}").to_uppercase();
        format!("ID_AA64{register}_EL1 bits {}:{low} = {wanted} (this host has {found})", low + 3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIDR: u64 = 0x413f_d0c1;
    const REGISTERS: [(IdRegister, u64); 8] = [
        (Pfr0, 0x1100_0001_1111_1112),
        (Pfr1, 0x21),
        (Isar0, 0x1021_1111_1021_2120),
        (Isar1, 0x0011_1111_0021_1112),
        (Isar2, 0x1100),
        (Mmfr0, 0x0000_0000_0010_1125),
        (Mmfr1, 0x1021_2122),
        (Mmfr2, 0x1_0000_1011),
    ];

    fn fingerprint(midr: u64, registers: &[(IdRegister, u64)]) -> Fingerprint {
        Fingerprint::new("kvm", midr, registers, 54_000_000, 44, 4096)
    }

    #[test]
    fn the_same_host_misses_nothing() {
        let own = fingerprint(MIDR, &REGISTERS);
        assert_eq!(own.missing_on(&own.clone()), Vec::<String>::new());
    }

    #[test]
    fn what_is_missed_is_named() {
        // A field of the second host, what is in it there, and what a guest of the first misses then.
        let cases: &[(IdRegister, u32, u64, &[&str])] = &[
            (Isar0, 4, 0, &["aes (level 2, this host has 0)"]),
            (Isar0, 4, 1, &["aes (level 2, this host has 1)"]),
            (Isar0, 4, 3, &[]),
            (Isar0, 20, 0, &["atomics (level 2, this host has 0)"]),
            (Mmfr2, 0, 0, &["ID_AA64MMFR2_EL1 bits 3:0 = 1 (this host has 0)"]),
            // Fifteen is less than none, or more than anything.
            (Pfr0, 16, 15, &["fp (level 1, this host has 15)"]),
            (Mmfr0, 28, 15, &["pages of 4 KiB (level 0, this host has 15)"]),
            (Pfr0, 28, 15, &[]),
            // Not shown to guests.
            (Pfr0, 32, 0, &[]),
            (Isar1, 4, 0, &[]),
            (Isar2, 12, 0, &[]),
        ];
        let guest = fingerprint(MIDR, &REGISTERS);
        for &(register, low, field, expected) in cases {
            let mut other = REGISTERS;
            for (of, value) in &mut other {
                if *of == register {
                    *value = *value & !(0xf << low) | field << low;
                }
            }
            assert_eq!(guest.missing_on(&fingerprint(MIDR, &other)), *expected, "{register:?} {low}");
        }
    }

    #[test]
    fn hosts_differ_beyond_features() {
        let guest = fingerprint(MIDR, &REGISTERS);
        let other = |backend, midr, hz, ipa, page| Fingerprint::new(backend, midr, &REGISTERS, hz, ipa, page);
        for (host, expected) in [
            (other("hvf", MIDR, 54_000_000, 44, 4096), &["the hypervisor kvm (this host has hvf)"][..]),
            (
                other("kvm", MIDR + 1, 54_000_000, 44, 4096),
                &["a processor 0x413fd0c1 (this host's is 0x413fd0c2)"],
            ),
            (
                other("kvm", MIDR, 24_000_000, 44, 4096),
                &["a counter of 54000000 Hz (this host's has 24000000)"],
            ),
            (other("kvm", MIDR, 54_000_000, 40, 4096), &["guest addresses of 44 bits (this host has 40)"]),
            (other("kvm", MIDR, 54_000_000, 48, 4096), &[]),
            (other("kvm", MIDR, 54_000_000, 44, 65536), &["pages of 4096 bytes (this host's have 65536)"]),
        ] {
            assert_eq!(guest.missing_on(&host), expected);
        }
    }

    #[test]
    fn names_are_of_fields_that_are_shown_and_each_is_one_s_own() {
        for (i, (register, low, name)) in NAMES.iter().enumerate() {
            assert_eq!(low % 4, 0, "{name}");
            assert!(!HIDDEN.iter().any(|(of, fields)| of == register && fields.contains(low)), "{name}");
            assert!(NAMES[..i].iter().all(|(.., other)| other != name), "{name} is there twice");
        }
    }
}
