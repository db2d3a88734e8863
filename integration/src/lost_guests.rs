//! Guests that an emulated host has lost.
//!
//! QEMU's emulation of AMD's virtualization (seen in versions 10.0 and 11.1) now and then leaves a guest's
//! processor with the registers of its host, as they are behind VMRUN. Such a guest stands still, with its
//! processor faulting for ever at one address of the host's kernel, or crashes there. A guest's own code
//! may lie at the same address by chance, but does not leave it a thousand times a second, nor crash there.
//!
//! Not all that goes wrong there leaves such a trace: guests have also ended by a triple fault, and in the end their
//! host. So what fails on such a processor is tried again, as long as little does.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

const MACHINES: &str = "/sys/kernel/debug/kvm";
const TRACING: &str = "/sys/kernel/tracing/instances";
/// The function that has the one VMRUN, and more than its size.
const RUNS_GUESTS: &str = "__svm_vcpu_run";
const ITS_SIZE: u64 = 0x200;
/// A processor that is lost has KVM emulate some 20,000 instructions a second.
const SUSPICIOUS: u64 = 2000;
const LOOK_EVERY: Duration = Duration::from_secs(1);
const TRACED: Duration = Duration::from_millis(20);
/// So often it is seen where it is in that time.
const SEEN: usize = 20;

/// Looks for them while a test runs.
pub(crate) struct Lookout {
    at: Range<u64>,
    looked: Instant,
    emulated: BTreeMap<PathBuf, u64>,
    found: Option<String>,
}

impl Lookout {
    /// Where guests are run `at`.
    pub(crate) fn begin(at: Range<u64>) -> Self {
        Self { at, looked: Instant::now(), emulated: BTreeMap::new(), found: None }
    }

    /// To be called again and again.
    pub(crate) fn look_now_and_then(&mut self) {
        if self.found.is_some() || self.looked.elapsed() < LOOK_EVERY {
            return;
        }
        self.looked = Instant::now();
        let now = emulated();
        let suspicious = now.iter().any(|(machine, count)| {
            self.emulated.get(machine).is_some_and(|before| count.saturating_sub(*before) >= SUSPICIOUS)
        });
        self.emulated = now;
        if suspicious {
            self.found = traced().and_then(|trace| self.lost_in(&trace, SEEN));
        }
    }

    /// What was seen, or is told by these logs.
    pub(crate) fn end<'a>(self, mut logs: impl Iterator<Item = &'a str>) -> Option<String> {
        let found = self.found.clone();
        found.or_else(|| logs.find_map(|log| self.lost_in(log, 1)))
    }

    /// Whether one address where guests are run is in there so many times.
    fn lost_in(&self, text: &str, times: usize) -> Option<String> {
        let mut seen: BTreeMap<u64, usize> = BTreeMap::new();
        text.split(|c: char| !c.is_ascii_alphanumeric())
            .map(|word| word.trim_start_matches("0x"))
            .filter(|word| word.len() == 16)
            .filter_map(|word| u64::from_str_radix(word, 16).ok())
            .filter(|address| self.at.contains(address))
            .for_each(|address| *seen.entry(address).or_default() += 1);
        let (address, _) = seen.into_iter().find(|(_, count)| *count >= times)?;
        Some(format!(
            "a guest's processor was at {address:#x}, where its host's kernel runs guests ({RUNS_GUESTS})"
        ))
    }
}

/// Where this host's kernel runs guests. None where KVM is not that of an AMD processor, or may not be looked at. To
/// be asked once: the kernel has some 200,000 symbols.
pub(crate) fn place() -> Option<Range<u64>> {
    let symbols = fs::read_to_string("/proc/kallsyms").ok()?;
    let begin = symbols.lines().find_map(|line| address_of(line, RUNS_GUESTS))?;
    (begin != 0).then(|| begin..begin + ITS_SIZE)
}

/// Whether this host's processors are QEMU's, without help of the machine's own: so they say of themselves.
#[cfg(target_arch = "x86_64")]
pub(crate) fn emulated_processor() -> bool {
    let said = std::arch::x86_64::__cpuid(0x4000_0000);
    [said.ebx, said.ecx, said.edx].map(u32::to_le_bytes).concat() == b"TCGTCGTCGTCG"
}

/// Only the other architecture's processors break guests.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn emulated_processor() -> bool {
    false
}

/// How many instructions KVM emulated for each machine.
fn emulated() -> BTreeMap<PathBuf, u64> {
    let machines = fs::read_dir(MACHINES).into_iter().flatten().flatten();
    machines
        .filter_map(|machine| {
            let path = machine.path().join("insn_emulation");
            let count = fs::read_to_string(&path).ok()?.trim().parse().ok()?;
            Some((path, count))
        })
        .collect()
}

/// What KVM does for a moment, by the kernel's own account. None, which proves nothing, where that is not to be had.
fn traced() -> Option<String> {
    let instance = Path::new(TRACING).join(format!("lost-guests-{}", std::process::id()));
    fs::create_dir(&instance).ok()?;
    let trace = fs::write(instance.join("events/kvm/kvm_exit/enable"), "1").ok().and_then(|()| {
        thread::sleep(TRACED);
        fs::write(instance.join("tracing_on"), "0").ok()?;
        fs::read_to_string(instance.join("trace")).ok()
    });
    let _ = fs::write(instance.join("events/kvm/kvm_exit/enable"), "0");
    let _ = fs::remove_dir(&instance);
    trace
}

fn address_of(line: &str, symbol: &str) -> Option<u64> {
    let mut words = line.split_whitespace();
    let address = words.next()?;
    (words.nth(1)? == symbol).then(|| u64::from_str_radix(address, 16).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lookout() -> Lookout {
        let begin = 0xffff_ffff_c088_1fa0;
        Lookout::begin(begin..begin + ITS_SIZE)
    }

    #[test]
    fn only_the_symbol_itself_counts() {
        let line = "ffffffffc0881fa0 t __svm_vcpu_run\t[kvm_amd]";
        assert_eq!(address_of(line, RUNS_GUESTS), Some(0xffff_ffff_c088_1fa0));
        assert_eq!(address_of("ffffffffc0881f90 t __pfx___svm_vcpu_run\t[kvm_amd]", RUNS_GUESTS), None);
        assert_eq!(address_of("", RUNS_GUESTS), None);
    }

    #[test]
    fn a_guest_is_lost_where_guests_are_run_and_nowhere_else() {
        let lost =
            "vcpu1-506 [000] d..1. 174.976311: kvm_exit: vcpu 1 reason npf rip 0xffffffffc0882040 info1";
        assert!(lookout().lost_in(&lost.repeat(SEEN), SEEN).is_some());
        assert_eq!(lookout().lost_in(&lost.repeat(SEEN - 1), SEEN), None, "it may have been there by chance");
        assert!(lookout().end(["registers: RIP ffffffffc0882040 RSP 0"].into_iter()).is_some());
        for well in [
            "vcpu 1 reason npf rip 0xffffffff81096048 info1 0x000000020000000e",
            "rip 0xffffffffc0881f9f",
            "rip 0xffffffffc08821a0",
            "",
        ] {
            assert_eq!(lookout().end([well].into_iter()), None, "{well}");
        }
    }
}
