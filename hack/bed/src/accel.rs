//! Whether this machine can run the host faster than by emulation.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::cache::Cache;
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
    pub fn choose(cache: &Cache, arch: Arch, monitor: &Path) -> Self {
        let given_up = fs::read_to_string(cache.path(GIVEN_UP)).is_ok_and(|on| on == kernel());
        if arch != Arch::NATIVE || given_up || !nesting(arch) || !monitor.exists() {
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

    /// Does not try KVM again on this kernel: it passed every check and yet ran no host.
    pub fn give_up_kvm(cache: &Cache) -> Result<()> {
        let note = cache.path(GIVEN_UP);
        fs::write(&note, kernel()).with_context(|| format!("writing {}", note.display()))
    }
}

/// Where it is noted that KVM was tried and did not run a host, on which kernel.
const GIVEN_UP: &str = "kvm-does-not-run-hosts";

fn kernel() -> String {
    fs::read_to_string("/proc/version").unwrap_or_default()
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
