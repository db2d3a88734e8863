//! What an operator's command tells of a container.

use anyhow::{Context, Result, ensure};
use integration::{Ctx, Outcome, Test};
use serde_json::Value;

use super::{A_WHILE, OURS, Piped, test};
use crate::world::{Boot, Inside};

pub fn tests() -> Vec<Test<Inside>> {
    vec![test(
        "task.operator",
        "supermachine tells what runs, what its console showed, what its shim logged, and where the time went",
        operator,
    )]
}

fn operator(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let ask = |words: &[&str]| ctx.cmd("supermachine").args(words).run();
    let told = ask(&["check"])?;
    ensure!(told.code() == Some(0), "check: {}{}", told.out(), told.err());

    let api = ctx.world.api()?;
    let mut task = Piped::new(ctx, &api, OURS, &["sh", "-c", "echo up; exec sleep 1000"], |_| {})?;
    task.container.start()?;
    task.stdout.read_until("up", A_WHILE)?;
    let id = task.id.clone();

    let rows: Vec<Value> = serde_json::from_str(&ctx.cmd("supermachine").args(["ps", "--json"]).ok()?.out())?;
    let row = rows.iter().find(|row| row["id"] == id.as_str());
    let row = row.with_context(|| format!("{id} is not in {rows:?}"))?;
    ensure!(row["namespace"] == "default" && row["status"] == "running", "ps: {row}");
    ensure!(row["pid"] == task.pid, "ps: {row}, containerd has {}", task.pid);
    ensure!(row["memory"].as_u64().is_some_and(|bytes| bytes > 16 << 20), "ps: {row}");
    let table = ctx.cmd("supermachine").args(["-n", "default", "ps"]).ok()?;
    ensure!(
        table.out().lines().any(|line| line.contains(&id) && line.contains("running")),
        "{}",
        table.out()
    );
    let none = ctx.cmd("supermachine").args(["-n", "no-such-namespace", "ps"]).ok()?;
    ensure!(none.out().lines().count() == 1, "{}", none.out());

    // What is restored says nothing.
    let (console, phase) = match ctx.world.boot {
        Boot::Cold => ("supermachine-agent: ready", "kernel"),
        Boot::Restore => ("", "restore"),
    };
    for (words, wanted) in
        [(["console", &id], console), (["logs", &id], "serving"), (["timeline", &id], phase)]
    {
        let told = ctx.cmd("supermachine").args(words).ok()?;
        ensure!(told.out().contains(wanted), "{words:?} does not have {wanted:?}: {}", told.out());
    }
    let picture = ctx.path("timeline.svg");
    ctx.cmd("supermachine").args(["timeline", "--svg"]).arg(&picture).arg(&id).ok()?;
    ensure!(std::fs::read_to_string(&picture)?.contains("</svg>"), "the picture is cut off");
    ctx.note(ctx.cmd("supermachine").args(["timeline", &id]).ok()?.out());

    let wrong = ask(&["console", "no-such-container"])?;
    ensure!(wrong.code() == Some(1) && wrong.err().contains("supermachine ps"), "{:?}", wrong.err());

    task.container.kill(9)?;
    let code = task.container.wait(A_WHILE)?;
    task.end(code)?;
    Ok(Outcome::Passed)
}
