//! What a container may use, and what it uses; and containers side by side.

use std::time::{Duration, Instant};

use agent_api::agent::event::What;
use agent_api::agent::{ContainerRequest, Status, UpdateRequest};
use anyhow::{Context, Result, ensure};
use integration::agent::{CALL, Container, Machine, Streams, config};
use integration::{Ctx, Outcome, Rounds, Test};
use serde_json::{Value, json};

use super::machine;
use crate::world::Inside;

pub fn tests() -> Vec<Test<Inside>> {
    vec![
        Test {
            name: "agent.limits",
            proves: "memory, processes and time are limited; whoever is killed for memory is told of before the exit; a \
                     pause stands still; limits change; usage is counted",
            run,
            deadline: Duration::from_mins(10),
            rounds: Rounds::once_or(5),
            tags: &[],
        },
        Test {
            name: "agent.side-by-side",
            proves: "a container that floods, forks or leaves zombies takes nothing from the one beside it, nor from \
                     the agent",
            run: side_by_side,
            deadline: Duration::from_mins(10),
            rounds: Rounds::once_or(5),
            tags: &[],
        },
    ]
}

fn container_request(id: &str) -> ContainerRequest {
    let mut request = ContainerRequest::new();
    request.id.push_str(id);
    request
}

fn run(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let machine = machine(ctx)?;
    hog(&machine).context("a memory hog")?;
    fork_bomb(&machine).context("a fork bomb")?;
    standing_still(&machine).context("a pause")?;
    changing(&machine).context("an update")?;
    read_only(&machine).context("a read-only root")?;
    machine.ends_well()?;
    Ok(Outcome::Passed)
}

fn limited(id: &str, argv: &[&str], resources: &Value) -> Value {
    let mut config = config(id, argv);
    config["linux"]["resources"] = resources.clone();
    config
}

fn hog(machine: &Machine) -> Result<()> {
    let resources = json!({ "memory": { "limit": 32 << 20, "swap": 32 << 20 } });
    // A file system in memory counts like any other memory.
    let hog = limited("hog", &["sh", "-c", "exec tail /dev/zero"], &resources);
    let container = Container::create(machine, "hog", &hog, Streams::default())?;
    let output = container.run(CALL * 2)?;
    ensure!(output.status() == 137, "{output:?}");
    let events = machine.events(CALL)?;
    let kinds: Vec<_> = events.iter().map(|event| matches!(event.what, Some(What::Oom(_)))).collect();
    ensure!(kinds == [true, false], "the events are {events:?}");
    container.delete()?;
    Ok(())
}

fn fork_bomb(machine: &Machine) -> Result<()> {
    let script = "n=0; while [ $n -lt 40 ]; do sleep 1000 & n=$((n+1)); done; echo all";
    let bomb = limited("bomb", &["sh", "-c", script], &json!({ "pids": { "limit": 16 } }));
    let container = Container::create(machine, "bomb", &bomb, Streams::default())?;
    let output = container.run(CALL)?;
    ensure!(!output.out().contains("all") && output.status() != 0, "40 processes came to be: {output:?}");
    container.delete()?;
    machine.events(CALL)?;
    Ok(())
}

fn standing_still(machine: &Machine) -> Result<()> {
    let clock = config("clock", &["sh", "-c", "while :; do echo x; sleep 0.05; done"]);
    let container = Container::create(machine, "clock", &clock, Streams::default())?;
    let process = container.start(Streams::default())?;
    let request = container_request("clock");
    std::thread::sleep(Duration::from_millis(500));
    machine.call(async |client, context| client.pause(context, &request).await)?;
    ensure!(machine.state("clock", "")?.status.enum_value() == Ok(Status::PAUSED), "it is not paused");
    let usage = || -> Result<u64> {
        let stats = machine.call(async |client, context| client.stats(context, &request).await)?;
        ensure!(
            stats.type_url == agent_api::METRICS_TYPE && stats.value.len() > 40,
            "the metrics are {stats:?}"
        );
        cpu_of(&stats.value).with_context(|| format!("there is no processor time in {:?}", stats.value))
    };
    let before = usage()?;
    std::thread::sleep(Duration::from_millis(1000));
    let after = usage()?;
    ensure!(after == before, "during a pause something ran for {} us", after - before);
    machine.call(async |client, context| client.resume(context, &request).await)?;
    std::thread::sleep(Duration::from_millis(1000));
    ensure!(usage()? != before, "nothing goes on after a pause");
    machine.signal("clock", "", 9)?;
    ensure!(process.finish(CALL)?.out().starts_with("x\n"), "it never ran");
    container.delete()?;
    machine.events(CALL)?;
    Ok(())
}

/// Processor time in microseconds: field 1 of field 2 of the metrics. The averages of pressure in there change while
/// nothing runs.
fn cpu_of(metrics: &[u8]) -> Option<u64> {
    let mut rest = metrics;
    while let [tag, length, tail @ ..] = rest {
        // All fields before it are short messages.
        let (body, after) = tail.split_at_checked(usize::from(*length))?;
        if *tag == 0x12 {
            let [0x08, number @ ..] = body else { return None };
            let length = number.iter().position(|byte| byte & 0x80 == 0)?;
            return Some(
                number[..=length].iter().rev().fold(0, |sum, byte| sum << 7 | u64::from(byte & 0x7f)),
            );
        }
        rest = after;
    }
    None
}

fn changing(machine: &Machine) -> Result<()> {
    let sleeper = limited(
        "up",
        &["sleep", "1000"],
        &json!({ "memory": { "limit": 64 << 20 }, "pids": { "limit": 50 } }),
    );
    let container = Container::create(machine, "up", &sleeper, Streams::default())?;
    let process = container.start(Streams::default())?;
    let look = || container.sh("e", "cd /sys/fs/cgroup; cat memory.max pids.max cpu.max cpu.weight", CALL);
    let before = look()?.out();
    ensure!(before == "67108864\n50\nmax 100000\n100\n", "before it was {before}");
    let mut request = UpdateRequest::new();
    request.id.push_str("up");
    request.resources =
        serde_json::to_vec(&json!({ "memory": { "limit": 48 << 20 }, "pids": { "limit": 60 },
        "cpu": { "quota": 50_000, "period": 100_000, "shares": 512 } }))?;
    machine.call(async |client, context| client.update(context, &request).await)?;
    let after = look()?.out();
    ensure!(after.starts_with("50331648\n60\n50000 100000\n"), "after it was {after}");
    machine.signal("up", "", 9)?;
    process.finish(CALL)?;
    container.delete()?;
    machine.events(CALL)?;
    Ok(())
}

fn read_only(machine: &Machine) -> Result<()> {
    let script =
        "touch /x; touch /proc/sys/x; cat /proc/kcore | head -c 1 | wc -c; touch /dev/shm/y && echo shm; pwd";
    let mut spec = config("ro", &["sh", "-c", script]);
    spec["root"]["readonly"] = json!(true);
    let container = Container::create(machine, "ro", &spec, Streams::default())?;
    let output = container.run(CALL)?;
    let complaints = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.out() == "0\nshm\n/\n", "{output:?}");
    ensure!(
        complaints.lines().filter(|line| line.contains("Read-only file system")).count() >= 1,
        "{complaints}"
    );
    container.delete()?;
    machine.events(CALL)?;
    Ok(())
}

fn side_by_side(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let machine = machine(ctx)?;
    let quiet =
        Container::create(&machine, "quiet", &config("quiet", &["sleep", "100000"]), Streams::default())?;
    let sleeping = quiet.start(Streams::default())?;
    // Nobody reads what it says, and everything of its is full.
    let loud = Container::create(&machine, "loud", &config("loud", &["yes", "loud"]), Streams::default())?;
    let _unread = machine.attach("loud", "", agent_api::stdio::Stream::Stdout)?;
    let _also = machine.attach("loud", "", agent_api::stdio::Stream::Stderr)?;
    machine.start("loud", "")?;
    let zombies = "n=0; while [ $n -lt 40 ]; do (sleep 0.01 & exec true) & n=$((n+1)); done; wait; echo made";
    let maker = limited("maker", &["sh", "-c", zombies], &json!({ "pids": { "limit": 300 } }));
    let maker = Container::create(&machine, "maker", &maker, Streams::default())?;
    let made = maker.run(CALL * 2)?;
    ensure!(made.out() == "made\n", "{made:?}");
    let begun = Instant::now();
    for round in 0..5 {
        let output = quiet.sh(&format!("e{round}"), "echo still", CALL)?;
        ensure!(output.out() == "still\n", "{output:?}");
    }
    ctx.note(format!("a process beside a flood takes {:.2?}", begun.elapsed() / 5));
    let pids =
        machine.call(async |client, context| client.pids(context, &container_request("quiet")).await)?;
    ensure!(pids.pids.len() == 1, "the quiet container has the processes {:?}", pids.pids);
    machine.signal("loud", "", 9)?;
    machine.wait("loud", "", CALL)?;
    loud.delete()?;
    machine.signal("quiet", "", 9)?;
    ensure!(sleeping.finish(CALL)?.status() == 137, "the quiet container ended otherwise");
    quiet.delete()?;
    maker.delete()?;
    machine.ends_well()?;
    Ok(Outcome::Passed)
}
