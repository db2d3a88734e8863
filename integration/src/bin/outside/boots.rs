//! Starting the emulated host: every time, and fast.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use integration::{Ctx, Outcome, Rounds, Test};

use crate::world::Outside;

pub fn tests() -> Vec<Test<Outside>> {
    vec![
        Test {
            name: "bed.boots",
            proves: "a cold boot ends with a host that runs a command on the processors that were asked for, every time",
            run: boots,
            deadline: Duration::from_mins(4),
            rounds: Rounds::once_or(20),
            tags: &["control"],
        },
        Test {
            name: "bed.restores",
            proves: "a saved host is restored and serves containerd, every time",
            run: restores,
            deadline: Duration::from_mins(4),
            rounds: Rounds::once_or(20),
            tags: &["control"],
        },
        Test {
            name: "bed.warm-start",
            proves: "with a warm cache `run -- true` takes at most 5 s (x86_64) or 6 s (aarch64), or on a machine that is slow a third of a cold boot",
            run: warm_start,
            deadline: Duration::from_mins(4),
            rounds: Rounds::once_or(3),
            // A slow bed is not a broken one.
            tags: &["speed"],
        },
    ]
}

fn boots(ctx: &mut Ctx<'_, Outside>) -> Result<Outcome> {
    let done = Outside::run(ctx, &["--cold"], ["sh", "-c", "uname -m; nproc"])?.ok()?;
    let arch = ctx.world.bed()?.arch;
    // One that is there besides is for no program.
    ensure!(done.out() == format!("{arch}\n2\n"), "the host is a {:?}", done.out());
    Ok(Outcome::Passed)
}

fn restores(ctx: &mut Ctx<'_, Outside>) -> Result<Outcome> {
    let done = Outside::run(ctx, &[], ["ctr", "version"])?.ok()?;
    ensure!(done.out().contains("Server:"), "containerd does not answer: {}", done.out());
    Ok(Outcome::Passed)
}

fn warm_start(ctx: &mut Ctx<'_, Outside>) -> Result<Outcome> {
    let limit = Duration::from_secs(if ctx.world.bed()?.arch == "x86_64" { 5 } else { 6 });
    // What the cache lacks is made by this one.
    timed(ctx, &[])?;
    let mut taken = [timed(ctx, &[])?, timed(ctx, &[])?, timed(ctx, &[])?];
    taken.sort();
    let told: Vec<String> = taken.iter().map(|time| format!("{:.2} s", time.as_secs_f64())).collect();
    let told = told.join(", ");
    if taken[1] <= limit {
        ctx.note(told);
        return Ok(Outcome::Passed);
    }
    // The seconds are those of a machine that has nothing else to do. How slow this one is now is seen by what
    // takes five times as long on every machine.
    let cold = timed(ctx, &["--cold"])?;
    ctx.note(format!("{told}; cold {:.2} s", cold.as_secs_f64()));
    ensure!(
        taken[1] <= cold / 3,
        "`run -- true` took {told}: more than {} s, and more than a third of a cold boot's {:.2} s",
        limit.as_secs(),
        cold.as_secs_f64()
    );
    Ok(Outcome::Passed)
}

fn timed(ctx: &mut Ctx<'_, Outside>, options: &[&str]) -> Result<Duration> {
    let begun = Instant::now();
    Outside::run(ctx, options, ["true"])?.ok()?;
    Ok(begun.elapsed())
}
