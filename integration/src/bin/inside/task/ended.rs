//! Programs that end before their time: what their clients are told, and that nothing is left of them.

use anyhow::{Context, Result, ensure};
use integration::containerd::shim_of;
use integration::process::{self, Process};
use integration::wait::{Attempt, until};
use integration::{Ctx, Outcome, Test};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::events::Events;
use super::{A_WHILE, OURS, Piped, test};
use crate::world::Inside;

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
    ]
}

pub fn kill_hard(process: &Process) -> Result<()> {
    kill(Pid::from_raw(process.pid), Signal::SIGKILL)
        .with_context(|| format!("killing {}", process.describe()))
}

/// The monitor of a container's machine.
pub fn monitor_of(id: &str) -> Result<Process> {
    let below = process::descendants(shim_of(id)?.pid);
    let monitor = below.iter().find(|process| process.arguments.contains("supermachine-vmm run"));
    monitor.cloned().with_context(|| format!("below the shim are only {below:?}"))
}

fn monitor_killed(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let events = Events::listen(ctx)?;
    let mut task = Piped::new(ctx, &api, OURS, &["sh", "-c", "echo ready; exec sleep 1000"], |_| {})?;
    task.container.start()?;
    task.stdout.read_until("ready", A_WHILE)?;
    kill_hard(&monitor_of(&task.id)?)?;
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
