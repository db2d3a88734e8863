//! Programs that end before their time: what their clients are told, and that nothing is left of them.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration::command::Running;
use integration::containerd::{Api, Ctr, shim_of};
use integration::process::{self, Process};
use integration::wait::{Attempt, until};
use integration::{Ctx, Outcome, Test};
use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::events::Events;
use super::{A_WHILE, OURS, Piped, test};
use crate::world::{Inside, RUNC};

pub fn tests() -> Vec<Test<Inside>> {
    vec![
        test(
            "task.monitor-killed",
            "a container whose monitor is killed ends with 137, is deleted as any other, and leaves nothing",
            monitor_killed,
        ),
        test(
            "task.shim-killed",
            "of a container whose shim is killed its clients are told the end, and nothing is left",
            shim_killed,
        ),
        test(
            "task.restart",
            "containers outlive their containerd: its successor speaks with one that runs, and learns how one ended meanwhile",
            restart,
        ),
    ]
}

pub fn kill_hard(process: &Process) -> Result<()> {
    kill(Pid::from_raw(process.pid), Signal::SIGKILL)
        .with_context(|| format!("killing {}", process.describe()))
}

fn monitor_killed(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let events = Events::listen(ctx)?;
    let mut task = Piped::new(ctx, &api, OURS, &["sh", "-c", "echo ready; exec sleep 1000"], |_| {})?;
    task.container.start()?;
    task.stdout.read_until("ready", A_WHILE)?;
    let below = process::descendants(shim_of(&task.id)?.pid);
    let monitor = below.iter().find(|process| process.arguments.contains("supermachine-vmm run"));
    kill_hard(monitor.with_context(|| format!("below the shim are only {below:?}"))?)?;
    let code = task.container.wait(A_WHILE)?;
    ensure!(code == 137, "exit code {code}");
    let id = task.id.clone();
    task.end(code)?;
    let topics = events.until(&id, &["/tasks/delete"], A_WHILE)?;
    ensure!(
        topics == ["create", "start", "exit", "delete"].map(|topic| format!("/tasks/{topic}")),
        "{topics:?}"
    );
    Ok(Outcome::Passed)
}

/// Not with runc beside it: of a shim of runc's that is killed the socket stays.
fn shim_killed(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let events = Events::listen(ctx)?;
    let mut task = Piped::new(ctx, &api, OURS, &["sh", "-c", "echo ready; exec sleep 1000"], |_| {})?;
    task.container.start()?;
    task.stdout.read_until("ready", A_WHILE)?;
    kill_hard(&shim_of(&task.id)?)?;
    let topics = events.until(&task.id, &["/tasks/exit", "/tasks/delete"], A_WHILE)?;
    ctx.note(format!("{topics:?}"));
    let name = format!("task {}/{}", ctx.world.namespace, task.id);
    until("containerd to forget the task", A_WHILE, || match api.objects() {
        Ok(objects) if !objects.contains(&name) => Attempt::Done(()),
        other => Attempt::Pending(format!("{other:?}")),
    })?;
    task.container.delete()?;
    Ok(Outcome::Passed)
}

/// A containerd of the test's own, which ends with this value.
fn containerd(ctx: &Ctx<'_, Inside>, ctr: &Ctr) -> Result<(Running, Api)> {
    let mut command = ctx.cmd("containerd").arg("--address").arg(&ctr.address);
    for name in ["root", "state"] {
        command = command.arg(format!("--{name}")).arg(ctx.path(name));
    }
    let running = command.start()?;
    let api = until("containerd to answer", A_WHILE, || {
        let api =
            Api::connect(&ctr.address, &ctr.namespace, A_WHILE).and_then(|api| api.version().map(|_| api));
        api.map_or_else(|error| Attempt::Pending(format!("{error:#}")), Attempt::Done)
    })?;
    Ok((running, api))
}

fn restart(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let ctr = Ctr { address: ctx.path("containerd.sock"), ..ctx.world.ctr() };
    // A shim belongs to whoever reaps it: containerd as long as there is one, and then this process.
    set_child_subreaper(true).context("becoming the reaper of shims")?;
    let mut made = Vec::new();
    let Err(error) = restarted(ctx, &ctr, &mut made) else {
        reap_all()?;
        return Ok(Outcome::Passed);
    };
    // No other containerd knows of them.
    let purged =
        containerd(ctx, &ctr).and_then(|(_running, api)| made.iter().try_for_each(|id| api.purge(id)));
    Err(match purged {
        Ok(()) => error,
        Err(also) => error.context(format!("(and the containers could not be removed: {also:#})")),
    })
}

/// Waits for the end of all that has become a child of this process.
fn reap_all() -> Result<()> {
    let own = i32::try_from(std::process::id())?;
    let reaped = until("the shims to end", A_WHILE, || {
        process::reap(own, &process::descendants(own));
        let left = process::descendants(own);
        if left.is_empty() { Attempt::Done(()) } else { Attempt::Pending(format!("{left:?}")) }
    });
    Ok(reaped?)
}

fn restarted(ctx: &Ctx<'_, Inside>, ctr: &Ctr, made: &mut Vec<String>) -> Result<()> {
    let (first, api) = containerd(ctx, ctr)?;
    bring_image(ctx, ctr, &ctx.path("image.tar"))?;
    let script = "read line; echo got $line; exit 7";
    let mut tasks = Vec::new();
    // A task of runc's that ends while containerd is away is forgotten, as its shim has no more processes to name.
    for (runtime, when) in [(RUNC, "after"), (OURS, "after"), (OURS, "away")] {
        let task = Piped::new(ctx, &api, runtime, &["sh", "-c", script], |_| {})?;
        made.push(task.id.clone());
        task.container.start()?;
        tasks.push((runtime, when, task));
    }
    let mut handed_over = Vec::new();
    first.signal(Signal::SIGKILL)?;
    drop(first);
    for (runtime, when, task) in tasks {
        let Piped { id, container, stdin, stdout, .. } = task;
        container.hand_over();
        handed_over.push((runtime, when, id, stdin, stdout));
    }
    for (_, when, _, stdin, stdout) in &mut handed_over {
        if *when == "away" {
            stdin.write(b"me\n")?;
            stdout.read_until("got me\n", A_WHILE)?;
        }
    }
    // That their ends are known before anybody asks.
    std::thread::sleep(Duration::from_secs(1));
    let (_second, api) = containerd(ctx, ctr)?;
    for (runtime, when, id, mut stdin, mut stdout) in handed_over {
        let mut container = api.adopt(&id);
        if when == "after" {
            stdin.write(b"me\n")?;
            stdout.read_until("got me\n", A_WHILE)?;
        }
        let code = container.wait(A_WHILE)?;
        ensure!(code == 7, "{runtime}, {when}: exit code {code}");
        let deleted = container.delete_task()?;
        ensure!(deleted == 7, "{runtime}, {when}: Delete says {deleted}");
        container.delete()?;
    }
    Ok(())
}

/// Gives the test's own containerd the image that the host's has.
fn bring_image(ctx: &Ctx<'_, Inside>, ctr: &Ctr, file: &Path) -> Result<()> {
    let file = file.display().to_string();
    ctx.world.ctr().with(ctx.cmd("ctr"), ["images", "export", &file, &ctr.image]).ok()?;
    ctr.with(ctx.cmd("ctr"), ["images", "import", &file]).ok()?;
    Ok(())
}
