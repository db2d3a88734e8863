//! The monitor, by its command line: what a guest sees of the machine and what the host sees of the guest.

mod bad_input;
mod block;
mod boot;
mod control;
mod drives;
mod fs;
mod generation;
mod grow;
mod hostile;
mod jail;
mod life;
mod memory;
mod net;
mod posix;
mod psci;
mod scribble;
mod snapshot;
mod vsock;

use std::time::Duration;

use anyhow::{Context, Result, bail};
use integration::guest::{Boot, Guest, Initrd, Parts};
use integration::{Ctx, Test};

use crate::world::Inside;

/// For a command in a guest that has little to do.
const A_MOMENT: Duration = Duration::from_secs(30);

pub fn tests() -> Vec<Test<Inside>> {
    [
        boot::tests(),
        life::tests(),
        bad_input::tests(),
        vsock::tests(),
        fs::tests(),
        posix::tests(),
        block::tests(),
        drives::tests(),
        memory::tests(),
        grow::tests(),
        hostile::tests(),
        control::tests(),
        jail::tests(),
        net::tests(),
        generation::tests(),
        psci::tests(),
        scribble::tests(),
        snapshot::tests(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn parts(ctx: &Ctx<'_, Inside>) -> Parts {
    Parts { guest: ctx.world.guest.clone(), vmm: ctx.world.vmm.clone(), scratch: ctx.scratch.to_owned() }
}

/// A machine called `name`, which lives as long as the test may.
fn boot(ctx: &Ctx<'_, Inside>, name: &str) -> Boot {
    Boot::new(&parts(ctx), name, ctx.cmd(&ctx.world.vmm))
}

/// An initrd with a shell.
fn initrd(ctx: &Ctx<'_, Inside>) -> Result<Initrd> {
    Initrd::make(&ctx.world.guest, ctx.scratch, &[])
}

/// An initrd with a shell and the tests' own program.
fn initrd_with_part(ctx: &Ctx<'_, Inside>) -> Result<Initrd> {
    Initrd::make(&ctx.world.guest, ctx.scratch, &[&ctx.world.guest_part])
}

/// Starts it and waits until it answers.
fn up(ctx: &Ctx<'_, Inside>, boot: Boot, initrd: &Initrd) -> Result<Guest> {
    let guest = boot.up(initrd, ctx.left().mul_f64(0.6))?;
    ctx.note(format!("the guest answers after {:.2} s", guest.age().as_secs_f64()));
    Ok(guest)
}

/// A line of the monitor's `/proc/PID/status` that is a size, in MiB.
fn status_mib(pid: i32, field: &str) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let Some(line) = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')) else {
        bail!("{path} has no line {field}");
    };
    let kib: u64 =
        line.trim().trim_end_matches(" kB").parse().with_context(|| format!("{field} of {path}"))?;
    Ok(kib / 1024)
}
