//! What this host's processor is, by its own registers: the kernel lets user space read those that matter.

use std::arch::asm;
use std::io;

use super::super::super::Error;
use super::super::{Kvm, page_size};
use crate::arch::aarch64::{Fingerprint, IdRegister};

/// `HWCAP_CPUID`: the kernel answers MRS of identification registers.
const HWCAP_CPUID: u64 = 1 << 11;

/// Reads a system register that the kernel answers for, by its encoding.
macro_rules! mrs {
    ($register:literal) => {{
        let value: u64;
        // SAFETY: the instruction changes one register and touches no memory; `HWCAP_CPUID` says that it does not
        // fault.
        unsafe { asm!(concat!("mrs {}, ", $register), out(reg) value, options(nomem, nostack, preserves_flags)) };
        value
    }};
}

pub(in super::super) fn fingerprint(kvm: &Kvm) -> Result<Fingerprint, Error> {
    // SAFETY: getauxval takes no pointer.
    let capabilities = unsafe { libc::getauxval(libc::AT_HWCAP) };
    if capabilities & HWCAP_CPUID == 0 {
        return Err(Error::Call {
            call: "MRS of identification registers (Linux 4.11)",
            object: "this processor".into(),
            source: io::Error::from(io::ErrorKind::Unsupported),
        });
    }
    let registers = [
        (IdRegister::Pfr0, mrs!("S3_0_C0_C4_0")),
        (IdRegister::Pfr1, mrs!("S3_0_C0_C4_1")),
        (IdRegister::Isar0, mrs!("S3_0_C0_C6_0")),
        (IdRegister::Isar1, mrs!("S3_0_C0_C6_1")),
        (IdRegister::Isar2, mrs!("S3_0_C0_C6_2")),
        (IdRegister::Mmfr0, mrs!("S3_0_C0_C7_0")),
        (IdRegister::Mmfr1, mrs!("S3_0_C0_C7_1")),
        (IdRegister::Mmfr2, mrs!("S3_0_C0_C7_2")),
    ];
    Ok(Fingerprint::new(
        "kvm",
        mrs!("S3_0_C0_C0_0"),
        &registers,
        mrs!("S3_3_C14_C0_0"),
        kvm.fd.get_host_ipa_limit().max(0).cast_unsigned(),
        page_size(),
    ))
}
