//! The guest's memory on the host.

use std::time::Duration;

use anyhow::{Result, ensure};
use integration::wait::{Attempt, until};
use integration::{Ctx, Outcome, Rounds, Test};

use super::{A_MOMENT, boot, initrd, status_mib, up};
use crate::world::Inside;

/// What the guest uses and frees.
const USED: u64 = 200;
/// The guest reports what it freed every two seconds, a part at a time.
const REPORTS: Duration = Duration::from_secs(60);

pub fn tests() -> Vec<Test<Inside>> {
    vec![Test {
        name: "vmm.memory",
        proves: "memory that a guest has not touched or has freed is not taken from the host",
        run,
        deadline: Duration::from_mins(3),
        rounds: Rounds::once_or(5),
        tags: &[],
    }]
}

fn run(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let guest = up(ctx, boot(ctx, "g").options(["--memory", "512M"]), &initrd(ctx)?)?;
    let rss = || status_mib(guest.pid(), "VmRSS");
    let idle = rss()?;
    ensure!(idle < 256, "an idle guest of 512 MiB takes {idle} MiB");
    guest.sh(&format!("dd if=/dev/zero of=/tmp/x bs=1M count={USED}"), A_MOMENT)?;
    let full = rss()?;
    ensure!(full + 20 >= idle + USED, "a guest that filled {USED} MiB takes {full} MiB, before {idle}");
    guest.sh("rm /tmp/x", A_MOMENT)?;
    let freed = until("the guest's memory to come back", REPORTS, || match rss() {
        Ok(now) if now + USED * 3 / 4 <= full => Attempt::Done(now),
        now => Attempt::Pending(format!("{now:?} MiB of {full}")),
    })?;
    ctx.note(format!("{idle} MiB idle, {full} MiB full, {freed} MiB after freeing {USED} MiB"));
    // What came back can be used again.
    guest.sh(
        &format!("dd if=/dev/zero of=/tmp/x bs=1M count={USED}; cmp -n 1000000 /tmp/x /dev/zero"),
        A_MOMENT,
    )?;
    guest.ends_well()?;
    Ok(Outcome::Passed)
}
