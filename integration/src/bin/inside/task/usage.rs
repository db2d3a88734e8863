//! What a container uses, and which processes there are in it, in the words in which runc's are told.

use std::fs;

use anyhow::{Context, Result, ensure};
use integration::containerd::Stdio;
use integration::{Ctx, Outcome, Test};
use serde_json::{Value, json};

use super::ended::monitor_of;
use super::{A_WHILE, OURS, Piped, test};
use crate::world::{Inside, RUNC};

pub fn tests() -> Vec<Test<Inside>> {
    vec![
        test(
            "task.usage",
            "what a container uses and its processes are told in the form and in the order of magnitude of runc's",
            usage,
        ),
        test(
            "task.cgroup",
            "the host accounts a container's machine where its configuration says, on the processors that it names",
            cgroup,
        ),
    ]
}

/// Six MB of memory, some processor time, and three processes more.
const SCRIPT: &str =
    "x=$(head -c 6000000 /dev/zero | tr '\\0' x); i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done
    sleep 100000 & sleep 100000 & echo ready; wait";

/// What both must say, and how many times more one of them may say.
const COMPARED: &[(&str, f64)] = &[
    ("/pids/current", 1.0),
    ("/pids/limit", 1.0),
    ("/memory/usage_limit", 1.0),
    ("/memory/usage", 10.0),
    ("/memory/anon", 3.0),
    ("/memory/pgfault", 10.0),
    ("/cpu/usage_usec", 10.0),
    ("/cpu/user_usec", 10.0),
];

/// What there is at one moment and not at another, as the kernel likes.
const MOMENTARY: &[&str] = &[
    "/memory/anon_thp",
    "/memory/thp_fault_alloc",
    "/memory/thp_collapse_alloc",
    "/memory/file_dirty",
    "/memory/file_writeback",
    "/memory/inactive_anon",
    "/memory/inactive_file",
    "/memory/pgmajfault",
];

/// What was asked of a container.
struct Told {
    typ: String,
    metrics: Value,
    rows: Vec<String>,
    processes: Vec<String>,
}

fn usage(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let theirs = told(ctx, RUNC)?;
    let ours = told(ctx, OURS)?;
    ensure!(ours.typ == theirs.typ, "the metrics are of type {}, with runc {}", ours.typ, theirs.typ);
    ensure!(ours.rows == theirs.rows, "ctr task metrics has {:?}, with runc {:?}", ours.rows, theirs.rows);
    ensure!(
        ours.processes == theirs.processes,
        "ctr task ps has {:?}, with runc {:?}",
        ours.processes,
        theirs.processes
    );
    for (place, factor) in COMPARED {
        let of = |told: &Told| {
            let value = told.metrics.pointer(place).and_then(Value::as_f64);
            value
                .filter(|value| *value > 0.0)
                .with_context(|| format!("there is no {place} in {}", told.metrics))
        };
        let (theirs, ours) = (of(&theirs).context("runc")?, of(&ours).context("ours")?);
        let ratio = if ours > theirs { ours / theirs } else { theirs / ours };
        ctx.note(format!("{place}: ours {ours}, runc {theirs}"));
        ensure!(ratio <= *factor, "{place} is {ours}, with runc {theirs}");
    }
    let mut missing = numbers(&theirs.metrics);
    missing.retain(|place| ours.metrics.pointer(place).is_none() && !MOMENTARY.contains(&place.as_str()));
    ensure!(missing.is_empty(), "{missing:?} are told of runc's only; ours are {}", ours.metrics);
    Ok(Outcome::Passed)
}

fn told(ctx: &Ctx<'_, Inside>, runtime: &str) -> Result<Told> {
    let api = ctx.world.api()?;
    let mut task = Piped::new(ctx, &api, runtime, &["sh", "-c", SCRIPT], |spec| {
        spec["linux"]["resources"] = json!({ "memory": { "limit": 64 << 20 }, "pids": { "limit": 50 } });
    })?;
    task.container.start()?;
    task.stdout.read_until("ready", A_WHILE)?;
    let null = || "/dev/null".into();
    let stdio = Stdio { stdin: None, stdout: null(), stderr: null() };
    let other = task.container.exec("other", &["sleep", "100000"], &stdio)?;
    other.start()?;

    let ctr = |words: &[&str]| -> Result<String> {
        let done = ctx.world.ctr().with(ctx.cmd("ctr"), [&["task"], words].concat()).ok()?;
        Ok(done.out().into_owned())
    };
    let (typ, length) = task.container.metrics()?;
    ensure!(length > 0, "{runtime}: the metrics are empty");
    let first = |line: &str| line.split_whitespace().next().unwrap_or_default().to_owned();
    let rows = ctr(&["metrics", &task.id])?.lines().map(first).filter(|row| *row != task.id).collect();
    let metrics = serde_json::from_str(&ctr(&["metrics", "--format", "json", &task.id])?)?;
    let mut processes: Vec<_> = ctr(&["ps", &task.id])?
        .lines()
        .map(|line| line.split_once(char::is_whitespace).map_or("", |(_, info)| info.trim()).to_owned())
        .collect();
    processes.sort();

    other.kill(9)?;
    other.wait(A_WHILE)?;
    other.delete()?;
    task.container.kill(9)?;
    let code = task.container.wait(A_WHILE)?;
    task.end(code)?;
    Ok(Told { typ, metrics, rows, processes })
}

/// Where in `value` there are numbers other than 0, but for those in lists, which are the host's devices.
fn numbers(value: &Value) -> Vec<String> {
    fn collect(value: &Value, place: &str, found: &mut Vec<String>) {
        match value {
            Value::Object(entries) => {
                for (name, value) in entries {
                    collect(value, &format!("{place}/{name}"), found);
                }
            }
            Value::Number(number) if number.as_f64() != Some(0.0) => found.push(place.to_owned()),
            _ => {}
        }
    }
    let mut found = Vec::new();
    collect(value, "", &mut found);
    found
}

fn cgroup(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    for runtime in [RUNC, OURS] {
        let place = format!("/{}/below/{}", ctx.id("place"), if runtime == OURS { "ours" } else { "runc" });
        let task = Piped::new(ctx, &api, runtime, &["sleep", "100000"], |spec| {
            spec["linux"]["cgroupsPath"] = json!(place);
            spec["linux"]["resources"] = json!({ "cpu": { "cpus": "1" } });
        })?;
        task.container.start()?;
        let who = if runtime == OURS { monitor_of(&task.id)?.pid.to_string() } else { task.pid.to_string() };
        let found = fs::read_to_string(format!("/proc/{who}/cgroup")).context("reading where it is")?;
        ensure!(found.trim_end() == format!("0::{place}"), "{runtime}: it is in {found:?}");
        let list = fs::read_to_string(format!("/sys/fs/cgroup{place}/cpuset.cpus"))?;
        ensure!(list == "1\n", "{runtime}: it is on processors {list:?}");
        task.container.kill(9)?;
        let code = task.container.wait(A_WHILE)?;
        task.end(code)?;
        let left = fs::metadata(format!("/sys/fs/cgroup{place}")).is_ok();
        ensure!(!left, "{runtime}: its cgroup is still there");
    }
    // Of two in the same one, the first to go leaves it to the other.
    let place = format!("/{}/both", ctx.id("place"));
    let edit = |spec: &mut Value| spec["linux"]["cgroupsPath"] = json!(place);
    let tasks = [(); 2].map(|()| Piped::new(ctx, &api, OURS, &["sleep", "100000"], edit));
    for (task, stays) in tasks.into_iter().zip([true, false]) {
        let task = task?;
        task.container.start()?;
        task.container.kill(9)?;
        let code = task.container.wait(A_WHILE)?;
        task.end(code)?;
        let there = fs::metadata(format!("/sys/fs/cgroup{place}")).is_ok();
        ensure!(there == stays, "a cgroup of two: it {} there", if there { "is still" } else { "is not" });
    }
    // runc leaves what is above; nothing is below it any more.
    let above = format!("/sys/fs/cgroup/{}", ctx.id("place"));
    for directory in [format!("{above}/below"), above] {
        match fs::remove_dir(&directory) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("removing {directory}"));
            }
            _ => {}
        }
    }
    Ok(Outcome::Passed)
}
