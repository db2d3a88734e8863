//! A service that takes its time to start: until it answers, from its beginning with runc, and from where another one was
//! warm with ours.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration::command::Cmd;
use integration::container_time::{Service, Side};
use integration::containerd::{Api, NewContainer, Stdio};
use integration::fifo::{Input, Output};
use integration::wait::{Attempt, until};
use serde_json::Value;

use crate::life::runtime;
use crate::{Bench, STEP};

/// It works before it answers, as interpreters do that read their programs.
const SCRIPT: &str = "i=0; while [ $i -lt 100000 ]; do i=$((i + 1)); done; echo ready
    while read line; do echo answer $line; done";
const READY: &str = "ready\n";
const ANSWER: &str = "answer 1\n";

/// Has each start once. Before the first round there is no warm one: that of ours becomes it then.
pub fn start(bench: &Bench, api: &Api, number: u32) -> Result<Service> {
    let mut sides = [Side::Ours, Side::Runc];
    sides.rotate_left(number as usize % 2);
    let (mut ours, mut runc) = (0.0, 0.0);
    for side in sides {
        let time = answer(bench, api, side, number).with_context(|| format!("a service, {}", side.name()))?;
        if side == Side::Ours { ours = time } else { runc = time }
    }
    Ok(Service { ours, runc })
}

fn answer(bench: &Bench, api: &Api, side: Side, number: u32) -> Result<f64> {
    let id = format!("bench-{number}-service-{}", side.name());
    let process = ["sh", "-c", SCRIPT];
    let new = NewContainer { id: &id, image: &bench.host.image, runtime: runtime(side), process: &process };
    let mut container =
        api.create_with(&new, |spec| spec["annotations"]["dev.supermachine.warm"] = "log:^ready$".into())?;
    let mut stdin = Input::create(bench.host.path(&format!("{id}-stdin")))?;
    let mut stdout = Output::create(bench.host.path(&format!("{id}-stdout")))?;
    let stderr = Output::create(bench.host.path(&format!("{id}-stderr")))?;
    let stdio = Stdio {
        stdin: Some(stdin.path().to_owned()),
        stdout: stdout.path().to_owned(),
        stderr: stderr.path().to_owned(),
    };
    let begun = Instant::now();
    container.create_task(&stdio)?;
    container.start()?;
    stdout.read_until(READY, STEP + STEP)?;
    if side == Side::Ours && number == 0 {
        // What is kept is kept before anybody tells it something.
        Cmd::new("supermachine", STEP).args(["warm", "build", &id]).ok()?;
    }
    stdin.write(b"1\n")?;
    stdout.read_until(ANSWER, STEP)?;
    let time = begun.elapsed().as_secs_f64();
    if side == Side::Ours {
        let machines = u64::from(number > 0);
        kept(STEP, |one| one["machines"] == machines).context("looking for the warm container")?;
    }
    container.kill(9)?;
    let code = container.wait(STEP)?;
    container.delete_task()?;
    container.delete()?;
    ensure!(code == 137, "killed, it ended with {code}");
    Ok(time)
}

/// Waits until there is one warm container that is so.
fn kept(within: Duration, is: impl Fn(&Value) -> bool) -> Result<()> {
    let listed = || -> Result<Vec<Value>> {
        let told = Cmd::new("supermachine", STEP).args(["warm", "ls", "--json"]).ok()?;
        serde_json::from_slice(&told.stdout).context("reading the list of warm containers")
    };
    until("a warm container", within, || match listed() {
        Ok(all) if all.len() == 1 && is(&all[0]) => Attempt::Done(()),
        Ok(all) => Attempt::Pending(format!("there are {all:?}")),
        Err(error) => Attempt::Pending(format!("{error:#}")),
    })?;
    Ok(())
}
