//! The agent, by its protocol: what a shim would ask of it, in a machine as the product has it.

mod life;
mod limits;
mod processes;

use anyhow::{Result, bail, ensure};
use integration::agent::Machine;
use integration::guest::{Boot, Parts};
use integration::{Ctx, Test};

use crate::world::Inside;

pub fn tests() -> Vec<Test<Inside>> {
    [life::tests(), processes::tests(), limits::tests()].into_iter().flatten().collect()
}

/// A machine whose agent answers.
fn machine(ctx: &Ctx<'_, Inside>) -> Result<Machine> {
    let parts =
        Parts { guest: ctx.world.guest.clone(), vmm: ctx.world.vmm.clone(), scratch: ctx.scratch.to_owned() };
    let boot = Boot::new(&parts, "g", ctx.cmd(&ctx.world.vmm)).options(["--cpus", "2", "--memory", "512M"]);
    let machine = Machine::up(boot, &parts.guest, ctx.scratch, ctx.left().mul_f64(0.6))?;
    let ready = std::time::Duration::from_nanos(machine.hello.ready_after.unsigned_abs());
    ctx.note(format!(
        "the agent serves {:.2} s after its kernel began, and answers after {:.2} s",
        ready.as_secs_f64(),
        machine.age().as_secs_f64()
    ));
    Ok(machine)
}

/// Expects a status with these words.
fn expect_error<T>(outcome: Result<T>, code: &str, words: &str) -> Result<()> {
    match outcome {
        Ok(_) => bail!("went well, and was to be {code} with {words:?}"),
        Err(error) => {
            let text = format!("{error:#}");
            ensure!(
                text.contains(code) && text.contains(words),
                "is {text:?}, and was to be {code} with {words:?}"
            );
            Ok(())
        }
    }
}
