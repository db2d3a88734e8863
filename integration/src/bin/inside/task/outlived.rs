//! Containers outlive their containerd: one that is killed at rest, or in the middle of a call.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use integration::command::{Running, contains};
use integration::containerd::{Api, Container, Ctr};
use integration::fifo::{Input, Output};
use integration::process;
use integration::wait::{Attempt, until, until_true};
use integration::{Ctx, Outcome, Rounds, Test, pattern};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::midway::{CALLS, make_call};
use super::{A_WHILE, OURS, Piped, new_id, test};
use crate::own::{self, containerd};
use crate::world::{Inside, RUNC};

pub fn tests() -> Vec<Test<Inside>> {
    vec![
        test(
            "task.restart",
            "containers outlive their containerd: its successor speaks with one that runs, and learns how one ended meanwhile",
            restart,
        ),
        Test {
            rounds: Rounds::once_or(5),
            deadline: Duration::from_mins(30),
            ..test(
                "task.midway-containerd",
                "where containerd is killed in a call, its successor knows what became of the task, is told its end, \
                 and deletes it with all that there is of it",
                midway,
            )
        },
    ]
}

fn restart(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    with_own(ctx, restarted)
}

/// Runs `body`, which starts containerds of its own one after the other, and notes the containers that it makes.
fn with_own(
    ctx: &Ctx<'_, Inside>,
    body: fn(&Ctx<'_, Inside>, &Ctr, &mut Vec<String>) -> Result<()>,
) -> Result<Outcome> {
    let ctr = Ctr { address: ctx.path("containerd.sock"), ..ctx.world.ctr() };
    own::reap_shims()?;
    let mut made = Vec::new();
    let Err(error) = body(ctx, &ctr, &mut made) else {
        own::reap_all()?;
        return Ok(Outcome::Passed);
    };
    // No other containerd knows of them.
    let purged =
        containerd(ctx, &ctr, None).and_then(|(_running, api)| made.iter().try_for_each(|id| api.purge(id)));
    Err(match purged {
        Ok(()) => error,
        Err(also) => error.context(format!("(and the containers could not be removed: {also:#})")),
    })
}

fn restarted(ctx: &Ctx<'_, Inside>, ctr: &Ctr, made: &mut Vec<String>) -> Result<()> {
    let (first, api) = containerd(ctx, ctr, None)?;
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
    let (_second, api) = containerd(ctx, ctr, None)?;
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

/// In every change.
const SOME: &[&str] = &["create", "kill"];
/// What it ends with when it is told to.
const TOLD: u32 = 5;
const SCRIPT: &str = "trap 'exit 5' TERM; echo ready; while :; do sleep 0.1; done";

/// Not with runc beside it: of what runc's shim has half made much stays.
fn midway(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    with_own(ctx, |ctx, ctr, made| {
        let (mut running, mut api) = containerd(ctx, ctr, None)?;
        bring_image(ctx, ctr, &ctx.path("image.tar"))?;
        let mut delays = pattern::sizes(u64::from(ctx.round) * 5, 400);
        for call in ctx.either(SOME, CALLS) {
            // Making one takes longer than anything else.
            let delay = delays() as u64 * if *call == "create" { 8 } else { 1 };
            let delay = Duration::from_millis(delay);
            ctx.note(format!("{call}, after {delay:?}"));
            let id = new_id(ctx, OURS);
            made.push(id.clone());
            let struck = struck(ctx, ctr, &running, &api, call, &id, delay);
            let struck =
                struck.with_context(|| format!("in {call}, struck after {} ms", delay.as_millis()))?;
            let heard = running.stderr_so_far();
            drop(running);
            (running, api) = containerd(ctx, ctr, None)?;
            settled(&running, &api, call, &id, &heard, struck)
                .with_context(|| format!("after {call}, struck after {} ms", delay.as_millis()))?;
            made.pop();
            let left = bundles(&ctx.path("state"), &ctr.namespace)?;
            ensure!(
                left.is_empty(),
                "after {call}, struck after {} ms, there is {left:?}",
                delay.as_millis()
            );
        }
        Ok(())
    })
}

/// Where a client's streams lead, which must stay as long as the task does.
type Streams = (Input, Output, Output);

/// Makes the call, and kills containerd meanwhile.
fn struck(
    ctx: &Ctx<'_, Inside>,
    ctr: &Ctr,
    containerd: &Running,
    api: &Api,
    call: &str,
    id: &str,
    delay: Duration,
) -> Result<Option<Streams>> {
    let pid = containerd.pid();
    let make = || Piped::named(ctx, api, OURS, id.to_owned(), &["sh", "-c", SCRIPT], |_| {});
    let striking = |begun: &(dyn Fn() -> bool + Sync), does: &mut dyn FnMut() -> Result<()>| {
        thread::scope(|scope| {
            let striking = scope.spawn(|| -> Result<()> {
                until_true("the call to begin", A_WHILE, begun)?;
                thread::sleep(delay);
                kill(Pid::from_raw(pid), Signal::SIGKILL).context("killing containerd")
            });
            let done = does();
            striking.join().map_err(|_| anyhow!("the striker broke"))??;
            ctx.note(format!("{call}: {done:?}"));
            anyhow::Ok(())
        })
    };
    if call == "create" {
        let named = format!("-id {id} ");
        let begun = || process::all().iter().any(|process| process.arguments.contains(&named));
        let mut made = None;
        striking(&begun, &mut || {
            made = Some(make()?);
            Ok(())
        })?;
        return Ok(made.map(hand_over));
    }
    let mut task = make()?;
    if call != "start" {
        task.container.start()?;
        task.stdout.read_until("ready", A_WHILE)?;
    }
    match call {
        "resume" => task.container.pause()?,
        "delete" => {
            task.container.kill(15)?;
            task.container.wait(A_WHILE)?;
        }
        _ => {}
    }
    striking(&|| true, &mut || make_call(ctx, ctr, &mut task.container, call, id))?;
    Ok(Some(hand_over(task)))
}

fn hand_over(task: Piped<'_>) -> Streams {
    task.container.hand_over();
    (task.stdin, task.stdout, task.stderr)
}

/// Brings the task, whatever it is, to its end; `heard` is what the first containerd logged.
fn settled(
    running: &Running,
    api: &Api,
    call: &str,
    id: &str,
    heard: &[u8],
    _streams: Option<Streams>,
) -> Result<()> {
    let mut container = api.adopt(id);
    let status = container.status()?;
    let possible: &[Option<&str>] = match call {
        "create" => &[None, Some("CREATED")],
        "start" => &[Some("CREATED"), Some("RUNNING")],
        "pause" | "resume" => &[Some("RUNNING"), Some("PAUSED")],
        "kill" => &[Some("RUNNING"), Some("STOPPED")],
        "delete" => &[None, Some("STOPPED")],
        _ => &[Some("RUNNING")],
    };
    ensure!(possible.contains(&status), "the task is {status:?}");
    if let Some(status) = status {
        ended(&mut container, status)?;
        let exit: &[u8] = b"topic=/tasks/exit";
        until("the exit to be told", A_WHILE, || {
            let now = running.stderr_so_far();
            if contains(heard, exit) || contains(&now, exit) {
                Attempt::Done(())
            } else {
                Attempt::Pending(String::new())
            }
        })?;
    }
    container.delete()
}

fn ended(container: &mut Container<'_>, status: &str) -> Result<()> {
    match status {
        "CREATED" => container.start()?,
        "PAUSED" => container.resume()?,
        _ => {}
    }
    if status != "STOPPED" {
        // A shell that has just been started may not have set its trap.
        let killed = container.kill(if status == "CREATED" { 9 } else { 15 });
        // The first containerd may have killed it, and it has ended since its status was asked for.
        killed
            .or_else(|error| if format!("{error:#}").contains("NotFound") { Ok(()) } else { Err(error) })?;
    }
    let expected = [TOLD, 137];
    let code = container.wait(A_WHILE)?;
    ensure!(expected.contains(&code), "exit code {code}");
    let deleted = container.delete_task()?;
    ensure!(deleted == code, "Wait says {code}, Delete says {deleted}");
    Ok(())
}

/// What a containerd keeps of tasks.
fn bundles(state: &Path, namespace: &str) -> Result<Vec<String>> {
    let directory = state.join("io.containerd.runtime.v2.task").join(namespace);
    let entries = fs::read_dir(&directory).with_context(|| format!("reading {}", directory.display()))?;
    Ok(entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
}
