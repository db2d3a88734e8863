//! Calls that do not fit the state a task is in are refused with the codes that runc's are, and many may wait for it.

use std::thread;

use anyhow::{Result, anyhow, ensure};
use integration::containerd::{Api, Stdio, refusal};
use integration::{Ctx, Outcome, Test};
use serde_json::json;

use super::{A_WHILE, OURS, Piped, test};
use crate::world::{Inside, RUNC};

pub fn tests() -> Vec<Test<Inside>> {
    vec![
        test(
            "task.refusals",
            "calls that do not fit the state of a task are refused, or answered, as with runc",
            refusals,
        ),
        test(
            "task.waiters",
            "all who wait for a task and for a process in it are told the same end, also who asks late",
            waiters,
        ),
    ]
}

/// What was tried, and the code with which it was refused.
type Tried = Vec<(&'static str, String)>;

fn refusals(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let theirs = tried(ctx, &api, RUNC)?;
    let ours = tried(ctx, &api, OURS)?;
    ensure!(theirs.len() == ours.len(), "{} and {} things were tried", ours.len(), theirs.len());
    let differ: Vec<_> = theirs
        .iter()
        .zip(&ours)
        .filter(|((_, theirs), (_, ours))| !is_as_good(theirs, ours))
        .map(|((what, theirs), (_, ours))| format!("{what}: ours {ours}, runc {theirs}"))
        .collect();
    ensure!(differ.is_empty(), "{}", differ.join("\n"));
    Ok(Outcome::Passed)
}

/// Where runc's shim does not say which kind of mistake it is, ours says that it is the caller's.
fn is_as_good(theirs: &str, ours: &str) -> bool {
    let callers = ["Unknown", "FailedPrecondition", "InvalidArgument"];
    theirs == ours || (theirs == "Unknown" && callers.contains(&ours))
}

/// Tries all that may be refused, through a task's life.
fn tried(ctx: &Ctx<'_, Inside>, api: &Api, runtime: &str) -> Result<Tried> {
    let mut all = Tried::new();
    let mut trying = |what: &'static str, done: Result<()>| {
        let code = match &done {
            Ok(()) => "done".to_owned(),
            Err(error) => {
                ctx.note(format!("{runtime}: {what}: {error:#}"));
                refusal(error).map_or_else(|| format!("{error:#}"), |(code, _)| code)
            }
        };
        all.push((what, code));
    };
    let null = || "/dev/null".into();
    let stdio = Stdio { stdin: None, stdout: null(), stderr: null() };
    let sleep = ["sleep", "100000"];
    let mut task = Piped::new(ctx, api, runtime, &sleep, |_| {})?;
    let container = &task.container;
    trying("pausing what is created", container.pause());
    trying("resuming what is created", container.resume());
    trying("starting a process that there is not", container.exec_named("none").start());
    trying("killing a process that there is not", container.exec_named("none").kill(9));
    trying("deleting a process that there is not", container.exec_named("none").delete());
    trying("waiting for a process that there is not", container.exec_named("none").wait(A_WHILE).map(drop));

    container.start()?;
    trying("starting what runs", container.start());
    trying("resuming what runs", container.resume());
    trying("a signal that there is not", container.kill(200));
    let exec = container.exec("one", &sleep, &stdio)?;
    trying("killing a process that is not started", exec.kill(9));
    trying("a process whose name is taken", container.exec("one", &sleep, &stdio).map(drop));
    exec.start()?;
    let only_ours = || -> Result<()> {
        // At this the shim of runc of containerd 1.7 loses count of processes, and panics at the container's end.
        if runtime == OURS {
            let code = exec.start().err().and_then(|error| Some(refusal(&error)?.0));
            ensure!(code.as_deref() == Some("FailedPrecondition"), "starting a process again: {code:?}");
        }
        Ok(())
    };
    only_ours()?;
    trying("deleting a process that runs", exec.delete());
    container.pause()?;
    trying("pausing what is paused", container.pause());
    trying("a process in what is paused", container.exec("two", &sleep, &stdio).map(drop));
    container.resume()?;
    exec.kill(9)?;
    exec.wait(A_WHILE)?;
    trying("killing a process that has ended", exec.kill(9));
    only_ours()?;
    exec.delete()?;
    trying("deleting a process that was deleted", exec.delete());
    trying("closing an input that there is not", container.exec_named("one").close_stdin());

    container.kill(9)?;
    container.wait(A_WHILE)?;
    trying("starting what has ended", container.start());
    trying("pausing what has ended", container.pause());
    trying("killing what has ended", container.kill(9));
    trying("resizing what has ended", container.resize((80, 25)));
    trying("a process in what has ended", container.exec("late", &sleep, &stdio).map(drop));
    trying("new limits for what has ended", container.update(&json!({ "pids": { "limit": 60 } })));
    task.container.delete_task()?;
    let container = &task.container;
    trying("starting what was deleted", container.start());
    trying("killing what was deleted", container.kill(9));
    trying("waiting for what was deleted", container.wait(A_WHILE).map(drop));
    let again = task.container.delete_task().map(drop);
    trying("deleting what was deleted", again);
    task.container.delete()?;
    Ok(all)
}

/// How many wait at a time.
const MANY: usize = 10;

fn waiters(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    for runtime in [RUNC, OURS] {
        let mut task =
            Piped::new(ctx, &api, runtime, &["sh", "-c", "echo ready; read line; exit 7"], |_| {})?;
        task.container.start()?;
        task.stdout.read_until("ready", A_WHILE)?;
        let (stdin, null) = (ctx.path(&format!("{}-exec", task.id)), || "/dev/null".into());
        let mut input = integration::fifo::Input::create(stdin.clone())?;
        let stdio = Stdio { stdin: Some(stdin), stdout: null(), stderr: null() };
        let exec = task.container.exec("other", &["sh", "-c", "read line; exit 8"], &stdio)?;
        exec.start()?;
        let id = task.id.as_str();
        let world = ctx.world;
        let codes = thread::scope(|scope| {
            let waiting: Vec<_> = (0..2 * MANY)
                .map(|number| {
                    scope.spawn(move || -> Result<u32> {
                        let api = world.api()?;
                        let container = api.adopt(id);
                        let code = if number < MANY {
                            container.wait(A_WHILE)
                        } else {
                            container.exec_named("other").wait(A_WHILE)
                        };
                        container.hand_over();
                        code
                    })
                })
                .collect();
            // Until most of them wait.
            thread::sleep(std::time::Duration::from_secs(1));
            input.write(b"go\n")?;
            // The container's end would be that of the other process.
            exec.wait(A_WHILE)?;
            task.stdin.write(b"go\n")?;
            waiting
                .into_iter()
                .map(|one| one.join().map_err(|_| anyhow!("a waiter broke"))?)
                .collect::<Result<Vec<_>>>()
        })?;
        let expected = [vec![7; MANY], vec![8; MANY]].concat();
        ensure!(codes == expected, "{runtime}: they were told {codes:?}");
        let late = (task.container.wait(A_WHILE)?, exec.wait(A_WHILE)?);
        ensure!(late == (7, 8), "{runtime}: who asks late is told {late:?}");
        exec.delete()?;
        task.end(7)?;
    }
    Ok(Outcome::Passed)
}
