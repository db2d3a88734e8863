//! Containers that have one network without being a pod, as by `docker run --network container:NAME`.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use integration::containerd::{Api, shim_of};
use integration::wait::{Attempt, until};
use integration::{Ctx, Outcome, Test};
use serde_json::{Value, json};

use super::ended::{kill_hard, monitor_of};
use super::network::{Cable, Cabled, enter, plug, with_rights};
use super::{A_WHILE, OURS, Piped, new_id, test};
use crate::world::{Boot, Inside, RUNC};

pub fn tests() -> Vec<Test<Inside>> {
    vec![
        test(
            "task.network-shared",
            "containers that are to have the network of another have it, its localhost as well, and their own names; it ends and \
             comes again while they go on; as with runc",
            shared,
        ),
        test(
            "task.network-shared-killed",
            "of containers with one network whose shim is killed nothing is left",
            shared_killed,
        ),
    ]
}

/// The kernel, the memory of the machine, and a page on localhost.
const SERVES: &str = "cat /proc/sys/kernel/random/boot_id; grep MemTotal /proc/meminfo
    mkdir /www; echo the page >/www/page; httpd -p 127.0.0.1:8000 -h /www; echo ready; exec sleep 1000";
/// The same, and what there is of the other; then whether the host answers, for each line of input.
const ASKS: &str = "cat /proc/sys/kernel/random/boot_id; grep MemTotal /proc/meminfo
    hostname; cat /sys/class/net/eth0/address; wget -qO- -T 20 http://127.0.0.1:8000/page
    echo ready; while read line; do ping -c 1 -W 20 10.77.0.1 >/dev/null; echo $line $?; done";

/// What a container said before it was ready, by lines.
fn lines(task: &mut Piped<'_>) -> Result<Vec<String>> {
    let said = task.stdout.read_until("ready\n", A_WHILE)?;
    Ok(String::from_utf8_lossy(&said).lines().map(str::to_owned).collect())
}

/// KiB of a line of `/proc/meminfo`.
fn kib(line: &str) -> Result<u64> {
    let number = line.split_whitespace().nth(1).and_then(|word| word.parse().ok());
    number.with_context(|| format!("{line:?} is not of /proc/meminfo"))
}

fn limit(spec: &mut Value, mib: u64) {
    spec["linux"]["resources"]["memory"] = json!({ "limit": mib << 20 });
    spec["linux"]["resources"]["cpu"] = json!({ "quota": 100_000, "period": 100_000 });
}

fn first<'a>(
    ctx: &Ctx<'_, Inside>,
    api: &'a Api,
    runtime: &str,
    id: &str,
    network: Option<&str>,
) -> Result<(Piped<'a>, Vec<String>)> {
    let mut task = Piped::named(ctx, api, runtime, id.to_owned(), &["sh", "-c", SERVES], |spec| {
        limit(spec, 100);
        if let Some(path) = network {
            enter(spec, path);
        }
    })?;
    task.container.start()?;
    let said = lines(&mut task)?;
    Ok((task, said))
}

fn other<'a>(
    ctx: &Ctx<'_, Inside>,
    api: &'a Api,
    runtime: &str,
    network: &str,
) -> Result<(Piped<'a>, Vec<String>)> {
    let mut task = Piped::new(ctx, api, runtime, &["sh", "-c", ASKS], |spec| {
        with_rights(spec);
        enter(spec, network);
        limit(spec, 600);
        spec["hostname"] = json!("the-other");
    })?;
    task.container.start()?;
    let said = lines(&mut task)?;
    ensure!(
        said[2..] == ["the-other", MAC, "the page", "ready"],
        "{runtime}: a container in {network} says {said:?}"
    );
    Ok((task, said))
}

const MAC: &str = "02:77:00:00:00:01";

/// It still does what it is asked.
fn answers(task: &mut Piped<'_>, word: &str) -> Result<()> {
    task.stdin.write(format!("{word}\n").as_bytes())?;
    let said = task.stdout.read_until("\n", A_WHILE)?;
    let said = String::from_utf8_lossy(&said);
    ensure!(said == format!("{word} 0\n"), "{} says {said:?}", task.id);
    Ok(())
}

fn ended(task: Piped<'_>) -> Result<()> {
    task.container.kill(9)?;
    let code = task.container.wait(A_WHILE)?;
    task.end(code)
}

/// The directory of the cgroup that a process is in.
fn cgroup_of(pid: i32) -> Result<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::")).context("there is no cgroup v2")?;
    Ok(format!("/sys/fs/cgroup{path}"))
}

fn shared(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let ctx = &*ctx;
    let api = ctx.world.api()?;
    let host = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    for runtime in [RUNC, OURS] {
        let cabled = Cabled::new(ctx)?;
        let _cable = plug(ctx, &cabled.path, &Cable { number: 0, mac: MAC, mtu: 1500 })?;
        let id = new_id(ctx, runtime);
        let (begins, said) = first(ctx, &api, runtime, &id, Some(&cabled.path))?;
        // One that cannot be made comes to nothing: the first is alone as before, and can be written down.
        let none = Piped::new(ctx, &api, runtime, &["no-such-program"], |spec| {
            enter(spec, &cabled.path);
            limit(spec, 600);
        });
        ensure!(none.is_err(), "{runtime}: there is a container without a program");
        if runtime == OURS {
            drop(begins.container.checkpoint(false).context("writing down who is alone")?);
        }
        // By the process, as docker does it; by the file, as others do.
        let (mut by_process, second) = other(ctx, &api, runtime, &format!("/proc/{}/ns/net", begins.pid))?;
        let (mut by_file, third) = other(ctx, &api, runtime, &cabled.path)?;
        let kernel = &said[0];
        ensure!((kernel == host.trim()) == (runtime == RUNC), "{runtime}: the kernel is the wrong one");
        ensure!(second[0] == *kernel && third[0] == *kernel, "{runtime}: the kernels are not one");

        let mut monitor = None;
        if runtime == OURS {
            // One that has booted is as large as it is.
            let (before, after) = (kib(&said[1])?, kib(&third[1])?);
            ctx.note(format!("from {} to {} MiB", before >> 10, after >> 10));
            let restored = ctx.world.boot == Boot::Restore;
            ensure!(!restored || after > before + (1000 << 10), "it has grown from {before} to {after} KiB");
            let error = begins.container.checkpoint(false).err().map(|error| format!("{error:#}"));
            let why = error.context("a container is written down that shares its machine")?;
            ensure!(why.contains("others have been in its machine"), "the checkpoint fails because of {why}");
            let process = monitor_of(&begins.id)?;
            monitor = Some((cgroup_of(process.pid)?, process.pid));
        }
        ended(begins)?;
        if let Some((before, pid)) = monitor {
            let now = cgroup_of(pid)?;
            ensure!(
                now != before && !Path::new(&before).exists(),
                "the monitor is in {now}, and was in {before}"
            );
            let limit = fs::read_to_string(format!("{now}/cpu.max"))?;
            ensure!(limit.starts_with("max "), "the machine of several is limited to {limit:?}");
        }
        answers(&mut by_process, "after the first")?;

        // It comes again, to where it was, and then elsewhere.
        let (again, said) = first(ctx, &api, runtime, &id, Some(&cabled.path))?;
        ensure!(said[0] == *kernel, "{runtime}: what comes again is in another machine");
        ended(again)?;
        let (elsewhere, said) = first(ctx, &api, runtime, &id, None)?;
        ensure!(
            (said[0] == *kernel) == (runtime == RUNC),
            "{runtime}: with its own network it is in the old machine"
        );
        ended(elsewhere)?;
        answers(&mut by_file, "at the end")?;
        // The last two at a time.
        let last = [by_process, by_file];
        for task in &last {
            task.container.kill(9)?;
            task.container.wait(A_WHILE)?;
        }
        let delete = |task: &Piped<'_>| {
            ctx.world
                .ctr()
                .with(ctx.cmd("ctr"), ["task", "delete", task.id.as_str()])
                .deadline(A_WHILE)
                .start()
        };
        let [one, other] = [delete(&last[0])?, delete(&last[1])?];
        for deleting in [one, other] {
            let done = deleting.wait()?;
            // `ctr` of 1.7 ends with the code that the task had.
            ensure!([Some(0), Some(137)].contains(&done.code()), "{runtime}: {}", done.err());
        }
        for task in last {
            task.container.delete()?;
        }
    }
    Ok(Outcome::Passed)
}

fn shared_killed(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let ctx = &*ctx;
    let api = ctx.world.api()?;
    let cabled = Cabled::new(ctx)?;
    let _cable = plug(ctx, &cabled.path, &Cable { number: 0, mac: MAC, mtu: 1500 })?;
    let id = new_id(ctx, OURS);
    let (begins, _) = first(ctx, &api, OURS, &id, Some(&cabled.path))?;
    let (second, _) = other(ctx, &api, OURS, &cabled.path)?;
    kill_hard(&shim_of(&begins.id)?)?;
    let names = [&begins.id, &second.id].map(|id| format!("task {}/{id}", ctx.world.namespace));
    until("containerd to forget the tasks", A_WHILE, || match api.objects() {
        Ok(objects) if !names.iter().any(|name| objects.contains(name)) => Attempt::Done(()),
        other => Attempt::Pending(format!("{other:?}")),
    })?;
    second.container.delete()?;
    begins.container.delete()?;
    Ok(Outcome::Passed)
}
