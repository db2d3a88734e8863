//! Control: a runc container does what its client asked for, as `ctr` sees it.

use std::time::Duration;

use anyhow::{Result, ensure};
use integration::{Ctx, Outcome, Rounds, Test};

use crate::world::{Inside, RUNC};

pub fn tests() -> Vec<Test<Inside>> {
    let test = |name, proves, run| Test {
        name,
        proves,
        run,
        deadline: Duration::from_mins(3),
        rounds: Rounds::once_or(5),
        tags: &["control"],
    };
    vec![
        test(
            "control.runc-ctr-output",
            "output, errors and the exit codes 0, 1, 42 and 255 of a runc container arrive through ctr",
            output,
        ),
        test("control.runc-ctr-stdin", "what ctr reads reaches a runc container", stdin),
        test("control.runc-ctr-kill", "a runc container killed through ctr ends with 137", kill),
    ]
}

fn output(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    for code in [0, 1, 42, 255] {
        let script = format!("echo out-{code}; echo err-{code} >&2; exit {code}");
        let id = ctx.id(&code.to_string());
        let command = ctx.world.ctr().run(ctx.cmd("ctr"), RUNC, &id, &["sh", "-c", &script]);
        let done = ctx.world.with_container(&id, || Ok(command.run()?.expect_code(code)?))?;
        ensure!(done.out() == format!("out-{code}\n"), "stdout of code {code} is {:?}", done.out());
        // ctr adds words of its own to stderr.
        ensure!(
            done.err().lines().any(|line| line == format!("err-{code}")),
            "stderr of code {code} is {:?}",
            done.err()
        );
        ensure!(!done.err().contains("out-"), "stdout leaked into stderr: {:?}", done.err());
    }
    Ok(Outcome::Passed)
}

fn stdin(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let id = ctx.id("head");
    // Not `cat`: that the input ends is something only later versions of ctr tell the container.
    let command = ctx.world.ctr().run(ctx.cmd("ctr"), RUNC, &id, &["head", "-n", "2"]);
    let done = ctx.world.with_container(&id, || Ok(command.stdin("first\nsecond\nthird\n").ok()?))?;
    ensure!(done.out() == "first\nsecond\n", "the container echoed {:?}", done.out());
    Ok(Outcome::Passed)
}

fn kill(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let (ctr, id) = (ctx.world.ctr(), ctx.id("sleep"));
    let process = ["sh", "-c", "echo ready; exec sleep 1000"];
    ctx.world.with_container(&id, || {
        let mut running = ctr.run(ctx.cmd("ctr"), RUNC, &id, &process).start()?;
        running.until_stdout_has("ready", ctx.left().mul_f64(0.6))?;
        ctr.with(ctx.cmd("ctr"), ["task", "kill", "--signal", "SIGKILL", &id]).ok()?;
        Ok(running.wait()?.expect_code(137)?)
    })?;
    Ok(Outcome::Passed)
}
