//! What `ctr task` does with a container that runs: other processes in it, standing still, usage, signals.

use anyhow::{Result, ensure};
use integration::command::Finished;
use integration::{Ctx, Outcome, Test};

use super::{A_WHILE, OURS, Piped, test};
use crate::world::{Inside, RUNC};

pub fn tests() -> Vec<Test<Inside>> {
    vec![
        test(
            "task.exec",
            "other processes in a container have the output, the codes and the errors that they have with runc",
            exec,
        ),
        test(
            "task.orders",
            "a container stands still and goes on, tells what it uses, takes signals, and is not deleted while it runs",
            orders,
        ),
        test("task.together", "three containers that are made at once all do what they are for", together),
    ]
}

const READY: &str = "trap 'exit 5' TERM; echo ready; while :; do sleep 0.1; done";

fn exec(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let processes: [(&str, &[&str], Option<i32>); 5] = [
        ("codes", &["sh", "-c", "exit 42"], Some(42)),
        ("streams", &["sh", "-c", "echo out; echo err >&2; pwd; id -u; grep Cap /proc/self/status"], Some(0)),
        ("input", &["head", "-n", "2"], Some(0)),
        ("killed", &["sh", "-c", "kill -9 $$"], Some(137)),
        ("nothing", &["no-such-program"], None),
    ];
    let mut outcomes = Vec::new();
    for runtime in [RUNC, OURS] {
        let mut task = Piped::new(ctx, &api, runtime, &["sh", "-c", READY], |_| {})?;
        task.container.start()?;
        task.stdout.read_until("ready", A_WHILE)?;
        for (name, process, code) in processes {
            let arguments =
                ["task", "exec", "--exec-id", name, &task.id].into_iter().chain(process.iter().copied());
            let done = ctx.world.ctr().with(ctx.cmd("ctr"), arguments).stdin("one\ntwo\nthree\n").run()?;
            match code {
                Some(code) => ensure!(done.code() == Some(code), "{runtime}, {name}: {:?}", done.code()),
                None => ensure!(
                    done.code() != Some(0) && done.err().contains("executable file not found in $PATH"),
                    "{runtime}, {name}: {:?} {:?}",
                    done.code(),
                    done.err()
                ),
            }
            outcomes.push((name, done.out().into_owned()));
        }
        task.container.kill(9)?;
        let code = task.container.wait(A_WHILE)?;
        task.end(code)?;
    }
    let (theirs, ours) = outcomes.split_at(processes.len());
    ensure!(theirs == ours, "they say {ours:?}, with runc {theirs:?}");
    Ok(Outcome::Passed)
}

fn orders(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    for runtime in [RUNC, OURS] {
        let mut task = Piped::new(ctx, &api, runtime, &["sh", "-c", READY], |_| {})?;
        task.container.start()?;
        task.stdout.read_until("ready", A_WHILE)?;
        let ctr = |arguments: &[&str]| -> Result<Finished> {
            Ok(ctx.world.ctr().with(ctx.cmd("ctr"), [&["task"], arguments].concat()).run()?)
        };
        let is = |state: &str| -> Result<()> {
            let list = ctr(&["ls"])?;
            let of_it =
                list.out().lines().find(|line| line.contains(&task.id)).unwrap_or_default().to_owned();
            let words: Vec<_> = of_it.split_whitespace().skip(1).collect();
            ensure!(words == [task.pid.to_string().as_str(), state], "{runtime}: {of_it:?} is not {state}");
            Ok(())
        };
        is("RUNNING")?;
        ensure!(ctr(&["rm", &task.id])?.code() != Some(0), "{runtime}: it was deleted while it ran");
        ensure!(ctr(&["pause", &task.id])?.code() == Some(0), "{runtime}: it was not paused");
        is("PAUSED")?;
        ensure!(ctr(&["resume", &task.id])?.code() == Some(0), "{runtime}: it was not resumed");
        is("RUNNING")?;
        let metrics = ctr(&["metrics", &task.id])?;
        ensure!(metrics.out().contains("pids.current"), "{runtime}: the metrics are {:?}", metrics.out());
        let processes = ctr(&["ps", &task.id])?;
        let first =
            processes.out().lines().nth(1).unwrap_or_default().split_whitespace().next().map(str::to_owned);
        ensure!(first == Some(task.pid.to_string()), "{runtime}: the processes are {:?}", processes.out());
        task.container.kill(15)?;
        let code = task.container.wait(A_WHILE)?;
        ensure!(code == 5, "{runtime}: exit code {code}");
        let again = task.container.kill(15).map_or_else(|error| format!("{error:#}"), |()| "nothing".into());
        ensure!(again.contains("NotFound"), "{runtime}: killed again it says {again}");
        is("STOPPED")?;
        task.end(code)?;
    }
    Ok(Outcome::Passed)
}

fn together(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let ids: Vec<_> = (0..3).map(|number| ctx.id(&number.to_string())).collect();
    let ctr = ctx.world.ctr();
    let mut running = Vec::new();
    for id in &ids {
        let command = ctr.run(ctx.cmd("ctr"), OURS, id, &["sh", "-c", "hostname >&2; exit 3"]);
        running.push(command.start()?);
    }
    let done: Result<Vec<_>, _> = running.into_iter().map(|running| running.wait()?.expect_code(3)).collect();
    if let Err(error) = done {
        let api = ctx.world.api()?;
        ids.iter().try_for_each(|id| api.purge(id))?;
        return Err(error.into());
    }
    Ok(Outcome::Passed)
}
