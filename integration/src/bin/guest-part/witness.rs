//! Watches what must not break when a machine is saved and goes on: the clock, on all processors together; timers;
//! the registers that nobody but their own code looks after.
//!
//! It writes what it has seen into a file, again and again: a line `CHECKS FAULT`, where FAULT is the first one or
//! empty. Whoever reads it twice sees that it goes on.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

/// What a timer is set to.
const NAP: Duration = Duration::from_millis(20);
/// A timer that comes later was lost for a while.
const LATE: Duration = Duration::from_secs(20);
/// Between two looks of the same thread: most of the time there is nothing to do, as in most guests.
const REST: Duration = Duration::from_millis(5);
/// How often what was seen is written.
const REPORT: Duration = Duration::from_millis(50);

#[derive(Default)]
struct Seen {
    checks: AtomicU64,
    fault: Mutex<String>,
}

impl Seen {
    fn check(&self, result: Result<()>) {
        self.checks.fetch_add(1, Ordering::SeqCst);
        if let Err(error) = result {
            let mut fault = self.fault.lock().unwrap_or_else(PoisonError::into_inner);
            if fault.is_empty() {
                *fault = format!("{error:#}").replace('\n', " ");
            }
        }
    }
}

/// Watches until it is killed, with a thread on each of `cpus` processors.
pub fn watch(cpus: usize, report: &Path) -> Result<()> {
    let seen = Arc::new(Seen::default());
    let latest = Arc::new(AtomicU64::new(0));
    for cpu in 0..cpus {
        let (seen, latest) = (Arc::clone(&seen), Arc::clone(&latest));
        thread::spawn(move || {
            let mut set = CpuSet::new();
            let pinned = set.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
            seen.check(pinned.with_context(|| format!("keeping to processor {cpu}")));
            let mut round = 0u64;
            loop {
                round += 1;
                seen.check(clock(&latest));
                seen.check(registers(round << 8 | cpu as u64));
                thread::sleep(REST);
            }
        });
    }
    let timers = Arc::clone(&seen);
    thread::spawn(move || {
        loop {
            timers.check(timer());
        }
    });
    let aside = report.with_extension("new");
    loop {
        let fault = seen.fault.lock().unwrap_or_else(PoisonError::into_inner).clone();
        fs::write(&aside, format!("{} {fault}\n", seen.checks.load(Ordering::SeqCst)))
            .and_then(|()| fs::rename(&aside, report))
            .with_context(|| format!("writing {}", report.display()))?;
        thread::sleep(REPORT);
    }
}

fn now() -> Result<u64> {
    let time = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
    Ok(u64::try_from(time.as_nanos())?)
}

/// What another processor has read before is not later than what this one reads now.
fn clock(latest: &AtomicU64) -> Result<()> {
    for _ in 0..100 {
        let before = latest.load(Ordering::SeqCst);
        let time = now()?;
        if time < before {
            bail!("the clock went back by {} ns between processors", before - time);
        }
        latest.fetch_max(time, Ordering::SeqCst);
    }
    Ok(())
}

fn timer() -> Result<()> {
    let begun = Instant::now();
    thread::sleep(NAP);
    let took = begun.elapsed();
    if took < NAP || took > LATE {
        bail!("a timer of {NAP:?} took {took:?}");
    }
    Ok(())
}

/// How often a loop goes round while the registers are full: some milliseconds.
const SPINS: u64 = 200_000;

/// Sixteen registers of 256 bits keep what they were given.
#[cfg(target_arch = "x86_64")]
fn registers(seed: u64) -> Result<()> {
    if !std::arch::is_x86_feature_detected!("avx") {
        return Ok(());
    }
    let given = pattern(seed);
    let mut kept = [0u64; WORDS];
    // SAFETY: AVX is there. The code reads 512 bytes at `given` and writes as many at `kept`, and all registers that it
    // changes are named.
    unsafe {
        std::arch::asm!(
            "vmovdqu ymm0, [{given}]", "vmovdqu ymm1, [{given} + 32]",
            "vmovdqu ymm2, [{given} + 64]", "vmovdqu ymm3, [{given} + 96]",
            "vmovdqu ymm4, [{given} + 128]", "vmovdqu ymm5, [{given} + 160]",
            "vmovdqu ymm6, [{given} + 192]", "vmovdqu ymm7, [{given} + 224]",
            "vmovdqu ymm8, [{given} + 256]", "vmovdqu ymm9, [{given} + 288]",
            "vmovdqu ymm10, [{given} + 320]", "vmovdqu ymm11, [{given} + 352]",
            "vmovdqu ymm12, [{given} + 384]", "vmovdqu ymm13, [{given} + 416]",
            "vmovdqu ymm14, [{given} + 448]", "vmovdqu ymm15, [{given} + 480]",
            "2:", "dec {spins}", "jnz 2b",
            "vmovdqu [{kept}], ymm0", "vmovdqu [{kept} + 32], ymm1",
            "vmovdqu [{kept} + 64], ymm2", "vmovdqu [{kept} + 96], ymm3",
            "vmovdqu [{kept} + 128], ymm4", "vmovdqu [{kept} + 160], ymm5",
            "vmovdqu [{kept} + 192], ymm6", "vmovdqu [{kept} + 224], ymm7",
            "vmovdqu [{kept} + 256], ymm8", "vmovdqu [{kept} + 288], ymm9",
            "vmovdqu [{kept} + 320], ymm10", "vmovdqu [{kept} + 352], ymm11",
            "vmovdqu [{kept} + 384], ymm12", "vmovdqu [{kept} + 416], ymm13",
            "vmovdqu [{kept} + 448], ymm14", "vmovdqu [{kept} + 480], ymm15",
            "vzeroupper",
            given = in(reg) given.as_ptr(),
            kept = in(reg) kept.as_mut_ptr(),
            spins = inout(reg) SPINS => _,
            out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _,
            out("ymm4") _, out("ymm5") _, out("ymm6") _, out("ymm7") _,
            out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
            out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
            options(nostack),
        );
    }
    compare(&given, &kept)
}

/// All thirty-two registers of 128 bits keep what they were given.
#[cfg(target_arch = "aarch64")]
fn registers(seed: u64) -> Result<()> {
    let given = pattern(seed);
    let mut kept = [0u64; WORDS];
    // SAFETY: the code reads 512 bytes at `given` and writes as many at `kept`, and all registers that it changes are
    // named.
    unsafe {
        std::arch::asm!(
            "ldp q0, q1, [{given}]", "ldp q2, q3, [{given}, #32]",
            "ldp q4, q5, [{given}, #64]", "ldp q6, q7, [{given}, #96]",
            "ldp q8, q9, [{given}, #128]", "ldp q10, q11, [{given}, #160]",
            "ldp q12, q13, [{given}, #192]", "ldp q14, q15, [{given}, #224]",
            "ldp q16, q17, [{given}, #256]", "ldp q18, q19, [{given}, #288]",
            "ldp q20, q21, [{given}, #320]", "ldp q22, q23, [{given}, #352]",
            "ldp q24, q25, [{given}, #384]", "ldp q26, q27, [{given}, #416]",
            "ldp q28, q29, [{given}, #448]", "ldp q30, q31, [{given}, #480]",
            "2:", "subs {spins}, {spins}, #1", "b.ne 2b",
            "stp q0, q1, [{kept}]", "stp q2, q3, [{kept}, #32]",
            "stp q4, q5, [{kept}, #64]", "stp q6, q7, [{kept}, #96]",
            "stp q8, q9, [{kept}, #128]", "stp q10, q11, [{kept}, #160]",
            "stp q12, q13, [{kept}, #192]", "stp q14, q15, [{kept}, #224]",
            "stp q16, q17, [{kept}, #256]", "stp q18, q19, [{kept}, #288]",
            "stp q20, q21, [{kept}, #320]", "stp q22, q23, [{kept}, #352]",
            "stp q24, q25, [{kept}, #384]", "stp q26, q27, [{kept}, #416]",
            "stp q28, q29, [{kept}, #448]", "stp q30, q31, [{kept}, #480]",
            given = in(reg) given.as_ptr(),
            kept = in(reg) kept.as_mut_ptr(),
            spins = inout(reg) SPINS => _,
            out("v0") _, out("v1") _, out("v2") _, out("v3") _, out("v4") _, out("v5") _, out("v6") _, out("v7") _,
            out("v8") _, out("v9") _, out("v10") _, out("v11") _, out("v12") _, out("v13") _, out("v14") _,
            out("v15") _, out("v16") _, out("v17") _, out("v18") _, out("v19") _, out("v20") _, out("v21") _,
            out("v22") _, out("v23") _, out("v24") _, out("v25") _, out("v26") _, out("v27") _, out("v28") _,
            out("v29") _, out("v30") _, out("v31") _,
            options(nostack),
        );
    }
    compare(&given, &kept)
}

const WORDS: usize = 64;

fn pattern(seed: u64) -> [u64; WORDS] {
    std::array::from_fn(|index| (seed << 8 | index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

fn compare(given: &[u64; WORDS], kept: &[u64; WORDS]) -> Result<()> {
    match given.iter().zip(kept).position(|(given, kept)| given != kept) {
        None => Ok(()),
        Some(at) => bail!("a vector register holds {:#x} instead of {:#x}", kept[at], given[at]),
    }
}
