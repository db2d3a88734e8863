//! The same again and again, several at a time.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use integration::{Ctx, Outcome, Rounds, Test};

use super::{A_WHILE, OURS, Piped, test};
use crate::world::Inside;

pub fn tests() -> Vec<Test<Inside>> {
    vec![Test {
        rounds: Rounds::once_or(1),
        deadline: std::time::Duration::from_hours(3),
        ..test(
            "task.cycles",
            "containers are made, used and deleted, 200 of them, 8 at a time, and nothing is left",
            cycles,
        )
    }]
}

fn cycles(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let (total, at_a_time) = ctx.either((6, 3), (200, 8));
    let next = AtomicU32::new(0);
    let failures = Mutex::new(Vec::new());
    let ctx = &*ctx;
    thread::scope(|scope| {
        for _ in 0..at_a_time {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= total {
                        return;
                    }
                    if let Err(error) = cycle(ctx, number) {
                        let mut failures = failures.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                        failures.push(format!("cycle {number}: {error:#}"));
                        // The others go on, but no more are begun.
                        next.store(total, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().map_err(|_| anyhow!("a cycle broke"))?;
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(Outcome::Passed)
}

fn cycle(ctx: &Ctx<'_, Inside>, number: u32) -> Result<()> {
    let api = ctx.world.api()?;
    let script = "echo ready; read line; echo got $line; exit 9";
    let mut task = Piped::new(ctx, &api, OURS, &["sh", "-c", script], |_| {}).context("making it")?;
    task.container.start()?;
    task.stdout.read_until("ready", A_WHILE)?;
    let arguments = ["task", "exec", "--exec-id", "other", &task.id, "sh", "-c", "echo here; exit 4"];
    let done = ctx.world.ctr().with(ctx.cmd("ctr"), arguments).run()?.expect_code(4)?;
    ensure!(done.out() == "here\n", "the other process says {:?}", done.out());
    task.stdin.write(format!("{number}\n").as_bytes())?;
    task.stdout.read_until(&format!("got {number}\n"), A_WHILE)?;
    let code = task.container.wait(A_WHILE)?;
    ensure!(code == 9, "exit code {code}");
    task.end(code)
}
