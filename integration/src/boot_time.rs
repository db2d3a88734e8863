//! How long a machine takes to its init: the same kernel, initrd and command line under one monitor or another.
//!
//! It is measured where the monitors run, and by what both have: the first words of init on the serial port.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::command::Cmd;
use crate::guest::Initrd;

/// What [`init`] says.
const INIT: &str = "init is here";
/// For one boot.
const ONE: Duration = Duration::from_mins(2);
/// What both monitors are told to give.
const MIB: u64 = 128;

/// The init of these guests: it says that it is there, and does nothing more.
pub fn init() -> ! {
    println!("{INIT}");
    loop {
        std::thread::park();
    }
}

/// One boot.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Sample {
    /// From the monitor's start to the first words of init.
    pub seconds: f64,
    /// What our monitor has of the host's memory for itself, the guest's RAM not counted. QEMU's RAM comes in
    /// several mappings, which are not to be told from its own, so nothing is said of its memory.
    pub own_mib: Option<f64>,
}

/// All boots of both sides, each in the order in which they were made.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Samples {
    /// Ours.
    pub ours: Vec<Sample>,
    /// QEMU's.
    pub qemu: Vec<Sample>,
}

/// Boots both in turn, `runs` times each.
pub fn measure(guest: &Path, vmm: &Path, runs: u32) -> Result<Samples> {
    let scratch = std::env::temp_dir().join(format!("boot-time-{}", std::process::id()));
    fs::create_dir(&scratch).with_context(|| format!("creating {}", scratch.display()))?;
    let own = std::env::current_exe().context("finding this program to make it an init")?;
    let samples = Initrd::of_init(&own, &scratch).and_then(|initrd| in_turn(guest, vmm, &initrd, runs));
    fs::remove_dir_all(&scratch).with_context(|| format!("removing {}", scratch.display()))?;
    samples
}

fn in_turn(guest: &Path, vmm: &Path, initrd: &Initrd, runs: u32) -> Result<Samples> {
    let mut samples = Samples::default();
    for number in 1..=runs {
        // The side that goes first changes, so that neither always finds the caches as the other left them.
        for ours in if number % 2 == 0 { [false, true] } else { [true, false] } {
            let command = if ours { our_command(guest, vmm, initrd) } else { qemu_command(guest, initrd) };
            let sample = boot(command, ours).with_context(|| if ours { "ours" } else { "QEMU" })?;
            eprintln!("{number}/{runs}: {} {sample:?}", if ours { "ours" } else { "QEMU" });
            if ours { &mut samples.ours } else { &mut samples.qemu }.push(sample);
        }
    }
    Ok(samples)
}

const KERNEL: &str = if cfg!(target_arch = "aarch64") { "Image" } else { "vmlinux" };

fn our_command(guest: &Path, vmm: &Path, initrd: &Initrd) -> Cmd {
    Cmd::new(vmm, ONE)
        .args(["run", "--memory", &format!("{MIB}M"), "--append", "quiet", "--kernel"])
        .arg(guest.join(KERNEL))
        .arg("--initrd")
        .arg(initrd.path())
}

fn qemu_command(guest: &Path, initrd: &Initrd) -> Cmd {
    let (program, machine, words) = match std::env::consts::ARCH {
        "aarch64" => ("qemu-system-aarch64", "virt,gic-version=3", "console=ttyAMA0 panic=-1 quiet"),
        // What our monitor tells its guests, too.
        _ => (
            "qemu-system-x86_64",
            "microvm,acpi=on,pit=off,pic=off,rtc=off,isa-serial=on",
            "console=ttyS0 panic=-1 reboot=a pci=off quiet",
        ),
    };
    Cmd::new(program, ONE)
        .args(["-M", machine, "-accel", "kvm", "-cpu", "host", "-m", &MIB.to_string(), "-smp", "1"])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"])
        .args(["-append", words, "-kernel"])
        .arg(guest.join(KERNEL))
        .arg("-initrd")
        .arg(initrd.path())
}

fn boot(command: Cmd, ours: bool) -> Result<Sample> {
    let begun = Instant::now();
    let mut running = command.start()?;
    running.until_stdout_has(INIT, ONE)?;
    let seconds = begun.elapsed().as_secs_f64();
    let own_mib = if ours { Some(own_memory(running.pid())?) } else { None };
    Ok(Sample { seconds, own_mib })
}

/// PSS of everything but the guest's RAM, which is the mapping of that size.
fn own_memory(pid: i32) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).context("reading the monitor's smaps")?;
    let kib = u32::try_from(own_kib(&text, MIB * 1024)).context("a monitor of 4 TiB")?;
    Ok(f64::from(kib) / 1024.0)
}

/// The sum of `Pss` in the text of an smaps over the mappings that are smaller than `ram` KiB.
fn own_kib(smaps: &str, ram: u64) -> u64 {
    let (mut total, mut size) = (0, 0);
    for line in smaps.lines() {
        let kib = |rest: &str| rest.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0);
        if let Some(rest) = line.strip_prefix("Size:") {
            size = kib(rest);
        } else if let Some(rest) = line.strip_prefix("Pss:") {
            total += if size < ram { kib(rest) } else { 0 };
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_not_the_monitors_own() {
        let smaps = "7f-80 rw-p 0 0:0 0\nSize:  131072 kB\nPss:  70000 kB\nPss_Dirty: 5 kB\n\
                     55-56 r-xp 0 0:0 0 /usr/bin/x\nSize: 2000 kB\nPss: 1500 kB\n\
                     7a-7b rw-p 0 0:0 0\nSize: 64 kB\nPss: 12 kB\n";
        assert_eq!(own_kib(smaps, 131_072), 1512);
    }
}
