//! Programs that end in the middle of a call: it returns, its client learns what became of the task, and nothing is
//! left.

use std::fs::OpenOptions;
use std::io::Write;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use integration::containerd::{Api, Container, Ctr, shim_of};
use integration::process::{self, Process};
use integration::wait::{Attempt, until};
use integration::{Ctx, Outcome, Rounds, Test, pattern};
use serde_json::json;

use super::ended::kill_hard;
use super::events::Events;
use super::{A_WHILE, OURS, Piped, new_id, test};
use crate::world::Inside;

pub fn tests() -> Vec<Test<Inside>> {
    let often = |name, proves, run| Test {
        rounds: Rounds::once_or(10),
        deadline: Duration::from_mins(30),
        ..test(name, proves, run)
    };
    vec![
        often(
            "task.midway-monitor",
            "where the monitor is killed in a call, the call returns, and the task ends and is deleted",
            |ctx| each(ctx, Victim::Monitor),
        ),
        often(
            "task.midway-shim",
            "where the shim is killed in a call, the call returns, and containerd forgets the task",
            |ctx| each(ctx, Victim::Shim),
        ),
        often(
            "task.midway-guest",
            "where the guest's kernel panics in a call, the call returns, and the task ends and is deleted",
            |ctx| each(ctx, Victim::Guest),
        ),
    ]
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Victim {
    Monitor,
    Shim,
    Guest,
}

pub const CALLS: &[&str] = &[
    "create", "start", "exec", "state", "pids", "metrics", "pause", "resume", "update", "resize", "close-io",
    "wait", "kill", "delete",
];
/// In every change.
const SOME: &[&str] = &["create", "start", "exec", "kill", "delete"];
/// Which take a while, so that they are struck later; a containerd that is killed in them leaves what it unpacks.
const LONG: &[&str] = &["checkpoint", "restore"];
/// In which there is nobody in the guest who could bring it down.
const NOBODY: &[&str] = &["create", "start", "resume", "kill", "delete", "restore"];

/// What it ends with by itself, when it is told to.
const TOLD: u32 = 5;
const KILLED: u32 = 137;
/// It ends the guest's kernel with itself when it is told so.
const SCRIPT: &str = "trap 'exit 5' TERM; exec 3<&0; (read line <&3; echo c >/proc/sysrq-trigger) & echo ready; while :; do sleep 0.1; done";

fn each(ctx: &mut Ctx<'_, Inside>, victim: Victim) -> Result<Outcome> {
    let events = Events::listen(ctx)?;
    let mut delays = pattern::sizes(u64::from(ctx.round) * 3 + victim as u64, 400);
    for call in ctx.either(SOME, CALLS).iter().chain(LONG) {
        if victim == Victim::Guest && NOBODY.contains(call) {
            continue;
        }
        let delay = Duration::from_millis(delays() as u64) * if LONG.contains(call) { 10 } else { 1 };
        ctx.note(format!("{call}, after {delay:?}"));
        struck(ctx, &events, victim, call, delay)
            .with_context(|| format!("in {call}, struck after {} ms", delay.as_millis()))?;
    }
    Ok(Outcome::Passed)
}

/// Waits for the victim, which is no process of the host if it is the guest.
pub(super) fn find(victim: Victim, id: &str) -> Result<Option<Process>> {
    let found = until("the victim", A_WHILE, || {
        let Ok(shim) = shim_of(id) else { return Attempt::Pending("no shim".to_owned()) };
        let monitor = |one: &Process| one.arguments.contains("supermachine-vmm run");
        match victim {
            Victim::Shim => Attempt::Done(Some(shim)),
            Victim::Guest => Attempt::Done(None),
            Victim::Monitor => match process::descendants(shim.pid).into_iter().find(monitor) {
                Some(monitor) => Attempt::Done(Some(monitor)),
                None => Attempt::Pending("no monitor".to_owned()),
            },
        }
    });
    Ok(found?)
}

/// Waits a little, and strikes what was found.
fn strike(
    ctx: &Ctx<'_, Inside>,
    found: Option<&Process>,
    call: &str,
    id: &str,
    delay: Duration,
) -> Result<()> {
    thread::sleep(delay);
    if let Some(process) = found {
        let Err(error) = kill_hard(process) else { return Ok(()) };
        // A call that ends it may have been faster.
        ensure!(call == "delete" && process::read(process.pid).is_none(), error);
        return Ok(());
    }
    let path = ctx.path(&format!("{id}-stdin"));
    let told = OpenOptions::new().write(true).open(path).and_then(|mut fifo| fifo.write_all(b"now\n"));
    told.context("telling the guest to end")
}

/// Who is to be struck: found before the call, or while it goes on.
type Find<'a> = dyn Fn() -> Result<Option<Process>> + Sync + 'a;

fn struck(ctx: &Ctx<'_, Inside>, events: &Events, victim: Victim, call: &str, delay: Duration) -> Result<()> {
    let api = ctx.world.api()?;
    let id = new_id(ctx, OURS);
    let make = || Piped::named(ctx, &api, OURS, id.clone(), &["sh", "-c", SCRIPT], |_| {});
    let striking = |found: &Find<'_>, does: &mut dyn FnMut() -> Result<()>| -> Result<Result<()>> {
        thread::scope(|scope| {
            let striking = scope.spawn(|| strike(ctx, found()?.as_ref(), call, &id, delay));
            let done = does();
            striking.join().map_err(|_| anyhow!("the striker broke"))??;
            Ok(done)
        })
    };
    if ["create", "restore"].contains(&call) {
        let source = (call == "restore").then(|| source(ctx, &api)).transpose()?;
        let checkpoint = source.as_ref().map(|source| source.container.checkpoint(true)).transpose()?;
        let mut made = None;
        let done = striking(&|| find(victim, &id), &mut || {
            let process = ["sh", "-c", SCRIPT];
            made = Some(match &checkpoint {
                None => make()?,
                Some(checkpoint) => Piped::from(ctx, &api, checkpoint, id.clone(), &process, |_| {})?,
            });
            Ok(())
        })?;
        ctx.note(format!("{call}: {done:?}"));
        drop(checkpoint);
        if let Some(source) = source {
            let code = source.container.wait(A_WHILE)?;
            source.end(code)?;
        }
        let Some(task) = made else { return gone(&api, ctx, &id) };
        return settled(ctx, &api, events, victim, task.container);
    }
    let mut task = make()?;
    if call != "start" {
        task.container.start()?;
        task.stdout.read_until("ready", A_WHILE)?;
    }
    match call {
        "resume" => task.container.pause()?,
        "delete" => {
            task.container.kill(9)?;
            task.container.wait(A_WHILE)?;
        }
        _ => {}
    }
    let found = find(victim, &id)?;
    let done = striking(&|| Ok(found.clone()), &mut || {
        make_call(ctx, &ctx.world.ctr(), &mut task.container, call, &id)
    })?;
    ctx.note(format!("{call}: {done:?}"));
    settled(ctx, &api, events, victim, task.container)
}

/// A container that runs, to be written down.
fn source<'a>(ctx: &Ctx<'_, Inside>, api: &'a Api) -> Result<Piped<'a>> {
    let mut task = Piped::new(ctx, api, OURS, &["sh", "-c", SCRIPT], |_| {})?;
    task.container.start()?;
    task.stdout.read_until("ready", A_WHILE)?;
    Ok(task)
}

/// Makes a call to a container's task, as often as it takes to be struck in.
pub fn make_call(
    ctx: &Ctx<'_, Inside>,
    ctr: &Ctr,
    container: &mut Container<'_>,
    call: &str,
    id: &str,
) -> Result<()> {
    let ctr = |arguments: &[&str]| -> Result<()> {
        ctr.with(ctx.cmd("ctr").deadline(A_WHILE), [&["task"], arguments].concat()).ok()?;
        Ok(())
    };
    match call {
        "start" => container.start(),
        "exec" => {
            // ctr leaves its FIFOs behind when the shim is gone.
            let fifos = ctx.path(&format!("{id}-fifos")).display().to_string();
            let script = "sleep 0.3; echo here";
            ctr(&["exec", "--fifo-dir", &fifos, "--exec-id", "other", id, "sh", "-c", script])
        }
        "state" => (0..20).try_for_each(|_| ctr(&["ls"])),
        "pids" => (0..20).try_for_each(|_| ctr(&["ps", id])),
        "metrics" => (0..20).try_for_each(|_| ctr(&["metrics", id])),
        "pause" => container.pause(),
        "resume" => container.resume(),
        "update" => (0..50).try_for_each(|_| container.update(&json!({ "pids": { "limit": 60 } }))),
        "resize" => (0..50).try_for_each(|_| container.resize((80, 25))),
        "close-io" => container.close_stdin(),
        "wait" => container.wait(A_WHILE).map(drop),
        "kill" => container.kill(15),
        "delete" => container.delete_task().map(drop),
        "checkpoint" => container.checkpoint(false).map(drop),
        other => Err(anyhow!("there is no call {other}")),
    }
}

/// Whatever was struck, the task comes to its end.
pub(super) fn settled(
    ctx: &Ctx<'_, Inside>,
    api: &Api,
    events: &Events,
    victim: Victim,
    mut container: Container<'_>,
) -> Result<()> {
    let id = container.id().to_owned();
    match container.wait(A_WHILE) {
        Ok(code) => ensure!([KILLED, TOLD].contains(&code), "exit code {code}"),
        Err(error) if victim == Victim::Shim => ctx.note(format!("waiting: {error:#}")),
        Err(error) if format!("{error:#}").contains("NotFound") => {}
        Err(error) => return Err(error),
    }
    if victim != Victim::Shim {
        match container.delete_task() {
            Ok(code) => ensure!([KILLED, TOLD].contains(&code), "Delete says {code}"),
            Err(error) if format!("{error:#}").contains("NotFound") => {}
            Err(error) => return Err(error),
        }
    }
    gone(api, ctx, &id)?;
    let topics = events.until(&id, &["/tasks/exit", "/tasks/delete"], A_WHILE)?;
    ctx.note(format!("{topics:?}"));
    container.delete()
}

/// Until containerd knows no such task.
pub(super) fn gone(api: &Api, ctx: &Ctx<'_, Inside>, id: &str) -> Result<()> {
    let name = format!("task {}/{id}", ctx.world.namespace);
    let gone = until("containerd to forget the task", A_WHILE, || match api.objects() {
        Ok(objects) if !objects.contains(&name) => Attempt::Done(()),
        other => Attempt::Pending(format!("{other:?}")),
    });
    Ok(gone?)
}
