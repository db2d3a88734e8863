//! How long a machine takes to its init: the same kernel, initrd and command line under one monitor or another.
//!
//! It is measured where the monitors run, and by what both have: the first words of init on the serial port.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::command::Cmd;
use crate::guest::Initrd;
use crate::process;

/// What [`init`] says.
const INIT: &str = "init is here";
/// And when it could begin its work.
const READY: &str = "init is ready";
/// For one boot.
const ONE: Duration = Duration::from_mins(2);
/// What both monitors are told to give.
const MIB: u64 = 128;

/// The init of these guests: it says that it is there, mounts what every init does, says that, and does nothing
/// more.
pub fn init() -> ! {
    println!("{INIT}");
    let none: Option<&str> = None;
    for (kind, place) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        // A guest in which it fails says so by never being ready.
        let mounted = fs::create_dir_all(place)
            .map_err(anyhow::Error::from)
            .and_then(|()| Ok(mount(Some(kind), place, Some(kind), MsFlags::empty(), none)?));
        if let Err(error) = mounted {
            println!("mounting {place}: {error}");
            loop {
                std::thread::park();
            }
        }
    }
    println!("{READY}");
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
    /// How the time of ours is made up.
    pub phases: Option<Phases>,
}

/// The parts of a boot, in seconds. Hypervisor and load go on at the same time.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Phases {
    /// From the start of the process to its first line.
    pub process: f64,
    /// Options, jail, devices.
    pub prepare: f64,
    /// The hypervisor's machine and processors.
    pub hypervisor: f64,
    /// Kernel and initrd to RAM.
    pub load: f64,
    /// The machine, with both of these, up to its first instruction.
    pub build: f64,
    /// From there to the first words of init.
    pub kernel: f64,
    /// From there to where it could begin its work.
    pub init: f64,
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
        .args(["run", "--log", "info", "--memory", &format!("{MIB}M"), "--append", "quiet", "--kernel"])
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
    let (begun, at) = (Instant::now(), monotonic()?);
    let mut running = command.start()?;
    running.until_stdout_has(INIT, ONE)?;
    let seconds = begun.elapsed().as_secs_f64();
    if !ours {
        return Ok(Sample { seconds, own_mib: None, phases: None });
    }
    let own_mib = Some(process::memory(running.pid(), MIB << 20)?.own_mib());
    running.until_stdout_has(READY, ONE)?;
    let ready = begun.elapsed().as_secs_f64();
    let said = String::from_utf8_lossy(&running.stderr_so_far()).into_owned();
    let phases = phases(&said, at, seconds, ready).with_context(|| format!("no phases in {said:?}"))?;
    Ok(Sample { seconds, own_mib, phases: Some(phases) })
}

/// The clock by which the monitor says when it began, in seconds.
fn monotonic() -> Result<f64> {
    Ok(Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?).as_secs_f64())
}

/// What the monitor said of its phases, with what was seen from outside.
fn phases(said: &str, started: f64, first_words: f64, ready: f64) -> Option<Phases> {
    let line = said.lines().find_map(|line| Some(line.split_once("phases in us: ")?.1))?;
    let value = |name: &str| -> Option<f64> {
        let words = line.split(' ');
        let micros: u32 =
            words.filter_map(|word| word.split_once('=')).find(|(key, _)| *key == name)?.1.parse().ok()?;
        Some(f64::from(micros) / 1e6)
    };
    let at: f64 = line.split(' ').find_map(|word| word.strip_prefix("at="))?.parse().ok()?;
    let process = (at / 1e6 - started).max(0.0);
    Some(Phases {
        process,
        prepare: value("prepare")?,
        hypervisor: value("hypervisor")?,
        load: value("load")?,
        build: value("build")?,
        kernel: first_words - process - value("start")?,
        init: ready - first_words,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_read_from_what_the_monitor_says() {
        let said = "supermachine-vmm: info: phases in us: at=5020000 prepare=1000 hypervisor=3000 load=4000 \
                    build=6000 start=8000\n";
        let found = phases(said, 5.0, 1.0, 1.25).unwrap();
        let near = |left: f64, right: f64| (left - right).abs() < 1e-9;
        assert!(near(found.process, 0.02) && near(found.prepare, 0.001), "{found:?}");
        assert!(near(found.kernel, 1.0 - 0.02 - 0.008) && near(found.init, 0.25), "{found:?}");
        assert!(phases("nothing", 0.0, 1.0, 1.0).is_none());
    }
}
