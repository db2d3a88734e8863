//! Clients that go away and come back, and find all that was said meanwhile.

use std::fs::OpenOptions;
use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration::command::Running;
use integration::fifo::Output;
use integration::{Ctx, Outcome, Test};
use nix::sys::signal::Signal;

use super::{A_WHILE, OURS, Piped, new_id, test};
use crate::world::{Inside, RUNC};

pub fn tests() -> Vec<Test<Inside>> {
    vec![
        test(
            "task.attach",
            "of what a container says nothing is lost while no ctr is attached, and the next one is heard",
            attach,
        ),
        test(
            "task.reattach",
            "a reader that goes away in the middle of a stream finds the rest when it comes back, and its going is no \
             end of input",
            reattach,
        ),
    ]
}

fn numbers(from: u32, to: u32) -> String {
    (from..=to).fold(String::new(), |text, number| text + &number.to_string() + "\n")
}

/// Answers two lines, and a signal. It is silent until it is asked, since a `ctr run` that leaves takes with it what it
/// has read.
const SCRIPT: &str = "trap 'seq 2001 4000' USR1
    until read line; do :; done; echo got $line; seq 1 2000
    until read line; do :; done; echo got $line; exit 3";

fn attach(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    for runtime in [RUNC, OURS] {
        let id = new_id(ctx, runtime);
        ctx.world.with_container(&id, || attached(ctx, runtime, &id).context(runtime.to_owned()))?;
    }
    Ok(Outcome::Passed)
}

fn attached(ctx: &Ctx<'_, Inside>, runtime: &str, id: &str) -> Result<()> {
    let ctr = ctx.world.ctr();
    let ok = |words: &[&str]| ctr.with(ctx.cmd("ctr"), words).ok();
    ok(&["run", "-d", "--runtime", runtime, &ctr.image, id, "sh", "-c", SCRIPT])?;
    let attach = || -> Result<Running> {
        Ok(ctr.with(ctx.cmd("ctr"), ["task", "attach", id]).stdin_kept_open().start()?)
    };
    let mut first = attach()?;
    first.write(b"one\n")?;
    first.until_stdout_has("\n2000\n", A_WHILE)?;
    // It has nothing to pass on at this moment, which it could take with it.
    first.signal(Signal::SIGKILL)?;
    let mut shown = first.stdout_so_far();
    drop(first);
    ok(&["task", "kill", "--signal", "SIGUSR1", id])?;
    std::thread::sleep(Duration::from_secs(1));
    let mut second = attach()?;
    second.until_stdout_has("4000\n", A_WHILE)?;
    second.write(b"two\n")?;
    let done = second.wait()?.expect_code(3)?;
    shown.extend(&done.stdout);
    let expected = format!("got one\n{}{}got two\n", numbers(1, 2000), numbers(2001, 4000));
    ensure!(
        shown == expected.as_bytes(),
        "of {} bytes {} came, or not the same: {:?}",
        expected.len(),
        shown.len(),
        super::head(&String::from_utf8_lossy(&shown))
    );
    ok(&["container", "rm", id]).map(drop)?;
    Ok(())
}

/// More than there is room for on the way.
const MANY: u32 = 60_000;

fn reattach(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let expected = numbers(1, MANY);
    for runtime in [RUNC, OURS] {
        let script = format!("seq 1 {MANY}; read line; echo got $line; exit 3");
        let Piped { mut container, stdin, mut stdout, .. } =
            Piped::new(ctx, &api, runtime, &["sh", "-c", &script], |_| {})?;
        container.start()?;
        let (into, from) = (stdin.path().to_owned(), stdout.path().to_owned());
        drop(stdin);
        let mut shown = stdout.read_until("\n1000\n", A_WHILE)?;
        for more in ["\n30000\n", "\n60000\n"] {
            drop(stdout);
            std::thread::sleep(Duration::from_secs(1));
            stdout = Output::open(from.clone())?;
            shown.extend(stdout.read_until(more, A_WHILE)?);
        }
        let told = OpenOptions::new().write(true).open(&into).and_then(|mut fifo| fifo.write_all(b"me\n"));
        told.with_context(|| format!("{runtime}: writing to {}", into.display()))?;
        shown.extend(stdout.read_to_end(A_WHILE)?);
        let code = container.wait(A_WHILE)?;
        container.delete_task()?;
        container.delete()?;
        ensure!(code == 3, "{runtime}: exit code {code}");
        let shown = String::from_utf8_lossy(&shown);
        let wrong = shown.lines().zip(expected.lines()).find(|(shown, expected)| shown != expected);
        ensure!(
            shown == expected.clone() + "got me\n",
            "{runtime}: of {} bytes {} came; the first wrong line is {wrong:?}",
            expected.len() + 7,
            shown.len()
        );
    }
    Ok(Outcome::Passed)
}
