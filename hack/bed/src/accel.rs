//! Whether this machine can run the host faster than by emulation.

use std::fs;

use crate::progress::say;
use crate::spec::Arch;
use crate::tools::command;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// Emulation, which always works.
    Tcg,
    /// The machine's own virtualization, nested for the guests inside.
    Kvm,
}

impl Accel {
    /// KVM for the machine's own architecture where it can do what the host needs, otherwise TCG.
    ///
    /// A device node alone proves nothing: the processor must have the extension, nesting must be
    /// on, and the monitor's own check must have run a guest.
    pub fn choose(arch: Arch, monitor: &std::path::Path) -> Self {
        if arch != Arch::NATIVE || !nesting(arch) || !monitor.exists() {
            return Self::Tcg;
        }
        match command(monitor).arg("check").output() {
            Ok(output) if output.status.success() => {
                say("this machine has usable virtualization: the host runs on KVM");
                Self::Kvm
            }
            _ => Self::Tcg,
        }
    }
}

fn nesting(arch: Arch) -> bool {
    let on = |module: &str| {
        fs::read_to_string(format!("/sys/module/{module}/parameters/nested"))
            .is_ok_and(|text| matches!(text.trim(), "1" | "Y"))
    };
    match arch {
        Arch::X86_64 => {
            let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
            let has = |flag: &str| flags.split_whitespace().any(|word| word == flag);
            (has("svm") && on("kvm_amd")) || (has("vmx") && on("kvm_intel"))
        }
        // Nested virtualization on aarch64 is a property of the KVM device that QEMU finds out about
        // when it starts; where it is missing, starting fails and emulation takes over.
        Arch::Aarch64 => {
            fs::read_to_string("/sys/module/kvm/parameters/mode").is_ok_and(|mode| mode.trim() == "nested")
        }
    }
}
