//! Guests that mean harm.

use std::os::unix::net::UnixListener;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration::{Ctx, Outcome, Rounds, Test};

use super::{A_MOMENT, boot, initrd, status_mib, up};
use crate::world::Inside;

/// What the monitor may take beyond what it took before, while a guest does its worst.
const SPARE_MIB: u64 = 32;

pub fn tests() -> Vec<Test<Inside>> {
    vec![Test {
        name: "vmm.hostile-console",
        proves: "a guest that floods a console nobody reads costs the host nothing and can still be turned off",
        run: console,
        deadline: Duration::from_mins(3),
        rounds: Rounds::once_or(5),
        tags: &[],
    }]
}

fn console(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let socket = ctx.path("c");
    let listener =
        UnixListener::bind(&socket).with_context(|| format!("listening on {}", socket.display()))?;
    let machine = boot(ctx, "g").options(["--cpus", "2"]).console(format!("unix:{}", socket.display()));
    let guest = up(ctx, machine, &initrd(ctx)?)?;
    // Connected, and never read.
    let (_unread, _) = listener.accept().context("waiting for the monitor's console")?;
    let before = status_mib(guest.pid(), "RssAnon")?;
    let flood = guest
        .begin(["sh", "-c", "yes 0123456789012345678901234567890123456789 > /dev/console"], ctx.left())?;
    let mut most = 0;
    for _ in 0..20 {
        thread::sleep(Duration::from_millis(250));
        most = most.max(status_mib(guest.pid(), "RssAnon")?);
    }
    ensure!(most <= before + SPARE_MIB, "the flood took {most} MiB of the host, before it was {before}");
    ensure!(guest.sh("echo alive", A_MOMENT)? == "alive\n", "the guest has other things to say");
    drop(flood);
    guest.power_off()?.expect_code(0)?;
    Ok(Outcome::Passed)
}
