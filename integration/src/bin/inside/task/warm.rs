//! Containers that start from one that was warm: what took that one its time is done already, and all else is their own.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use integration::wait::{Attempt, until};
use integration::{Ctx, Outcome, Rounds, Test, pattern};
use serde_json::{Value, json};

use super::broken::Small;
use super::ended::kill_hard;
use super::events::Events;
use super::files::{add, bind};
use super::midway::{Victim, find, gone, settled};
use super::template::{Configured, annotate};
use super::{A_WHILE, OURS, Piped, new_id, test};
use crate::world::Inside;

pub fn tests() -> Vec<Test<Inside>> {
    vec![
        test(
            "task.warm",
            "a container starts where one of its image and configuration was warm, with a name, secrets, files and random \
             numbers of its own",
            service,
        ),
        test(
            "task.warm-when",
            "a container is warm when its annotation says, and not when it does not get there",
            when,
        ),
        test(
            "task.warm-spoilt",
            "where a warm container cannot be started from, one starts as any other, and has none of its files",
            spoilt,
        ),
        test(
            "task.warm-full",
            "where there is no space for a template or for a warm container, containers run all the same, and nothing half \
             there stays",
            full,
        ),
        Test {
            rounds: Rounds::once_or(10),
            ..test(
                "task.warm-midway",
                "where monitor or shim are killed while a warm container is kept, or another one starts from it, nothing is \
                 stuck or half there",
                midway,
            )
        },
    ]
}

/// Templates and warm containers of a test's own, which go with it.
struct Store {
    directory: PathBuf,
    _on: Configured,
}

impl Store {
    fn new(ctx: &Ctx<'_, Inside>) -> Result<Self> {
        let directory = ctx.path("templates");
        let text = format!("[vm]\nboot = \"restore\"\n[template]\ndirectory = \"{}\"\n", directory.display());
        Ok(Self { _on: Configured::with(&text)?, directory })
    }
}

fn listed(ctx: &Ctx<'_, Inside>) -> Result<Vec<Value>> {
    Ok(serde_json::from_str(&ctx.cmd("supermachine").args(["warm", "ls", "--json"]).ok()?.out())?)
}

/// The entry that a container has left.
fn kept(ctx: &Ctx<'_, Inside>, id: &str) -> Result<Value> {
    Ok(until("a container to be kept", A_WHILE, || match listed(ctx) {
        Ok(all) => match all.iter().find(|one| one["container"] == id) {
            Some(one) => Attempt::Done(one.clone()),
            None => Attempt::Pending(format!("{all:?}")),
        },
        Err(error) => Attempt::Pending(format!("{error:#}")),
    })?)
}

fn logged(ctx: &Ctx<'_, Inside>, id: &str, text: &str) -> Result<()> {
    until("a shim to log something", A_WHILE, || match ctx.cmd("supermachine").args(["logs", id]).ok() {
        Ok(log) if log.out().contains(text) => Attempt::Done(()),
        Ok(log) => Attempt::Pending(log.out().into_owned()),
        Err(error) => Attempt::Pending(format!("{error:#}")),
    })?;
    Ok(())
}

/// It begins slowly, and then answers each line with what it is and has.
const SERVICE: &str =
    "echo starting; echo a warning >&2; mine=$(cat /proc/sys/kernel/random/uuid); echo old >/state
    echo gone >/removed; exec 5</removed; rm /removed; mkdir -p /data/deep; ln -s deep /data/link
    sleep 2; echo ready; n=0
    while read line; do
        echo $line $((n += 1)) $(hostname) $(cat /secret/word /state) $(ls -d /data/link/. /own 2>/dev/null)
        echo mine $mine; echo fresh $(cat /proc/sys/kernel/random/uuid); echo $line >/own; echo done
    done; exit 5";

struct Answer {
    first: String,
    mine: String,
    fresh: String,
}

fn ask(task: &mut Piped<'_>, word: &str) -> Result<Answer> {
    task.stdin.write(format!("{word}\n").as_bytes())?;
    let text = String::from_utf8_lossy(&task.stdout.read_until("done\n", A_WHILE)?).into_owned();
    let line = |name: &str| -> Result<String> {
        let found = text.lines().find_map(|line| line.strip_prefix(name));
        Ok(found.with_context(|| text.clone())?.to_owned())
    };
    Ok(Answer { first: line(word)?, mine: line("mine ")?, fresh: line("fresh ")? })
}

fn service(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let store = Store::new(ctx)?;
    let make = |name: &str, env: &str| -> Result<Piped<'_>> {
        let secret = ctx.path(&format!("secret-{name}"));
        fs::create_dir_all(&secret)?;
        fs::write(secret.join("word"), format!("{name}\n"))?;
        let mut task = Piped::new(ctx, &api, OURS, &["sh", "-c", SERVICE], |spec| {
            annotate(spec, "warm", "log:^ready$");
            spec["hostname"] = json!(name);
            if let Some(all) = spec["process"]["env"].as_array_mut() {
                all.extend([json!(format!("HOSTNAME={name}")), json!(format!("MODE={env}"))]);
            }
            add(spec, [bind(&secret, "/secret", &["rbind", "ro"])]);
        })?;
        task.container.start()?;
        let said = task.stdout.read_until("ready\n", A_WHILE)?;
        ensure!(said == b"starting\nready\n", "{name} said {:?}", String::from_utf8_lossy(&said));
        let warned = task.stderr.read_until("a warning\n", A_WHILE)?;
        ensure!(warned == b"a warning\n", "{name} warned {:?}", String::from_utf8_lossy(&warned));
        Ok(task)
    };
    let mut first = make("one", "a")?;
    let built = |id: &str, how: &str| -> Result<()> {
        let told = ctx.cmd("supermachine").args(["warm", "build", id]).ok()?;
        ensure!(told.out().contains(&format!("{id} {how} ")), "it was said of {id}: {}", told.out());
        Ok(())
    };
    built(&first.id, "is kept as")?;
    let entry = kept(ctx, &first.id)?;
    // Of its memory no more is kept than it has changed.
    let key = entry["key"].as_str().context("a key")?;
    let [own, base] = ["memory", "base"].map(|name| fs::metadata(store.directory.join(key).join(name)));
    let (own, base) = (own?, base?);
    ensure!(base.nlink() == 2, "its base is no link to the memory of its template");
    ctx.note(format!("{} KiB of its own over {} KiB", own.blocks() / 2, base.blocks() / 2));
    ensure!(own.blocks() < base.blocks(), "it has {} blocks over {}", own.blocks(), base.blocks());
    ctx.cmd("supermachine").args(["snapshot", "verify", key]).ok()?;
    ensure!(entry["when"] == "log:^ready$" && entry["machines"] == 0, "{entry}");
    let one = ask(&mut first, "a")?;
    ensure!(one.first == " 1 one one old /data/link/.", "the first answered {:?}", one.first);

    let mut second = make("two", "a")?;
    let mut third = make("three", "a")?;
    built(&second.id, "has started from")?;
    let (two, three) = (ask(&mut second, "b")?, ask(&mut third, "c")?);
    ensure!(two.first == " 1 two two old /data/link/.", "the second answered {:?}", two.first);
    ensure!(three.first == " 1 three three old /data/link/.", "the third answered {:?}", three.first);
    ensure!(two.mine == one.mine && three.mine == one.mine, "they did not start from the first");
    ensure!(one.fresh != two.fresh && two.fresh != three.fresh, "they draw the same random numbers");
    let again = ask(&mut second, "d")?;
    ensure!(again.first == " 2 two two old /data/link/. /own", "then it answered {:?}", again.first);
    let entry = kept(ctx, &first.id)?;
    ensure!(entry["machines"] == 2 && listed(ctx)?.len() == 1, "{:?}", listed(ctx)?);
    logged(ctx, &first.id, "is warm, and kept as")?;

    // What is another configuration starts at its beginning, and is kept, too.
    let mut other = make("four", "b")?;
    kept(ctx, &other.id)?;
    ensure!(ask(&mut other, "e")?.mine != one.mine, "one with another environment started from the first");
    ensure!(listed(ctx)?.len() == 2, "{:?}", listed(ctx)?);

    for task in [first, second, third, other] {
        let Piped { mut container, stdin, .. } = task;
        drop(stdin);
        container.close_stdin()?;
        let code = container.wait(A_WHILE)?;
        ensure!(code == 5 && container.delete_task()? == 5, "it ended with {code}");
        container.delete()?;
    }
    ctx.cmd("supermachine").args(["warm", "rm", &key[..9]]).ok()?;
    ensure!(!store.directory.join(key).exists() && listed(ctx)?.len() == 1, "it was not removed");
    Ok(Outcome::Passed)
}

fn when(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let _store = Store::new(ctx)?;
    let script =
        "echo page >/index.html; httpd -p 8080 -h / 2>/dev/null || nc -lk -p 8080 -e cat /index.html &
        echo begun; read line; echo $line";
    let make = |when: &str| -> Result<Piped<'_>> {
        let mut task =
            Piped::new(ctx, &api, OURS, &["sh", "-c", script], |spec| annotate(spec, "warm", when))?;
        task.container.start()?;
        let said = task.stdout.read_until("begun\n", A_WHILE)?;
        ensure!(said == b"begun\n", "{when}: {:?}", String::from_utf8_lossy(&said));
        Ok(task)
    };
    let end = |mut task: Piped<'_>| -> Result<()> {
        task.stdin.write(b"bye\n")?;
        let said = task.stdout.read_until("bye\n", A_WHILE)?;
        ensure!(said == b"bye\n", "it said {:?}", String::from_utf8_lossy(&said));
        let code = task.container.wait(A_WHILE)?;
        ensure!(code == 0, "it ended with {code}");
        task.end(code)
    };
    for condition in ["created", "after:100", "listen:8080", "listen"] {
        let first = make(condition).context(condition)?;
        kept(ctx, &first.id).context(condition)?;
        let second = make(condition).context(condition)?;
        let used = listed(ctx)?;
        let used = used.iter().find(|one| one["container"] == first.id.as_str());
        ensure!(used.is_some_and(|one| one["machines"] == 1), "{condition}: {used:?}");
        end(first).context(condition)?;
        end(second).context(condition)?;
    }
    // One in which somebody had a hand.
    let mut fed = Piped::new(ctx, &api, OURS, &["sh", "-c", "read line; echo $line; sleep 1000"], |spec| {
        annotate(spec, "warm", "log:^secret$");
    })?;
    fed.container.start()?;
    fed.stdin.write(b"secret\n")?;
    logged(ctx, &fed.id, "it was sent input")?;
    let script = "until [ -e /go ]; do sleep 0.1; done; echo now; sleep 1000";
    let touched =
        Piped::new(ctx, &api, OURS, &["sh", "-c", script], |spec| annotate(spec, "warm", "log:^now$"))?;
    touched.container.start()?;
    let fifos = ctx.path("fifos").display().to_string();
    let exec = ["task", "exec", "--fifo-dir", &fifos, "--exec-id", "other", &touched.id, "touch", "/go"];
    ctx.world.ctr().with(ctx.cmd("ctr"), exec).ok()?;
    logged(ctx, &touched.id, "other processes were run in it")?;
    for task in [fed, touched] {
        task.container.kill(9)?;
        let code = task.container.wait(A_WHILE)?;
        task.end(code)?;
    }
    // One that never gets there.
    let kept_before = listed(ctx)?.len();
    for condition in ["listen:81", "log:^never$"] {
        let task = make(condition)?;
        let id = task.id.clone();
        let Piped { mut container, mut stdin, .. } = task;
        stdin.write(b"bye\n")?;
        let code = container.wait(A_WHILE)?;
        logged(ctx, &id, "it has ended before it was warm")?;
        let told = ctx.cmd("supermachine").args(["warm", "build", &id]).run()?.expect_code(1)?;
        ensure!(told.err().contains("it has ended before it was"), "it was said of {id}: {}", told.err());
        ensure!(container.delete_task()? == code, "Wait and Delete differ");
        container.delete()?;
    }
    ensure!(listed(ctx)?.len() == kept_before, "{:?}", listed(ctx)?);
    for (condition, word) in [("log:(", "regex"), ("soon", "created")] {
        let refused = Piped::new(ctx, &api, OURS, &["true"], |spec| annotate(spec, "warm", condition));
        let error = format!("{:#}", refused.err().with_context(|| format!("{condition} was taken"))?);
        ensure!(error.contains("dev.supermachine.warm") && error.contains(word), "{condition}: {error}");
    }
    Ok(Outcome::Passed)
}

fn spoilt(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let store = Store::new(ctx)?;
    let script = "ls /state 2>/dev/null; echo up; : >/state; echo ready; read line";
    let make = || -> Result<(Piped<'_>, String)> {
        let edit = |spec: &mut Value| annotate(spec, "warm", "log:ready");
        let mut task = Piped::new(ctx, &api, OURS, &["sh", "-c", script], edit)?;
        task.container.start()?;
        let said = task.stdout.read_until("ready\n", A_WHILE)?;
        Ok((task, String::from_utf8_lossy(&said).into_owned()))
    };
    let end = |mut task: Piped<'_>| -> Result<()> {
        task.stdin.write(b"\n")?;
        let code = task.container.wait(A_WHILE)?;
        task.end(code)
    };
    let (first, said) = make()?;
    ensure!(said == "up\nready\n", "the first said {said:?}");
    let entry = kept(ctx, &first.id)?;
    end(first)?;
    // Its machine cannot be restored.
    let directory = store.directory.join(entry["key"].as_str().context("a key")?);
    let state = directory.join("state");
    fs::write(&state, vec![0; usize::try_from(fs::metadata(&state)?.len())?])?;
    let (second, said) = make()?;
    ensure!(said == "up\nready\n", "with a spoilt state it said {said:?}");
    logged(ctx, &second.id, "it starts as any other")?;
    end(second)?;
    // It goes, and is not made again at once.
    ensure!(listed(ctx)?.is_empty(), "it is still there");
    let (third, said) = make()?;
    ensure!(said == "up\nready\n", "without a warm one it said {said:?}");
    logged(ctx, &third.id, "nobody starts from it: that has failed a little while ago")?;
    end(third)?;
    fs::remove_file(directory.with_extension("failed"))?;
    let (fourth, _) = make()?;
    kept(ctx, &fourth.id)?;
    end(fourth)?;
    // What goes beside it is gone.
    fs::remove_file(directory.join("container.json"))?;
    let (third, said) = make()?;
    ensure!(said == "up\nready\n", "without a description it said {said:?}");
    kept(ctx, &third.id)?;

    // A task that comes after another one, in the same container, goes on with its files.
    let id = third.id.clone();
    let ctr = ctx.world.ctr();
    ctr.with(ctx.cmd("ctr"), ["task", "rm", "--force", &id]).ok()?;
    let started = ctr.with(ctx.cmd("ctr").deadline(A_WHILE).stdin("x\n"), ["task", "start", &id]).ok()?;
    let said = started.out().into_owned();
    ensure!(said == "/state\nup\nready\n", "the second task of a container said {said:?}");
    third.container.delete()?;
    Ok(Outcome::Passed)
}

fn full(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let store = Store::new(ctx)?;
    let crowded = |small: Small<'_>, why: &str, templates: usize| -> Result<()> {
        let mut task =
            Piped::new(ctx, &api, OURS, &["sh", "-c", SLOW], |spec| annotate(spec, "warm", "log:^ready$"))?;
        task.container.start()?;
        logged(ctx, &task.id, why)?;
        logged(ctx, &task.id, "No space left on device")?;
        task.stdin.write(b"well\n")?;
        let said = task.stdout.read_until("well a\n", A_WHILE)?;
        ensure!(said == b"ready\nwell a\n", "it said {:?}", String::from_utf8_lossy(&said));
        task.container.kill(9)?;
        let code = task.container.wait(A_WHILE)?;
        task.end(code)?;
        let left = fs::read_dir(&store.directory)?.flatten().map(|entry| entry.file_name());
        let left: Vec<_> = left.map(|name| name.to_string_lossy().into_owned()).collect();
        drop(small);
        let whole = left.iter().filter(|name| !name.contains('.')).count();
        ensure!(whole == templates && !left.iter().any(|name| name.contains(".new")), "there is {left:?}");
        Ok(())
    };
    // For the first pages of a template, and for a part of it.
    for size in ["4k", "32m"] {
        let small = Small::mount(&store.directory, &format!("mode=700,size={size}"))?;
        crowded(small, "its machine boots", 0).with_context(|| format!("with {size}"))?;
    }
    // For one, but for little beside it: less than a machine then uses of memory in which the template has nothing.
    let small = Small::mount(&store.directory, "mode=700,size=1g")?;
    let other = Piped::new(ctx, &api, OURS, &["true"], |_| {})?;
    other.container.start()?;
    let code = other.container.wait(A_WHILE)?;
    other.end(code)?;
    small.fill(4 << 20)?;
    crowded(small, "nobody starts from it", 1).context("with a template and little beside it")?;
    Ok(Outcome::Passed)
}

/// It has taken its time when it answers.
const SLOW: &str =
    "echo a >/state; sleep 0.5; echo ready; while read line; do echo $line $(cat /state); done";

fn midway(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let (api, events) = (ctx.world.api()?, Events::listen(ctx)?);
    let _store = Store::new(ctx)?;
    let mut delays = pattern::sizes(u64::from(ctx.round) * 5 + 1, 3000);
    let named = |id: String| {
        let edit = |spec: &mut Value| annotate(spec, "warm", "log:^ready$");
        Piped::named(ctx, &api, OURS, id, &["sh", "-c", SLOW], edit)
    };
    // That it works, whatever was left by those before it.
    let works = || -> Result<()> {
        let mut task = named(new_id(ctx, OURS))?;
        task.container.start()?;
        task.stdout.read_until("ready\n", A_WHILE)?;
        until("somebody to be kept", A_WHILE, || match listed(ctx) {
            Ok(all) if all.len() == 1 => Attempt::Done(()),
            other => Attempt::Pending(format!("{other:?}")),
        })?;
        task.stdin.write(b"well\n")?;
        let said = task.stdout.read_until("\n", A_WHILE)?;
        ensure!(said == b"well a\n", "it said {:?}", String::from_utf8_lossy(&said));
        task.container.kill(9)?;
        let code = task.container.wait(A_WHILE)?;
        task.end(code)
    };
    for victim in [Victim::Monitor, Victim::Shim] {
        let delay = Duration::from_millis(delays() as u64);
        let mut task = named(new_id(ctx, OURS))?;
        task.container.start()?;
        task.stdout.read_until("ready\n", A_WHILE)?;
        let found = find(victim, &task.id)?.context("a victim")?;
        thread::sleep(delay);
        kill_hard(&found)?;
        let what = || format!("killed {} ms after it was warm", delay.as_millis());
        settled(ctx, &api, &events, victim, task.container).with_context(what)?;
        works().with_context(what)?;

        let (id, delay) = (new_id(ctx, OURS), Duration::from_millis(delays() as u64 / 3));
        let what = || format!("killed {} ms after Create had begun", delay.as_millis());
        let made = thread::scope(|scope| {
            let striking = scope.spawn(|| -> Result<()> {
                let found = find(victim, &id)?.context("a victim")?;
                thread::sleep(delay);
                kill_hard(&found)
            });
            let made = named(id.clone());
            striking.join().map_err(|_| anyhow!("the striker broke"))?.map(|()| made)
        });
        match made.with_context(what)? {
            Ok(task) => {
                // It may have been made all the same, as any other.
                let _ = task.container.kill(9);
                settled(ctx, &api, &events, victim, task.container).with_context(what)?;
            }
            Err(error) => {
                ctx.note(format!("{}: {error:#}", what()));
                gone(&api, ctx, &id)?;
            }
        }
        works().with_context(what)?;
    }
    Ok(Outcome::Passed)
}
