//! Who moves the packets of a container: the host's kernel or the monitor.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use integration::{Ctx, Outcome, Test, process};

use super::ended::monitor_of;
use super::network::{Cable, Cabled, PORT, enter, out, plug, through};
use super::template::Configured;
use super::{A_WHILE, OURS, Piped, new_id, test};
use crate::world::Inside;

pub fn tests() -> Vec<Test<Inside>> {
    vec![test(
        "task.network-vhost",
        "the host's kernel moves a container's packets by vhost-net; with network.vhost = \"off\", and where what is there is no \
         vhost-net, the monitor does",
        vhost,
    )]
}

const CABLE: Cable = Cable { number: 0, mac: "02:77:00:00:00:01", mtu: 1400 };
const DEVICE: &str = "/dev/vhost-net";

/// Something else in the place of vhost-net, until it is dropped.
struct Hidden<'a>(&'a Ctx<'a, Inside>);

impl<'a> Hidden<'a> {
    fn new(ctx: &'a Ctx<'_, Inside>) -> Result<Self> {
        ctx.cmd("mount").args(["--bind", "/dev/null", DEVICE]).ok()?;
        Ok(Self(ctx))
    }
}

impl Drop for Hidden<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.cmd("umount").arg(DEVICE).ok() {
            eprintln!("# uncovering {DEVICE}: {error:#}");
        }
    }
}

fn vhost(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let ctx = &*ctx;
    if !Path::new(DEVICE).exists() {
        return Ok(Outcome::Skipped(format!("this host has no {DEVICE}")));
    }
    // One for each processor.
    carries(ctx, 2).context("as configured by default")?;
    {
        let _hidden = Hidden::new(ctx)?;
        carries(ctx, 0).context("with something else in its place")?;
    }
    let _configured = Configured::with("[network]\nvhost = \"off\"\n")?;
    carries(ctx, 0).context("turned off")?;
    Ok(Outcome::Passed)
}

/// A container's network carries, while the kernel has so many threads for it.
fn carries(ctx: &Ctx<'_, Inside>, threads: usize) -> Result<()> {
    let api = ctx.world.api()?;
    let cabled = Cabled::new(ctx)?;
    let _cable = plug(ctx, &cabled.path, &CABLE)?;
    let script = format!("nc -ll -p {PORT} -e cat & echo ready; read line; kill $!; exit 7");
    let words = ["sh", "-c", &script];
    let mut task = Piped::named(ctx, &api, OURS, new_id(ctx, OURS), &words, |spec| {
        enter(spec, &cabled.path);
    })?;
    task.container.start()?;
    task.stdout.read_until("ready\n", A_WHILE)?;
    let monitor = monitor_of(&task.id)?.pid;
    for address in CABLE.inside() {
        through(address).with_context(|| format!("to {address}"))?;
    }
    for address in CABLE.outside() {
        out(ctx, &task, address).with_context(|| format!("from the container to {address}"))?;
    }
    let names = threads_of(monitor)?;
    let kernels = names.iter().filter(|name| name.starts_with("vhost-")).count();
    ensure!(kernels == threads, "{kernels} of the monitor's threads are the kernel's, among {names:?}");
    ctx.note(format!(
        "{kernels} threads of the kernel's; the monitor has taken {} ticks",
        process::cpu_ticks(monitor)?
    ));
    task.stdin.write(b"\n")?;
    let code = task.container.wait(A_WHILE)?;
    ensure!(code == 7, "exit code {code}");
    task.end(code)
}

fn threads_of(pid: i32) -> Result<Vec<String>> {
    fs::read_dir(format!("/proc/{pid}/task"))?
        .map(|task| Ok(fs::read_to_string(task?.path().join("comm"))?.trim().to_owned()))
        .collect()
}
