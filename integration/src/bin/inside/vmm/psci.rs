//! Processors of aarch64 that the monitor turns on and off itself, and not the hypervisor.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration::guest::{Guest, Initrd};
use integration::{Ctx, Outcome, Rounds, Test};

use super::{A_MOMENT, boot, initrd, up};
use crate::world::Inside;

const CPUS: usize = 4;
/// The monitor's exit code for a guest that wants to start again.
const RESET: i32 = 3;

pub fn tests() -> Vec<Test<Inside>> {
    vec![Test {
        name: "vmm.psci",
        proves: "with PSCI in the monitor all processors come up, go and come again, and a guest can turn its \
                 machine off and start it anew",
        run,
        deadline: Duration::from_mins(10),
        rounds: Rounds::once_or(5),
        tags: &[],
    }]
}

fn run(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    if cfg!(not(target_arch = "aarch64")) {
        return Ok(Outcome::Skipped("only aarch64 has PSCI".into()));
    }
    let initrd = initrd(ctx)?;
    let guest = start(ctx, "g", &initrd)?;
    let count = || guest.sh("nproc", A_MOMENT);
    ensure!(count()?.trim() == CPUS.to_string(), "of {CPUS} processors the guest has {}", count()?);
    for round in 0..ctx.either(2, 100) {
        // The first one stays, since not every kernel lets it go.
        for cpu in 1..CPUS {
            let online = format!("/sys/devices/system/cpu/cpu{cpu}/online");
            let left = guest.sh(&format!("echo 0 > {online}; nproc"), A_MOMENT)?;
            ensure!(left.trim() == (CPUS - 1).to_string(), "without processor {cpu} there are {left}");
            let script =
                format!("echo 1 > {online}; taskset -c {cpu} sh -c 'sed -n 1p /proc/stat; nproc --all'");
            let back =
                guest.sh(&script, A_MOMENT).with_context(|| format!("processor {cpu}, round {round}"))?;
            ensure!(back.lines().last() == Some("4"), "with processor {cpu} again there are {back}");
        }
    }
    ensure!(count()?.trim() == CPUS.to_string(), "{} processors came back", count()?);
    let stats = guest.stats()?;
    for cpu in 0..CPUS {
        let calls = stats["vcpus"][cpu]["calls"].as_u64().unwrap_or(0);
        // The first one turns the others on; each of those turns itself off.
        ensure!(calls > 0, "processor {cpu} has made no call: {stats}");
    }
    guest.ends_well()?;

    let guest = start(ctx, "r", &initrd)?;
    // By the shell, which has it inside; the guest goes away under this command.
    let _gone = guest.begin(["sh", "-c", "reboot -f"], A_MOMENT)?;
    guest.wait()?.expect_code(RESET)?;
    Ok(Outcome::Passed)
}

fn start(ctx: &Ctx<'_, Inside>, name: &str, initrd: &Initrd) -> Result<Guest> {
    let cpus = CPUS.to_string();
    up(ctx, boot(ctx, name).controlled().options(["--cpus", &cpus, "--psci", "userspace"]), initrd)
}
