//! A container that answers, in a network namespace with a cable to this host.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration::containerd::{Api, Container, NewContainer, Stdio, shim_of};
use integration::fifo::Output;
use integration::network_time::{Network, Side};
use integration::process;
use serde_json::{Value, json};

use crate::cable::{LINK, Namespace};
use crate::cost::Meter;
use crate::order::READY;
use crate::{Bench, STEP, figures};

/// Where it has this program.
const PROGRAM: &str = "/network-time";

/// Measures one once. Nothing is left of it, however it goes.
pub fn measure(bench: &Bench, api: &Api, side: Side, number: u32) -> Result<Network> {
    let id = format!("bench-network-{number}-{}", side.name());
    let namespace = Namespace::make(bench.host.path("netns"))?;
    let runtime = match side {
        Side::Ours => "io.containerd.supermachine.v2",
        Side::Runc | Side::Qemu | Side::Vhost => "io.containerd.runc.v2",
    };
    let process = [PROGRAM, "serve"];
    let new = NewContainer { id: &id, image: &bench.host.image, runtime, process: &process };
    let own = std::env::current_exe().context("finding this program to bring it along")?;
    let mut container = api.create_with(&new, |spec| {
        if let Some(mounts) = spec["mounts"].as_array_mut() {
            let options = ["bind", "ro"];
            mounts.push(json!({ "type": "bind", "source": own, "destination": PROGRAM, "options": options }));
        }
        enter(spec, &namespace);
    })?;
    // When this fails, what there is of the container is removed as it is dropped.
    let network = steps(bench, &mut container, side, &id)?;
    container.delete()?;
    Ok(network)
}

/// Has it be in `namespace`.
fn enter(spec: &mut Value, namespace: &Namespace) {
    if let Some(all) = spec["linux"]["namespaces"].as_array_mut() {
        for one in all.iter_mut().filter(|one| one["type"] == "network") {
            one["path"] = json!(namespace.path());
        }
    }
}

fn steps(bench: &Bench, container: &mut Container<'_>, side: Side, id: &str) -> Result<Network> {
    let mut stdout = Output::create(bench.host.path(&format!("{id}-stdout")))?;
    let mut stderr = Output::create(bench.host.path(&format!("{id}-stderr")))?;
    let stdio = Stdio { stdin: None, stdout: stdout.path().to_owned(), stderr: stderr.path().to_owned() };
    container.create_task(&stdio)?;
    container.start()?;
    stdout.read_until(READY, STEP)?;
    let meter = Meter::new(LINK, if side == Side::Ours { Some(monitor(id)?) } else { None })?;
    let network = figures::take(&meter, bench.time).with_context(|| {
        let said = stderr.read_until("\n", Duration::from_secs(1)).unwrap_or_default();
        format!("the container has said {:?}", String::from_utf8_lossy(&said))
    })?;
    container.kill(9)?;
    let code = container.wait(STEP)?;
    container.delete_task()?;
    ensure!(code == 137, "killed, it ended with {code}");
    Ok(network)
}

/// The process that has its machine.
fn monitor(id: &str) -> Result<i32> {
    let below = process::descendants(shim_of(id)?.pid);
    let monitor = below.iter().find(|process| process.arguments.contains("supermachine-vmm run"));
    Ok(monitor.with_context(|| format!("below the shim are only {below:?}"))?.pid)
}
