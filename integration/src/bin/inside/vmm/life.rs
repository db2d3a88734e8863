//! How machines end, and how whoever ran them is told.

use std::time::Duration;

use anyhow::{Result, ensure};
use integration::guest::Initrd;
use integration::wait::until_true;
use integration::{Ctx, Outcome, Rounds, Test};
use nix::sys::signal::Signal;

use super::{A_MOMENT, boot, initrd, up};
use crate::world::Inside;

/// The monitor's exit codes, as its help has them.
const RESET: i32 = 3;
const PANIC: i32 = 4;
const CRASH: i32 = 5;
const STOPPED: i32 = 6;

const PANIC_SCRIPT: &str = "echo c > /proc/sysrq-trigger";

pub fn tests() -> Vec<Test<Inside>> {
    let test = |name, proves, run| Test {
        name,
        proves,
        run,
        deadline: Duration::from_mins(3),
        rounds: Rounds::once_or(10),
        tags: &[],
    };
    let mut tests = vec![
        test(
            "vmm.life-reset",
            "a guest that reboots, and one whose kernel panics, end with their exit codes",
            resets,
        ),
        test("vmm.life-signals", "SIGINT stops a machine, and SIGKILL leaves nothing of it", signals),
    ];
    if cfg!(target_arch = "x86_64") {
        tests.push(test(
            "vmm.life-button",
            "SIGTERM presses the power button, by which a guest turns itself off; a second one stops it",
            button,
        ));
        tests.push(test(
            "vmm.life-crash",
            "a guest that faults thrice ends with its exit code and its registers told",
            crash,
        ));
    }
    tests
}

/// Runs a guest that is told `script` and expects the monitor's exit `code` and one line with `word`.
fn ends(
    ctx: &Ctx<'_, Inside>,
    initrd: &Initrd,
    (name, append, script): (&str, &str, &str),
    code: i32,
    word: &str,
) -> Result<()> {
    let guest = up(ctx, boot(ctx, name).append(append), initrd)?;
    // The guest goes away under this command: whatever becomes of it says nothing.
    let _gone = guest.begin(["sh", "-c", script], A_MOMENT)?;
    let done = guest.wait()?.expect_code(code)?;
    ensure!(done.err().contains(word), "nothing was said of {word:?}: {}", done.err());
    ensure!(done.err().lines().count() == 1, "more than a line was said: {}", done.err());
    Ok(())
}

fn resets(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let initrd = initrd(ctx)?;
    ends(ctx, &initrd, ("r", "", "reboot -f"), RESET, "reset")?;
    // Without a driver for it, a panic is what the kernel was told to do about one: `panic=-1`, a reset.
    ends(ctx, &initrd, ("p", "", PANIC_SCRIPT), RESET, "reset")?;
    if cfg!(target_arch = "x86_64") {
        let modules = ctx.world.guest.join("modules/kernel/drivers/misc/pvpanic");
        let modules = ["pvpanic.ko.xz", "pvpanic-mmio.ko.xz"].map(|name| modules.join(name));
        ends(ctx, &initrd.with_modules(&modules)?, ("q", "", PANIC_SCRIPT), PANIC, "panicked")?;
    }
    Ok(Outcome::Passed)
}

fn crash(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    ends(ctx, &initrd(ctx)?, ("c", "reboot=t", "reboot -f"), CRASH, "rip")?;
    Ok(Outcome::Passed)
}

fn signals(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let initrd = initrd(ctx)?;
    let guest = up(ctx, boot(ctx, "i"), &initrd)?;
    guest.signal(Signal::SIGINT)?;
    let done = guest.wait()?.expect_code(STOPPED)?;
    ensure!(done.err().contains("stopped"), "nothing was said of being stopped: {}", done.err());

    let guest = up(ctx, boot(ctx, "k"), &initrd)?;
    guest.signal(Signal::SIGKILL)?;
    let done = guest.wait()?;
    ensure!(done.signal() == Some(9), "after SIGKILL the monitor ended with {}", done.status);
    Ok(Outcome::Passed)
}

fn button(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let modules = ctx.world.guest.join("modules/kernel/drivers");
    let modules = [modules.join("acpi/button.ko.xz"), modules.join("input/evdev.ko.xz")];
    let initrd =
        Initrd::make(&ctx.world.guest, ctx.scratch, &[&ctx.world.guest_part])?.with_modules(&modules)?;
    let guest = up(ctx, boot(ctx, "b"), &initrd)?;
    let mut waiting = guest.begin(["guest-part", "button"], ctx.left().mul_f64(0.8))?;
    waiting.until_stdout_has("waiting")?;
    guest.signal(Signal::SIGTERM)?;
    guest.wait()?.expect_code(0)?;

    // This one's init does not care about its button.
    let mut guest = up(ctx, boot(ctx, "n"), &initrd)?;
    guest.signal(Signal::SIGTERM)?;
    let ended = until_true("the monitor to end", Duration::from_secs(2), || guest.has_ended());
    ensure!(ended.is_err(), "the first SIGTERM was the end, though the guest did nothing");
    guest.signal(Signal::SIGTERM)?;
    guest.wait()?.expect_code(STOPPED)?;
    Ok(Outcome::Passed)
}
