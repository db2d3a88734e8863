//! How many queues of its network device a machine uses.

use anyhow::{Context, Result, ensure};
use integration::containerd::Api;
use integration::{Ctx, Outcome, Test};
use serde_json::{Value, json};

use super::network::{Cable, Cabled, enter, plug};
use super::network_loads::{at_once, carry, datagrams, serving};
use super::template::Configured;
use super::{A_WHILE, OURS, Piped, test};
use crate::world::{Boot, Inside};

pub fn tests() -> Vec<Test<Inside>> {
    vec![test(
        "task.network-queues",
        "a container's network device has a pair of queues in use for each of its processors, up to four, also when its \
         machine grows, and loses nothing by any of them, with and without vhost-net",
        queues,
    )]
}

const CABLE: Cable = Cable { number: 0, mac: "02:77:00:00:00:01", mtu: 1400 };
/// Processors, and queues in each direction.
const SEEN: &str =
    "nproc; ls /sys/class/net/eth0/queues | grep -c rx; ls /sys/class/net/eth0/queues | grep -c tx";
/// As many as several queues have work with.
const CONNECTIONS: u64 = 60;
/// Bytes of a stream, each way.
const AMOUNT: u64 = 1 << 20;

fn queues(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let ctx = &*ctx;
    let api = ctx.world.api()?;
    // A machine boots with all of them, and is restored with two.
    for (processors, pairs, vhost) in [(1, 1, "auto"), (3, 3, "auto"), (6, 4, "auto"), (6, 4, "off")] {
        let about = || format!("{processors} processors, vhost {vhost}");
        let _configured = Configured::with(&format!("[vm]\nmax_cpus = 6\n[network]\nvhost = \"{vhost}\"\n"))?;
        let cabled = Cabled::new(ctx)?;
        let _cable = plug(ctx, &cabled.path, &CABLE)?;
        let task = with(ctx, &api, &cabled, processors, pairs).with_context(about)?;
        loads().with_context(about)?;
        ended(task)?;
    }
    if ctx.world.boot == Boot::Cold {
        ctx.note("a machine that has booted does not grow");
        return Ok(Outcome::Passed);
    }
    let _configured = Configured::with("[vm]\nmax_cpus = 6\n")?;
    let cabled = Cabled::new(ctx)?;
    let _cable = plug(ctx, &cabled.path, &CABLE)?;
    let first = with(ctx, &api, &cabled, 1, 1)?;
    loads()?;
    let mut second = Piped::new(ctx, &api, OURS, &["sh", "-c", SEEN], |spec| has(spec, &cabled, 3))?;
    second.container.start()?;
    let code = second.container.wait(A_WHILE)?;
    let said = String::from_utf8_lossy(&second.stdout.read_to_end(A_WHILE)?).into_owned();
    second.end(code)?;
    ensure!(said == "3\n3\n3\n", "in a machine that has grown for another container: {said:?}");
    loads().context("after its machine has grown")?;
    ended(first)?;
    Ok(Outcome::Passed)
}

fn has(spec: &mut Value, cabled: &Cabled<'_>, processors: u64) {
    enter(spec, &cabled.path);
    spec["linux"]["resources"]["cpu"] = json!({ "quota": processors * 100_000, "period": 100_000 });
}

/// A container that serves, which sees so much.
fn with<'a>(
    ctx: &Ctx<'_, Inside>,
    api: &'a Api,
    cabled: &Cabled<'_>,
    processors: u64,
    pairs: u64,
) -> Result<Piped<'a>> {
    let (task, said) = serving(ctx, api, OURS, SEEN, |spec| has(spec, cabled, processors))?;
    let expected = format!("{processors}\n{pairs}\n{pairs}\n");
    ensure!(said.starts_with(&expected), "processors and queues should be {expected:?}, and are {said:?}");
    Ok(task)
}

fn loads() -> Result<()> {
    for address in CABLE.inside() {
        datagrams(address, &[1, 1000]).with_context(|| format!("datagrams to {address}"))?;
        at_once(address, CONNECTIONS).with_context(|| format!("connections to {address}"))?;
    }
    carry(CABLE.inside()[0], AMOUNT, false).context("a stream")
}

fn ended(task: Piped<'_>) -> Result<()> {
    task.container.kill(9)?;
    let code = task.container.wait(A_WHILE)?;
    task.end(code)
}
