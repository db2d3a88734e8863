//! A stock kernel to a shell command's output, in machines of all sizes.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration::{Ctx, Outcome, Rounds, Test};

use super::{A_MOMENT, boot, initrd, up};
use crate::world::Inside;

pub fn tests() -> Vec<Test<Inside>> {
    let test = |name, proves, short, run| Test {
        name,
        proves,
        run,
        deadline: Duration::from_mins(3),
        rounds: Rounds { short, long: 50 },
        tags: &[],
    };
    let mut tests = vec![
        test("vmm.boot-1", "a stock kernel runs a command with 1 processor and 128 MiB", 2, |ctx| {
            boots(ctx, 1, 128, None)
        }),
        test("vmm.boot-2", "a stock kernel runs a command with 2 processors and 512 MiB", 1, |ctx| {
            boots(ctx, 2, 512, None)
        }),
        test("vmm.boot-8", "a stock kernel runs a command with 8 processors and 8 GiB", 1, |ctx| {
            boots(ctx, 8, 8192, None)
        }),
    ];
    if cfg!(target_arch = "x86_64") {
        tests.push(test("vmm.boot-bzimage", "a bzImage as it is packaged boots too", 1, |ctx| {
            boots(ctx, 1, 256, Some("bzImage"))
        }));
    }
    tests
}

/// The guest has what it was given, and all its processors work.
fn boots(ctx: &mut Ctx<'_, Inside>, cpus: u32, mib: u64, kernel: Option<&str>) -> Result<Outcome> {
    let initrd = initrd(ctx)?;
    let mut boot = boot(ctx, "g").options([
        "--cpus".to_owned(),
        cpus.to_string(),
        "--memory".to_owned(),
        format!("{mib}M"),
    ]);
    if let Some(kernel) = kernel {
        boot = boot.kernel(ctx.world.guest.join(kernel));
    }
    let guest = up(ctx, boot, &initrd)?;
    let script = "uname -sm; nproc; sed -n 's/MemTotal: *//p' /proc/meminfo; taskset -p 1 | sed 's/.*: //'";
    let told = guest.sh(script, A_MOMENT)?;
    let lines: Vec<&str> = told.lines().collect();
    let [system, processors, memory, _mask] = lines[..] else {
        return Ok(Outcome::Failed(format!("the guest says {told:?}")));
    };
    ensure!(system == format!("Linux {}", std::env::consts::ARCH), "the guest is {system}");
    ensure!(processors == cpus.to_string(), "of {cpus} processors the guest has {processors}");
    let kib: u64 = memory.trim_end_matches(" kB").parse().context("MemTotal of the guest")?;
    // The kernel keeps some for itself: its image, and a page table entry's worth for each page.
    let (least, most) = ((mib * 1024).saturating_sub(48 * 1024 + mib * 1024 / 24), mib * 1024);
    ensure!((least..=most).contains(&kib), "of {mib} MiB the guest has {kib} KiB");
    guest.ends_well()?;
    Ok(Outcome::Passed)
}
