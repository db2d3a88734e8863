//! Limits: how they change, and what is told when there is no more memory.

use std::time::Duration;

use anyhow::{Result, ensure};
use integration::{Ctx, Outcome, Test};
use serde_json::{Value, json};

use super::events::Events;
use super::{A_WHILE, OURS, Piped, test};
use crate::world::{Inside, RUNC};

pub fn tests() -> Vec<Test<Inside>> {
    vec![
        test("task.update", "limits of a container that runs are what an update says, as with runc", update),
        test(
            "task.oom",
            "a container that is killed for memory ends with 137, and its client is told why before it is told of the end",
            oom,
        ),
    ]
}

fn limit(spec: &mut Value, resources: Value) {
    spec["linux"]["resources"] = resources;
}

fn update(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    for runtime in [RUNC, OURS] {
        let edit = |spec: &mut Value| {
            limit(spec, json!({ "memory": { "limit": 64 << 20 }, "pids": { "limit": 50 } }));
            // Through which it sees its own limits.
            for (list, item) in [
                ("/linux/namespaces", json!({ "type": "cgroup" })),
                (
                    "/mounts",
                    json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"] }),
                ),
            ] {
                spec.pointer_mut(list)
                    .and_then(Value::as_array_mut)
                    .into_iter()
                    .for_each(|list| list.push(item.clone()));
            }
        };
        let task = Piped::new(ctx, &api, runtime, &["sleep", "1000"], edit)?;
        task.container.start()?;
        let look = |exec: &str| {
            let script = "cd /sys/fs/cgroup; cat memory.max pids.max cpu.max";
            let arguments = ["task", "exec", "--exec-id", exec, &task.id, "sh", "-c", script];
            ctx.world.ctr().with(ctx.cmd("ctr"), arguments).ok()
        };
        let before = look("before")?;
        ensure!(before.out() == "67108864\n50\nmax 100000\n", "{runtime}: before it was {:?}", before.out());
        task.container.update(&json!({
            "memory": { "limit": 48 << 20 }, "pids": { "limit": 60 }, "cpu": { "quota": 50_000, "period": 100_000 }
        }))?;
        let after = look("after")?;
        ensure!(after.out() == "50331648\n60\n50000 100000\n", "{runtime}: after it was {:?}", after.out());
        task.container.kill(9)?;
        let code = task.container.wait(A_WHILE)?;
        ensure!(code == 137, "{runtime}: exit code {code}");
        task.end(code)?;
    }
    Ok(Outcome::Passed)
}

fn oom(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let events = Events::listen(ctx)?;
    for runtime in [RUNC, OURS] {
        let edit = |spec: &mut Value| {
            limit(spec, json!({ "memory": { "limit": 32 << 20, "swap": 32 << 20 } }));
        };
        let task = Piped::new(ctx, &api, runtime, &["tail", "/dev/zero"], edit)?;
        let id = task.id.clone();
        task.container.start()?;
        let code = task.container.wait(A_WHILE)?;
        task.end(code)?;
        ensure!(code == 137, "{runtime}: exit code {code}");
        let topics = events.until(&id, &["/tasks/oom", "/tasks/delete"], Duration::from_secs(30))?;
        ctx.note(format!("{runtime}: {topics:?}"));
        if runtime == OURS {
            let expected =
                ["create", "start", "oom", "exit", "delete"].map(|topic| format!("/tasks/{topic}"));
            ensure!(topics == expected, "the events are {topics:?}");
        }
    }
    Ok(Outcome::Passed)
}
