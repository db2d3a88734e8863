//! Containers of a pod: one machine, one shim, and names of their own.

use anyhow::{Result, ensure};
use integration::containerd::{Api, shim_of};
use integration::wait::{Attempt, until};
use integration::{Ctx, Outcome, Test};
use serde_json::{Value, json};

use super::ended::kill_hard;
use super::{A_WHILE, OURS, Piped, test};
use crate::world::{Inside, RUNC};

pub fn tests() -> Vec<Test<Inside>> {
    vec![
        test(
            "task.pod",
            "containers of a pod share a kernel, a name and a network, and one that ends leaves the others alone",
            pod,
        ),
        test("task.pod-killed", "of a pod whose shim is killed nothing is left", pod_killed),
    ]
}

/// As CRI marks them.
fn annotate(spec: &mut Value, kind: &str, sandbox: &str) {
    spec["annotations"] = json!({
        "io.kubernetes.cri.container-type": kind,
        "io.kubernetes.cri.sandbox-id": sandbox,
    });
}

const SAYS: &str =
    "cat /proc/sys/kernel/random/boot_id; hostname; readlink /proc/self/ns/net /proc/self/ns/ipc";

/// A sandbox that sleeps, and what it has to say.
pub fn sandbox<'a>(ctx: &Ctx<'_, Inside>, api: &'a Api, runtime: &str) -> Result<(Piped<'a>, String)> {
    let script = format!("{SAYS}; echo ready; exec sleep 1000");
    // Its id is part of what it is made from.
    let id = ctx.id(if runtime == OURS { "pod-ours" } else { "pod-runc" });
    let mut task = Piped::named(ctx, api, runtime, id.clone(), &["sh", "-c", &script], |spec| {
        annotate(spec, "sandbox", &id);
        spec["hostname"] = json!("the-pod");
    })?;
    task.container.start()?;
    let said = task.stdout.read_until("ready\n", A_WHILE)?;
    Ok((task, String::from_utf8_lossy(&said).replace("ready\n", "")))
}

/// Makes a container one of the pod's.
pub fn join(spec: &mut Value, sandbox: &Piped<'_>) {
    annotate(spec, "container", &sandbox.id);
    if let Some(spec) = spec.as_object_mut() {
        spec.remove("hostname");
    }
    let pods =
        |kind: &str| json!({ "type": kind, "path": format!("/proc/{}/ns/{}", sandbox.pid, &kind[..3]) });
    spec["linux"]["namespaces"] = json!([
        { "type": "pid" }, { "type": "mount" },
        { "type": "network", "path": format!("/proc/{}/ns/net", sandbox.pid) }, pods("ipc"), pods("uts")
    ]);
}

fn member<'a>(
    ctx: &Ctx<'_, Inside>,
    api: &'a Api,
    runtime: &str,
    sandbox: &Piped<'_>,
    script: &str,
) -> Result<Piped<'a>> {
    let task = Piped::new(ctx, api, runtime, &["sh", "-c", script], |spec| join(spec, sandbox))?;
    ensure!(task.pid != sandbox.pid, "{runtime}: the pod's containers have the same pid");
    Ok(task)
}

fn pod(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    for runtime in [RUNC, OURS] {
        let (first, said) = sandbox(ctx, &api, runtime)?;
        ensure!(said.lines().nth(1) == Some("the-pod"), "{runtime}: the sandbox says {said:?}");
        let host = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        ensure!(
            (said.lines().next() == Some(host.trim())) == (runtime == RUNC),
            "{runtime}: the kernel is the wrong one"
        );
        for code in [5, 6] {
            let mut task = member(ctx, &api, runtime, &first, &format!("{SAYS}; exit {code}"))?;
            task.container.start()?;
            let status = task.container.wait(A_WHILE)?;
            let theirs = task.stdout.read_to_end(A_WHILE)?;
            task.end(status)?;
            let theirs = String::from_utf8_lossy(&theirs);
            ensure!(
                status == code && theirs == said,
                "{runtime}: {status}, {theirs:?}, and the sandbox {said:?}"
            );
        }
        first.container.kill(9)?;
        let status = first.container.wait(A_WHILE)?;
        ensure!(status == 137, "{runtime}: the sandbox ended with {status}");
        first.end(status)?;
    }
    Ok(Outcome::Passed)
}

fn pod_killed(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let (first, _) = sandbox(ctx, &api, OURS)?;
    let mut second = member(ctx, &api, OURS, &first, "echo ready; exec sleep 1000")?;
    second.container.start()?;
    second.stdout.read_until("ready", A_WHILE)?;
    kill_hard(&shim_of(&first.id)?)?;
    let names = [&first.id, &second.id].map(|id| format!("task {}/{id}", ctx.world.namespace));
    until("containerd to forget the tasks", A_WHILE, || match api.objects() {
        Ok(objects) if !names.iter().any(|name| objects.contains(name)) => Attempt::Done(()),
        other => Attempt::Pending(format!("{other:?}")),
    })?;
    second.container.delete()?;
    first.container.delete()?;
    Ok(Outcome::Passed)
}
