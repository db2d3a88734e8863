//! Containers that are written down, and go on from there: once, and as often as one likes.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration::containerd::{Api, Checkpoint, refusal};
use integration::wait::{Attempt, until};
use integration::{Ctx, Outcome, Test};
use serde_json::json;

use super::broken::Small;
use super::template::Configured;
use super::{A_WHILE, OURS, Piped, new_id, test};
use crate::world::Inside;

pub fn tests() -> Vec<Test<Inside>> {
    vec![
        test(
            "task.checkpoint-streams",
            "a container that is written down and ended goes on elsewhere, and of what it says and is told not a byte is \
             lost or comes twice",
            streams,
        ),
        test(
            "task.checkpoint-forks",
            "one that goes on when it was written down notices nothing, and two that come from it do not notice each \
             other",
            forks,
        ),
        test(
            "task.checkpoint-ctr",
            "ctr writes a container down with its files, and brings it back: processes, timers, open and removed files, \
             sockets with something in them",
            by_ctr,
        ),
        test("task.checkpoint-terminal", "a terminal goes on with its size and what was typed", terminal),
        test(
            "task.checkpoint-refused",
            "a container that does not run is not written down, and one does not go on as what it was not",
            refused,
        ),
        test(
            "task.checkpoint-no-space",
            "where there is no space for what a container goes on with its client is told, and nothing stays of it",
            no_space,
        ),
    ]
}

/// More than there is room for on the way.
const MANY: u32 = 60_000;

/// Lines that it is told while it does not listen: more than its pipe and the guest's sockets take without being asked
/// to.
const TOLD: u32 = 36_000;
const LAST: &str = "the last line\n";

/// Says a lot, and then repeats what it is told.
fn script() -> String {
    format!("seq 1 {MANY}; cat; echo end >&2; exit 7")
}

fn numbered(word: &str, lines: u32) -> String {
    (1..=lines).flat_map(|number| [word.to_owned(), number.to_string(), "\n".to_owned()]).collect()
}

fn told() -> String {
    numbered("told ", TOLD)
}

fn said() -> String {
    numbered("", MANY) + &told() + LAST
}

fn started<'a>(ctx: &Ctx<'_, Inside>, api: &'a Api) -> Result<(Piped<'a>, Vec<u8>)> {
    let script = script();
    let mut task = Piped::new(ctx, api, OURS, &["sh", "-c", &script], |_| {})?;
    task.container.start()?;
    let shown = task.stdout.read_until("\n5000\n", A_WHILE)?;
    task.stdin.write(told().as_bytes())?;
    Ok((task, shown))
}

/// Tells it one line more, and returns what it said after it was made.
fn ended(task: Piped<'_>) -> Result<String> {
    let Piped { mut container, mut stdin, mut stdout, mut stderr, .. } = task;
    stdin.write(LAST.as_bytes())?;
    drop(stdin);
    container.close_stdin()?;
    let shown = stdout.read_to_end(A_WHILE)?;
    let errors = stderr.read_to_end(A_WHILE)?;
    let code = container.wait(A_WHILE)?;
    let errors = String::from_utf8_lossy(&errors).into_owned();
    ensure!(code == 7 && errors == "end\n", "it ended with {code} and said {errors:?}");
    ensure!(container.delete_task()? == code, "Wait says {code}, and Delete another");
    container.delete()?;
    Ok(String::from_utf8_lossy(&shown).into_owned())
}

fn same(shown: &str, expected: &str) -> Result<()> {
    let wrong = shown.lines().zip(expected.lines()).find(|(shown, expected)| shown != expected);
    ensure!(
        shown == expected,
        "of {} bytes {} came; the first wrong line is {wrong:?}",
        expected.len(),
        shown.len()
    );
    Ok(())
}

fn streams(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let (mut first, mut shown) = started(ctx, &api)?;
    other(ctx, &first.id, &["--detach"], "sleep 2; seq 1 100000")?;
    let checkpoint = first.container.checkpoint(true)?;
    ctx.note(format!("the checkpoint has {} KiB", checkpoint.size() >> 10));
    shown.extend(first.stdout.read_to_end(A_WHILE)?);
    let code = first.container.wait(A_WHILE)?;
    ensure!(code == 137, "a container that is to end ended with {code}");
    let second = Piped::from(ctx, &api, &checkpoint, new_id(ctx, OURS), &["sh", "-c", &script()], |_| {})?;
    let status = second.container.status()?;
    ensure!(status == Some("CREATED"), "before it is started it is {status:?}");
    second.container.start()?;
    // What nobody knows any more is read, and its name is free when it has ended.
    let id = second.id.clone();
    until("another process to end", A_WHILE, || match other(ctx, &id, &[], "true") {
        Ok(()) => Attempt::Done(()),
        Err(error) => Attempt::Pending(format!("{error:#}")),
    })?;
    let before = String::from_utf8_lossy(&shown).into_owned();
    let after = ended(second)?;
    same(&(before + &after), &said())?;
    drop(checkpoint);
    first.end(code)?;
    Ok(Outcome::Passed)
}

/// Runs a process beside a container's own, always of the same name.
fn other(ctx: &Ctx<'_, Inside>, id: &str, how: &[&str], script: &str) -> Result<()> {
    let fifos = ctx.path(&format!("{id}-other")).display().to_string();
    let words =
        [&["task", "exec", "--exec-id", "other", "--fifo-dir", &fifos][..], how, &[id, "sh", "-c", script]];
    ctx.world.ctr().with(ctx.cmd("ctr"), words.concat()).ok().map(drop)?;
    Ok(())
}

fn fork<'a>(ctx: &Ctx<'_, Inside>, api: &'a Api, checkpoint: &Checkpoint<'_>) -> Result<Piped<'a>> {
    let task = Piped::from(ctx, api, checkpoint, new_id(ctx, OURS), &["sh", "-c", &script()], |_| {})?;
    task.container.start()?;
    Ok(task)
}

fn forks(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let (api, other) = (ctx.world.api()?, ctx.world.api()?);
    let (first, shown) = started(ctx, &api)?;
    let expected = said();
    {
        let checkpoint = first.container.checkpoint(false)?;
        let (one, two) = (fork(ctx, &other, &checkpoint)?, fork(ctx, &other, &checkpoint)?);
        for task in [two, one] {
            let after = ended(task)?;
            // It goes on with a line of its own, unless it had said all.
            let begins = expected.find(&after[..after.len().min(100)]).unwrap_or(0);
            ensure!(begins > 0, "a fork begins with {:?}", super::head(&after));
            same(&(expected[..begins].to_owned() + &after), &expected).context("what a fork said")?;
        }
    }
    let before = String::from_utf8_lossy(&shown).into_owned();
    same(&(before + &ended(first)?), &expected)?;
    Ok(Outcome::Passed)
}

/// Does a little of everything, and notes how far it is. What was removed is still open.
const BUSY: &str = "echo in memory >/removed; exec 5<>/removed; rm /removed; cd /tmp
    mkfifo /tmp/pipe; exec 6<>/tmp/pipe; echo in the pipe >&6
    (while :; do echo $((n+=1)) >/tmp/timer; sleep 0.2; done) &
    echo ready >/tmp/ready
    while :; do
        if [ -e /tmp/ask ]; then
            rm /tmp/ask; read line <&6; cat /proc/self/fd/5 >/tmp/old; echo more >&5
            echo $line $PWD $(cat /tmp/old) >/tmp/answer
        fi
        sleep 0.1
    done";

fn by_ctr(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let id = new_id(ctx, OURS);
    let (one, two) = (format!("{id}-one"), format!("{id}-two"));
    let image = format!("checkpoint/{id}:1");
    let remove = || ctx.world.ctr().with(ctx.cmd("ctr"), ["image", "rm", "--sync", &image]).run();
    let done = ctx.world.with_container(&id, || {
        ctx.world.with_container(&one, || {
            ctx.world.with_container(&two, || {
                round_trip(ctx, &id, &[one.as_str(), two.as_str()][..ctx.either(1, 2)], &image)
            })
        })
    });
    remove()?;
    done.map(|()| Outcome::Passed)
}

fn round_trip(ctx: &Ctx<'_, Inside>, id: &str, forks: &[&str], image: &str) -> Result<()> {
    let ctr = ctx.world.ctr();
    let ok = |words: &[&str]| -> Result<String> {
        Ok(ctr.with(ctx.cmd("ctr").deadline(Duration::from_mins(3)), words).ok()?.out().into_owned())
    };
    let cat = |id: &str, path: &str| -> Result<String> {
        let done = ctr.with(ctx.cmd("ctr"), ["task", "exec", "--exec-id", "look", id, "cat", path]).run()?;
        Ok(done.out().into_owned())
    };
    let number = |id: &str| -> Result<u32> {
        let end = Instant::now() + A_WHILE;
        loop {
            let text = cat(id, "/tmp/timer")?;
            // Between the opening of the file and the writing it is empty.
            match text.trim().parse() {
                Ok(number) => return Ok(number),
                Err(_) => ensure!(Instant::now() < end, "the timer of {id} says {text:?}"),
            }
        }
    };
    let wait_for = |what: &str, holds: &dyn Fn() -> Result<bool>| -> Result<()> {
        let end = Instant::now() + A_WHILE;
        while !holds()? {
            ensure!(Instant::now() < end, "{what} took too long");
            thread::sleep(Duration::from_millis(200));
        }
        Ok(())
    };
    ok(&["run", "-d", "--runtime", OURS, &ctr.image, id, "sh", "-c", BUSY])?;
    wait_for("getting ready", &|| Ok(cat(id, "/tmp/ready")? == "ready\n"))?;
    let before = number(id)?;
    ok(&["container", "checkpoint", "--rw", "--image", "--task", id, image])?;
    let saved = number(id)?;
    wait_for("going on", &|| Ok(number(id)? > saved + 2))?;
    for &fork in forks {
        ok(&["container", "restore", "--rw", "--live", fork, image])?;
    }
    for &fork in forks {
        let first = number(fork)?;
        ensure!(first >= before, "the timer of {fork} begins with {first}, and it was at {before} already");
        wait_for("going on after a restore", &|| Ok(number(fork)? > first + 2))?;
        ok(&["task", "exec", "--exec-id", "ask", fork, "touch", "/tmp/ask"])?;
        let answer = "in the pipe /tmp in memory\n";
        wait_for("answering", &|| Ok(cat(fork, "/tmp/answer")?.len() == answer.len()))?;
        let said = cat(fork, "/tmp/answer")?;
        ensure!(said == answer, "{fork} answered {said:?}");
    }
    ensure!(!cat(id, "/tmp/answer")?.contains("pipe"), "what forks do is seen where they come from");
    for id in forks.iter().chain([&id]) {
        ok(&["task", "rm", "--force", id])?;
        ok(&["container", "rm", id])?;
    }
    Ok(())
}

fn no_space(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let process = ["sleep", "1000"];
    let source = Piped::new(ctx, &api, OURS, &process, |_| {})?;
    source.container.start()?;
    {
        let checkpoint = source.container.checkpoint(true)?;
        let store = ctx.path("store");
        let _on = Configured::with(&format!("[template]\ndirectory = \"{}\"\n", store.display()))?;
        for size in ["4k", "1m", "24m"] {
            let small = Small::mount(&store, &format!("mode=700,size={size}"))?;
            let made = Piped::from(ctx, &api, &checkpoint, new_id(ctx, OURS), &process, |_| {});
            let refused = made.err().map_or_else(|| "taken".to_owned(), |error| format!("{error:#}"));
            let left: Vec<_> = std::fs::read_dir(&store)?.flatten().map(|entry| entry.file_name()).collect();
            drop(small);
            ctx.note(format!("{size}: {refused}, {left:?}"));
            ensure!(refused.contains("No space left on device"), "with {size} it says {refused:?}");
            let whole = left.iter().any(|name| !name.to_string_lossy().contains('.'));
            ensure!(!whole && !left.iter().any(|name| name.to_string_lossy().ends_with(".new")), "{left:?}");
        }
        // With enough of it, the same checkpoint does.
        let task = Piped::from(ctx, &api, &checkpoint, new_id(ctx, OURS), &process, |_| {})?;
        task.container.start()?;
        task.container.kill(9)?;
        let code = task.container.wait(A_WHILE)?;
        task.end(code)?;
    }
    let code = source.container.wait(A_WHILE)?;
    source.end(code)?;
    Ok(Outcome::Passed)
}

fn terminal(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let on_terminal = |spec: &mut serde_json::Value| spec["process"]["terminal"] = json!(true);
    let process = ["sh", "-c", "read a; stty size; read b; echo $a and $b; stty size; exit 4"];
    let mut first = Piped::new(ctx, &api, OURS, &process, on_terminal)?;
    first.container.start()?;
    first.container.resize((91, 27))?;
    first.stdin.write(b"one\n")?;
    first.stdout.read_until("27 91", A_WHILE)?;
    first.stdin.write(b"half")?;
    first.stdout.read_until("half", A_WHILE)?;
    let checkpoint = first.container.checkpoint(true)?;
    let code = first.container.wait(A_WHILE)?;
    let mut second = Piped::from(ctx, &api, &checkpoint, new_id(ctx, OURS), &process, on_terminal)?;
    second.container.start()?;
    second.stdin.write(b" of two\n")?;
    let shown = String::from_utf8_lossy(&second.stdout.read_to_end(A_WHILE)?).into_owned();
    let ended = second.container.wait(A_WHILE)?;
    ensure!(
        ended == 4 && shown.contains("one and half of two") && shown.contains("27 91"),
        "it ended with {ended} and said {shown:?}"
    );
    second.end(ended)?;
    drop(checkpoint);
    first.end(code)?;
    Ok(Outcome::Passed)
}

fn refused(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let task = Piped::new(ctx, &api, OURS, &["sleep", "1000"], |_| {})?;
    let code = |result: Result<Checkpoint<'_>>| match result {
        Ok(_) => "taken".to_owned(),
        Err(error) => {
            refusal(&error).map_or_else(|| format!("{error:#}"), |(code, text)| format!("{code}: {text}"))
        }
    };
    let early = code(task.container.checkpoint(false));
    ensure!(early.starts_with("FailedPrecondition"), "before its start: {early}");
    task.container.start()?;
    {
        let checkpoint = task.container.checkpoint(false)?;
        let other = |edit: &dyn Fn(&mut serde_json::Value)| {
            let made =
                Piped::from(ctx, &api, &checkpoint, new_id(ctx, OURS), &["sleep", "1000"], |spec| edit(spec));
            made.err().map_or_else(|| "taken".to_owned(), |error| format!("{error:#}"))
        };
        let bound = other(&|spec| {
            let mounts = spec["mounts"].as_array_mut().expect("mounts");
            mounts.push(
                json!({ "destination": "/data", "type": "bind", "source": "/etc", "options": ["rbind"] }),
            );
        });
        ensure!(bound.contains("/data"), "with another mount: {bound}");
        let typed = other(&|spec| spec["process"]["terminal"] = json!(true));
        ensure!(typed.contains("terminal"), "with a terminal: {typed}");
        let pod = other(&|spec| {
            spec["annotations"] = json!({ "io.kubernetes.cri.container-type": "sandbox" });
        });
        ensure!(pod.contains("those of a pod"), "as the sandbox of a pod: {pod}");
        // One that is not started goes as any other.
        for signal in [None, Some(9)] {
            let id = new_id(ctx, OURS);
            let mut waiting = Piped::from(ctx, &api, &checkpoint, id, &["sleep", "1000"], |_| {})?;
            if let Some(signal) = signal {
                waiting.container.kill(signal)?;
                let code = waiting.container.wait(A_WHILE)?;
                ensure!(code == 137, "killed before its start it ended with {code}");
            }
            waiting.container.delete_task()?;
            waiting.container.delete()?;
        }
    }
    // One that stands still already stays so.
    task.container.pause()?;
    drop(task.container.checkpoint(false)?);
    let status = task.container.status()?;
    ensure!(status == Some("PAUSED"), "after a checkpoint it is {status:?}");
    task.container.resume()?;
    task.container.kill(9)?;
    let ended = task.container.wait(A_WHILE)?;
    let late = code(task.container.checkpoint(false));
    ensure!(late.starts_with("FailedPrecondition"), "after its end: {late}");
    task.end(ended)?;
    Ok(Outcome::Passed)
}
