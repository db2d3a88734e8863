//! Ending the tool, politely and not: nothing may be left of the host.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use integration::bed::{Bed, emulators_below, emulators_of};
use integration::command::Running;
use integration::process::Process;
use integration::wait::{Attempt, until, until_true};
use integration::{Ctx, Outcome, Rounds, Test};
use nix::sys::signal::Signal;

use crate::world::Outside;

/// What is killed has this long to be gone.
const GONE: Duration = Duration::from_secs(2);

pub fn tests() -> Vec<Test<Outside>> {
    let test = |name, proves, run| Test {
        name,
        proves,
        run,
        deadline: Duration::from_mins(4),
        rounds: Rounds::once_or(10),
        tags: &["control"],
    };
    vec![
        test("bed.ctrl-c", "Ctrl-C ends the host and removes its files", ctrl_c),
        test("bed.ctrl-c-early", "Ctrl-C while the host boots does the same", ctrl_c_early),
        test(
            "bed.kill-9",
            "killing the tool leaves nothing running after 2 s, and the next run tidies up",
            kill_9,
        ),
        test("bed.two-at-once", "two hosts at once each run their own command", two_at_once),
    ]
}

/// A run of the tool that has got somewhere.
struct Begun {
    running: Running,
    emulators: Vec<Process>,
    directories: BTreeSet<PathBuf>,
}

/// Starts a run and waits until its command speaks.
fn begin(ctx: &Ctx<'_, Outside>, bed: &Bed) -> Result<Begun> {
    let before = bed.run_directories();
    let command = Outside::run(ctx, &[], ["sh", "-c", "echo begun; sleep 1000"])?;
    let mut running = command.stdin_kept_open().start()?;
    running.until_stdout_has("begun", ctx.left().mul_f64(0.8))?;
    looked_at(ctx, running, bed, &before)
}

/// The host that runs, or is about to, below the tool.
fn looked_at(
    ctx: &Ctx<'_, Outside>,
    running: Running,
    bed: &Bed,
    before: &BTreeSet<PathBuf>,
) -> Result<Begun> {
    // A QEMU that is only asked for its version has no files.
    let (emulators, directories) = until("QEMU to run below the tool", ctx.left().mul_f64(0.8), || {
        let emulators = emulators_below(running.pid());
        let new: Vec<_> = bed.run_directories().difference(before).cloned().collect();
        // Others may start hosts on this machine meanwhile; those of this run are named by its QEMU.
        let named = |directory: &PathBuf| {
            let directory = directory.display().to_string();
            emulators.iter().any(|emulator| emulator.arguments.contains(&directory))
        };
        let directories: BTreeSet<PathBuf> = new.into_iter().filter(named).collect();
        if directories.is_empty() {
            Attempt::Pending(format!("{emulators:?}, and its files are not in {}", bed.cache.display()))
        } else {
            Attempt::Done((emulators, directories))
        }
    })?;
    Ok(Begun { running, emulators, directories })
}

fn ctrl_c(ctx: &mut Ctx<'_, Outside>) -> Result<Outcome> {
    let bed = ctx.world.bed()?;
    end_with_ctrl_c(begin(ctx, &bed)?)
}

fn ctrl_c_early(ctx: &mut Ctx<'_, Outside>) -> Result<Outcome> {
    let bed = ctx.world.bed()?;
    let before = bed.run_directories();
    let running = Outside::run(ctx, &["--cold"], ["true"])?.start()?;
    end_with_ctrl_c(looked_at(ctx, running, &bed, &before)?)
}

fn end_with_ctrl_c(begun: Begun) -> Result<Outcome> {
    // A terminal sends it to the whole group.
    begun.running.signal_group(Signal::SIGINT).context("sending SIGINT")?;
    let (emulators, directories) = (begun.emulators, begun.directories);
    let done = begun.running.wait()?;
    ensure!(
        done.code() == Some(130) || done.signal() == Some(Signal::SIGINT as i32),
        "after Ctrl-C the tool ended with {}",
        done.status
    );
    gone(&emulators)?;
    for directory in directories {
        ensure!(!directory.exists(), "{} was left behind", directory.display());
    }
    Ok(Outcome::Passed)
}

fn kill_9(ctx: &mut Ctx<'_, Outside>) -> Result<Outcome> {
    let bed = ctx.world.bed()?;
    let begun = begin(ctx, &bed)?;
    begun.running.signal(Signal::SIGKILL).context("sending SIGKILL")?;
    let Begun { running, emulators, directories } = begun;
    let done = running.wait()?;
    ensure!(done.signal() == Some(Signal::SIGKILL as i32), "the tool ended with {}", done.status);
    gone(&emulators)?;
    // Nobody could remove its files then. The next run does.
    Outside::run(ctx, &[], ["true"])?.ok()?;
    for directory in directories {
        ensure!(!directory.exists(), "{} is still there after the next run", directory.display());
    }
    Ok(Outcome::Passed)
}

fn gone(emulators: &[Process]) -> Result<()> {
    let alive = |emulator: &&Process| {
        integration::process::read(emulator.pid)
            .is_some_and(|now| now.started == emulator.started && !now.is_zombie())
    };
    if until_true("QEMU to end", GONE, || !emulators.iter().any(|emulator| alive(&emulator))).is_err() {
        let left: Vec<String> = emulators.iter().filter(alive).map(Process::describe).collect();
        bail!("still running after {} s: {}", GONE.as_secs(), left.join("; "));
    }
    Ok(())
}

fn two_at_once(ctx: &mut Ctx<'_, Outside>) -> Result<Outcome> {
    let bed = ctx.world.bed()?;
    // Each proves to the other that it was there at the same time: both wait in the middle.
    let start = |name: &str| -> Result<Running> {
        let script = format!("echo {name} > /tmp/mine; echo begun; read line; cat /tmp/mine");
        Ok(Outside::run(ctx, &[], ["sh", "-c", &script])?.stdin_kept_open().start()?)
    };
    let mut both = [("first", start("first")?), ("second", start("second")?)];
    for (_, running) in &mut both {
        running.until_stdout_has("begun", ctx.left().mul_f64(0.7))?;
    }
    let pids: BTreeSet<i32> = both
        .iter()
        .flat_map(|(_, running)| emulators_below(running.pid()))
        .map(|emulator| emulator.pid)
        .collect();
    ensure!(pids.len() == 2, "two runs have {} QEMUs", pids.len());
    for (name, mut running) in both {
        running.write(b"go on\n").context("writing to the tool")?;
        running.close_stdin();
        let done = running.wait()?.expect_code(0)?;
        ensure!(done.out() == format!("begun\n{name}\n"), "the {name} host said {:?}", done.out());
    }
    for pid in pids {
        let left: Vec<_> = emulators_of(&bed.cache).into_iter().filter(|one| one.pid == pid).collect();
        ensure!(left.is_empty(), "left running: {left:?}");
    }
    Ok(Outcome::Passed)
}
