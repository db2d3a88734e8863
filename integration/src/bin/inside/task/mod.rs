//! A container of ours does what the same container does with runc, in the same run: whatever differs is a finding.

mod attach;
mod broken;
mod bursts;
mod checkpoint;
mod cycles;
mod disks;
mod drives;
mod ended;
mod events;
mod execs;
mod files;
mod hooks;
mod limits;
mod midway;
mod network;
mod network_gvproxy;
mod network_hooks;
mod network_leases;
mod network_loads;
mod network_localhost;
mod network_queues;
mod network_resolver;
mod network_shared;
mod network_socket;
mod network_spoofing;
mod network_vhost;
mod network_wrong;
mod operator;
mod outlived;
mod pod;
mod refusals;
mod rounds;
mod streams;
mod template;
mod terminals;
mod usage;
mod warm;
mod watched;
mod wrong;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use integration::containerd::{Api, Checkpoint, Container, Mount, NewContainer, Stdio};
use integration::fifo::{Input, Output};
use integration::{Ctx, Outcome, Rounds, Test};
use serde_json::Value;

use crate::world::{Inside, RUNC};

/// The runtime under test.
const OURS: &str = "io.containerd.supermachine.v2";

/// A script, and what it is for. Each is a container; what can be said in one is.
const SCRIPTS: &[(&str, &str)] = &[
    (
        "all",
        "exec 2>&1
        pwd; id; echo $PATH; umask; ulimit -n; hostname | wc -c
        grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status
        ls -d /bin /proc /dev/null /dev/shm /sys; echo a > /tmp-file; cat /tmp-file; ls -l /dev/fd/ | wc -l
        head -c 8000000 /dev/zero | tr '\\0' x | md5sum; seq 1 200000
        (sleep 0.2; echo late) & echo early; wait
        exit 42",
    ),
    ("streams", "echo out; echo err >&2; exit 3"),
    ("first", "echo $$; cat /proc/1/comm; kill -0 1"),
    ("killed", "kill -9 $$"),
];

/// From a container's start to its end or its first words; on an emulated host that has company, and from a machine in
/// it.
const A_WHILE: Duration = Duration::from_mins(3);

fn test(
    name: &'static str,
    proves: &'static str,
    run: fn(&mut Ctx<'_, Inside>) -> Result<Outcome>,
) -> Test<Inside> {
    Test { name, proves, run, deadline: Duration::from_mins(10), rounds: Rounds::once_or(3), tags: &["task"] }
}

pub fn tests() -> Vec<Test<Inside>> {
    let own = vec![
        test("task.as-runc", "scripts have the output and the exit codes that they have with runc", as_runc),
        test("task.input", "what ctr reads reaches a container", input),
        test("task.no-program", "a program that is not there is named as runc names it", no_program),
    ];
    [
        own,
        execs::tests(),
        terminals::tests(),
        attach::tests(),
        streams::tests(),
        bursts::tests(),
        files::tests(),
        hooks::tests(),
        limits::tests(),
        usage::tests(),
        refusals::tests(),
        wrong::tests(),
        broken::tests(),
        operator::tests(),
        pod::tests(),
        network::tests(),
        network_gvproxy::tests(),
        network_hooks::tests(),
        network_leases::tests(),
        network_loads::tests(),
        network_localhost::tests(),
        network_queues::tests(),
        network_resolver::tests(),
        network_shared::tests(),
        network_socket::tests(),
        network_spoofing::tests(),
        network_vhost::tests(),
        network_wrong::tests(),
        disks::tests(),
        drives::tests(),
        template::tests(),
        checkpoint::tests(),
        rounds::tests(),
        warm::tests(),
        watched::tests(),
        ended::tests(),
        midway::tests(),
        outlived::tests(),
        cycles::tests(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// An id for one of several containers of a test.
fn new_id(ctx: &Ctx<'_, Inside>, runtime: &str) -> String {
    static MADE: AtomicU32 = AtomicU32::new(0);
    let number = MADE.fetch_add(1, Ordering::Relaxed);
    ctx.id(&format!("{number}-{}", if runtime == OURS { "ours" } else { "runc" }))
}

/// A container with its task, which is not started yet, and its streams on FIFOs.
struct Piped<'a> {
    id: String,
    pid: u32,
    container: Container<'a>,
    stdin: Input,
    stdout: Output,
    stderr: Output,
}

impl<'a> Piped<'a> {
    fn new(
        ctx: &Ctx<'_, Inside>,
        api: &'a Api,
        runtime: &str,
        process: &[&str],
        edit: impl FnOnce(&mut Value),
    ) -> Result<Self> {
        Self::named(ctx, api, runtime, new_id(ctx, runtime), process, edit)
    }

    fn named(
        ctx: &Ctx<'_, Inside>,
        api: &'a Api,
        runtime: &str,
        id: String,
        process: &[&str],
        edit: impl FnOnce(&mut Value),
    ) -> Result<Self> {
        Self::on(ctx, api, runtime, id, process, None, edit)
    }

    /// With these mounts for its root, in the place of those of a snapshot.
    fn on(
        ctx: &Ctx<'_, Inside>,
        api: &'a Api,
        runtime: &str,
        id: String,
        process: &[&str],
        root: Option<Vec<Mount>>,
        edit: impl FnOnce(&mut Value),
    ) -> Result<Self> {
        Self::made(ctx, api, runtime, id, process, edit, |container, stdio| {
            if let Some(root) = root {
                container.set_root(root);
            }
            container.create_task(stdio)
        })
    }

    /// Of which the task goes on from a checkpoint.
    fn from(
        ctx: &Ctx<'_, Inside>,
        api: &'a Api,
        checkpoint: &Checkpoint<'_>,
        id: String,
        process: &[&str],
        edit: impl FnOnce(&mut Value),
    ) -> Result<Self> {
        let create =
            |container: &mut Container<'a>, stdio: &Stdio| container.create_task_from(stdio, checkpoint);
        Self::made(ctx, api, OURS, id, process, edit, create)
    }

    fn made(
        ctx: &Ctx<'_, Inside>,
        api: &'a Api,
        runtime: &str,
        id: String,
        process: &[&str],
        edit: impl FnOnce(&mut Value),
        create: impl FnOnce(&mut Container<'a>, &Stdio) -> Result<u32>,
    ) -> Result<Self> {
        let mut terminal = false;
        let new = NewContainer { id: &id, image: &ctx.world.image, runtime, process };
        let mut container = api.create_with(&new, |spec| {
            edit(spec);
            terminal = spec["process"]["terminal"] == true;
        })?;
        let path = |name: &str| {
            let path = ctx.path(&format!("{id}-{name}"));
            // Of one that is gone, whose name this one has again.
            let _ = std::fs::remove_file(&path);
            path
        };
        let stdin = Input::create(path("stdin"))?;
        let stdout = Output::create(path("stdout"))?;
        let stderr = Output::create(path("stderr"))?;
        let stdio = Stdio {
            stdin: Some(stdin.path().to_owned()),
            stdout: stdout.path().to_owned(),
            stderr: if terminal { PathBuf::new() } else { stderr.path().to_owned() },
        };
        let pid = create(&mut container, &stdio)?;
        ensure!(pid != 0, "{runtime}: containerd gave pid 0 for a task");
        Ok(Self { id, pid, container, stdin, stdout, stderr })
    }

    /// Deletes it, which has ended with this code.
    fn end(mut self, code: u32) -> Result<()> {
        let deleted = self.container.delete_task()?;
        self.container.delete()?;
        ensure!(deleted == code, "Wait says {code}, Delete says {deleted}");
        Ok(())
    }
}

/// Exit code, output and errors of a process.
fn outcome(
    ctx: &mut Ctx<'_, Inside>,
    runtime: &str,
    name: &str,
    process: &[&str],
) -> Result<(Option<i32>, String, String)> {
    let id = ctx.id(&format!("{name}-{}", if runtime == OURS { "ours" } else { "runc" }));
    let command = ctx.world.ctr().run(ctx.cmd("ctr"), runtime, &id, process).stdin("first\nsecond\nthird\n");
    let done = ctx.world.with_container(&id, || Ok(command.run()?))?;
    Ok((done.code(), done.out().into_owned(), done.err().into_owned()))
}

fn as_runc(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    for (name, script) in SCRIPTS {
        let process = ["sh", "-c", script];
        let theirs = outcome(ctx, RUNC, name, &process)?;
        let ours = outcome(ctx, OURS, name, &process)?;
        ensure!(ours.0 == theirs.0, "{name}: exit code {:?}, with runc {:?}: {}", ours.0, theirs.0, ours.2);
        ensure!(ours.1 == theirs.1, "{name}: output {:?}, with runc {:?}", head(&ours.1), head(&theirs.1));
    }
    Ok(Outcome::Passed)
}

fn head(text: &str) -> &str {
    text.get(..1000).unwrap_or(text)
}

fn input(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    for runtime in [RUNC, OURS] {
        let (code, out, err) = outcome(ctx, runtime, "head", &["head", "-n", "2"])?;
        ensure!(code == Some(0) && out == "first\nsecond\n", "{runtime}: {code:?} {out:?} {err:?}");
    }
    Ok(Outcome::Passed)
}

fn no_program(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    for runtime in [RUNC, OURS] {
        let (code, _, err) = outcome(ctx, runtime, "none", &["no-such-program"])?;
        ensure!(
            code != Some(0) && err.contains("executable file not found in $PATH"),
            "{runtime}: {code:?} {err:?}"
        );
    }
    Ok(Outcome::Passed)
}
