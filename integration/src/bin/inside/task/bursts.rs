//! Every byte of a stream, whenever it comes and however its process ends.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use integration::{Ctx, Outcome, Rounds, Test, pattern};

use super::files::{add, bind};
use super::{A_WHILE, OURS, Piped, test};
use crate::world::{Inside, RUNC};

pub fn tests() -> Vec<Test<Inside>> {
    let often = |name, proves, run| Test { rounds: Rounds::once_or(100), ..test(name, proves, run) };
    vec![
        often("task.burst", "8 MiB that a process writes just before its end are all there", burst),
        often(
            "task.through",
            "20 MiB, and pieces at odd times, go through another process and back",
            through,
        ),
    ]
}

const BURST: usize = 8 << 20;

/// The first round has runc beside ours, which tells whether the test itself is right.
fn runtimes(ctx: &Ctx<'_, Inside>) -> &'static [&'static str] {
    if ctx.round == 1 { &[RUNC, OURS] } else { &[OURS] }
}

fn burst(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let seed = u64::from(ctx.round);
    let process = ["/part", "burst", &seed.to_string(), &BURST.to_string()];
    for &runtime in runtimes(ctx) {
        let mut task = Piped::new(ctx, &api, runtime, &process, |spec| {
            add(spec, [bind(&ctx.world.guest_part, "/part", &["bind", "ro"])]);
        })?;
        let mut stdout = task.stdout;
        let reading = thread::spawn(move || stdout.read_to_end(A_WHILE));
        task.container.start()?;
        let code = task.container.wait(A_WHILE)?;
        let output = reading.join().map_err(|_| anyhow!("the reader broke"))??;
        let complaint = String::from_utf8_lossy(&task.stderr.read_to_end(A_WHILE)?).into_owned();
        task.container.delete_task()?;
        task.container.delete()?;
        ensure!(code == 0 && complaint.is_empty(), "{runtime}: it ended with {code}: {complaint:?}");
        same(seed, BURST, &output).context(runtime)?;
    }
    Ok(Outcome::Passed)
}

fn through(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    for &runtime in ctx.either(&[OURS][..], runtimes(ctx)) {
        let task = Piped::new(ctx, &api, runtime, &["sleep", "100000"], |_| {})?;
        task.container.start()?;
        let seed = u64::from(ctx.round);
        let sent = pattern::bytes(seed, 20 << 20);
        let arguments = ["task", "exec", "--exec-id", "whole", &task.id, "cat"];
        let done = ctx.world.ctr().with(ctx.cmd("ctr"), arguments).stdin(sent.clone()).ok()?;
        same(seed, sent.len(), &done.stdout).with_context(|| format!("{runtime}, in one piece"))?;

        let pieces = ctx.either(8, 32);
        let arguments = ["task", "exec", "--exec-id", "pieces", &task.id, "cat"];
        let mut running = ctx.world.ctr().with(ctx.cmd("ctr"), arguments).stdin_kept_open().start()?;
        let mut delays = pattern::sizes(seed, 300);
        for piece in sent.chunks(64 << 10).take(pieces) {
            running.write(piece)?;
            thread::sleep(Duration::from_millis(delays() as u64));
        }
        running.close_stdin();
        let done = running.wait()?.expect_code(0)?;
        same(seed, pieces * (64 << 10), &done.stdout).with_context(|| format!("{runtime}, in pieces"))?;
        task.container.kill(9)?;
        let code = task.container.wait(A_WHILE)?;
        task.end(code)?;
    }
    Ok(Outcome::Passed)
}

/// Whether these are the pattern's first `length` bytes.
fn same(seed: u64, length: usize, got: &[u8]) -> Result<()> {
    let wrong = pattern::wrong(seed, 0, got);
    ensure!(
        got.len() == length && wrong.is_none(),
        "of {length} bytes {} came back; the first wrong one is {wrong:?}",
        got.len()
    );
    Ok(())
}
