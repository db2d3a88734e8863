//! Memory that a machine is given and that is taken back while it runs.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration::guest::{Guest, Session};
use integration::wait::{Attempt, until};
use integration::{Ctx, Outcome, Rounds, Test};

use super::{A_MOMENT, boot, initrd_with_part, status_mib, up};
use crate::world::Inside;

const MIB: u64 = 1 << 20;
/// At boot, and at most.
const LEAST: u64 = 256;
const MOST: u64 = 1024;
/// What the guest's program works with: more than it could without what it is given, and what always fits.
const MUCH: u64 = 500;
const LITTLE: u64 = 40;
/// A guest that fails to empty a block waits for a minute before it tries again.
const SHRINKING: Duration = Duration::from_mins(2);

pub fn tests() -> Vec<Test<Inside>> {
    vec![Test {
        name: "vmm.grow",
        proves: "a guest of 256 MiB is given 768 more and uses them, and the host has them back when they are \
                 taken, while a program in the guest takes and frees memory and finds it as it was",
        run,
        deadline: Duration::from_mins(15),
        rounds: Rounds::once_or(1),
        tags: &[],
    }]
}

fn run(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let machine = boot(ctx, "g").controlled().options([
        "--cpus",
        "2",
        "--memory",
        &format!("{LEAST}M"),
        "--memory-max",
        &format!("{MOST}M"),
    ]);
    let guest = up(ctx, machine, &initrd_with_part(ctx)?)?;
    // What the guest reports as free comes back by itself: not what is to be seen here.
    guest.sh(
        "cd /sys/bus/virtio/drivers/virtio_balloon; for d in virtio*; do echo $d > unbind; done",
        A_MOMENT,
    )?;
    let at_boot = total(&guest)?;
    ensure!(at_boot <= LEAST, "of {LEAST} MiB the guest has {at_boot}");
    let mut churning = guest.begin(["guest-part", "churn", "1"], ctx.left())?;
    hold(&mut churning, LITTLE)?;
    refused(&guest)?;
    for round in 0..ctx.either(2, 20) {
        let most = if round % 2 == 0 { MOST } else { MOST / 2 + MUCH / 2 };
        resize(&guest, most, A_MOMENT)?;
        let grown = total(&guest)?;
        ensure!(grown >= at_boot + (most - LEAST) * 9 / 10, "with {most} MiB the guest says it has {grown}");
        hold(&mut churning, MUCH)?;
        let full = resident(&guest)?;
        ensure!(full > MUCH, "a guest that uses {MUCH} MiB takes {full}");
        hold(&mut churning, LITTLE)?;
        resize(&guest, LEAST, SHRINKING)?;
        let shrunk = total(&guest)?;
        ensure!(shrunk <= at_boot, "with {LEAST} MiB again the guest says it has {shrunk}");
        let freed = resident(&guest)?;
        ensure!(freed <= LEAST, "{freed} MiB of a guest of {LEAST} are on the host, {full} before");
        let whole = status_mib(guest.pid(), "VmRSS")?;
        ensure!(whole + MUCH / 2 < full, "the monitor takes {whole} MiB, before {full}");
        ctx.note(format!(
            "{most} MiB: the guest has {grown}, {full} resident; then {shrunk}, {freed} resident"
        ));
    }
    churning.feed(b"")?;
    let churned = churning.finish()?;
    ensure!(
        churned.code == 0 && churned.out().contains("were what they should be"),
        "in the guest: {churned}"
    );
    guest.ends_well()?;
    Ok(Outcome::Passed)
}

/// Has the guest's program work with that many MiB.
fn hold(churning: &mut Session, mib: u64) -> Result<()> {
    churning.feed(format!("{mib}\n").as_bytes())?;
    churning.until_stdout_has(&format!("holding {mib}\n"))
}

fn total(guest: &Guest) -> Result<u64> {
    let told = guest.sh("sed -n 's/^MemTotal: *\\(.*\\) kB/\\1/p' /proc/meminfo", A_MOMENT)?;
    Ok(told.trim().parse::<u64>().with_context(|| format!("MemTotal is {told:?}"))? / 1024)
}

fn count(guest: &Guest, pointer: &str) -> Result<u64> {
    let stats = guest.stats()?;
    let found = stats.pointer(pointer).and_then(serde_json::Value::as_u64);
    Ok(found.with_context(|| format!("no {pointer} in {stats}"))? / MIB)
}

/// Of the guest's RAM, what is on the host.
fn resident(guest: &Guest) -> Result<u64> {
    count(guest, "/memory/guest_resident")
}

fn resize(guest: &Guest, mib: u64, within: Duration) -> Result<()> {
    guest.ctl(["resize", "--memory", &format!("{mib}M")])?;
    ensure!(count(guest, "/ram/requested")? == mib, "{mib} MiB were asked for, and not noted");
    until(&format!("the guest to have {mib} MiB"), within, || match count(guest, "/ram/actual") {
        Ok(actual) if actual == mib => Attempt::Done(()),
        other => Attempt::Pending(format!("{other:?}")),
    })?;
    Ok(())
}

/// What cannot be is said, and changes nothing.
fn refused(guest: &Guest) -> Result<()> {
    for (size, word) in [("255M", "balloon"), ("1025M", "memory_max"), ("257M", "2 MiB"), ("0", "balloon")] {
        let done = guest.try_ctl(["resize", "--memory", size])?.expect_code(1)?;
        ensure!(done.err().contains(word), "{size} is refused without {word:?}: {}", done.err());
        ensure!(count(guest, "/ram/requested")? == LEAST, "{size} was refused, but noted");
    }
    Ok(())
}
