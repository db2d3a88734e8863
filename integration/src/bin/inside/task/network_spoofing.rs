//! What a container says of itself on a network: that it is who it is, and nobody else.

use anyhow::{Result, ensure};
use integration::wait::{Attempt, until};
use integration::{Ctx, Outcome, Test};

use super::network::{Cable, Cabled, enter, plug, with_rights};
use super::template::Configured;
use super::{A_WHILE, OURS, Piped, new_id, test};
use crate::world::{Inside, RUNC};

pub fn tests() -> Vec<Test<Inside>> {
    vec![test(
        "task.network-spoofing",
        "a container speaks on a network by its own addresses alone, v4 and v6, which are those of its interface now; with policy.spoofing = \
         \"allow\" it does as it likes, as with runc",
        spoofing,
    )]
}

const CABLE: Cable = Cable { number: 0, mac: "02:77:00:00:00:01", mtu: 1500 };
/// Addresses that nobody has given to the interface.
const TAKEN: [&str; 2] = ["10.77.0.77/24", "fd77::77/64"];
const OWN: [&str; 2] = ["10.77.0.2", "fd77::2"];

/// Does what each line of input says, and says when it is done.
const SCRIPT: &str = "echo ready; while read line; do eval \"$line\" 2>&1; echo \"done $?\"; done";

/// Whether who has the host's end of the cable is answered by an address.
fn answers(ctx: &Ctx<'_, Inside>, address: &str) -> Result<bool> {
    // Whatever is remembered of it was said by an earlier container.
    ctx.cmd("ip").args(["neigh", "flush", "dev", "it-out0"]).ok()?;
    let done = ctx.cmd("ping").args(["-c", "1", "-W", "5", "-w", "5", address]).run()?;
    Ok(done.code() == Some(0))
}

/// Until it is so; what has changed takes a moment to be so everywhere.
fn comes_to_answer(ctx: &Ctx<'_, Inside>, address: &str) -> Result<()> {
    until(&format!("{address} to answer"), A_WHILE, || match answers(ctx, address) {
        Ok(true) => Attempt::Done(()),
        other => Attempt::Pending(format!("{other:?}")),
    })?;
    Ok(())
}

fn spoofing(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let ctx = &*ctx;
    for (runtime, policy) in [(RUNC, None), (OURS, Some("allow")), (OURS, Some("drop"))] {
        let _configured = policy
            .map(|policy| Configured::with(&format!("[policy]\nspoofing = \"{policy}\"\n")))
            .transpose()?;
        speaks(ctx, runtime, policy == Some("drop"))
            .map_err(|error| error.context(format!("{runtime}, policy {policy:?}")))?;
    }
    Ok(Outcome::Passed)
}

fn speaks(ctx: &Ctx<'_, Inside>, runtime: &str, is_kept: bool) -> Result<()> {
    let api = ctx.world.api()?;
    let cabled = Cabled::new(ctx)?;
    let _cable = plug(ctx, &cabled.path, &CABLE)?;
    let edit = |spec: &mut serde_json::Value| {
        with_rights(spec);
        enter(spec, &cabled.path);
    };
    let mut task = Piped::named(ctx, &api, runtime, new_id(ctx, runtime), &["sh", "-c", SCRIPT], edit)?;
    task.container.start()?;
    task.stdout.read_until("ready\n", A_WHILE)?;
    let tell = |task: &mut Piped<'_>, line: &str| -> Result<()> {
        task.stdin.write(format!("{line}\n").as_bytes())?;
        let said = task.stdout.read_until("done 0\n", A_WHILE);
        said.map(drop).map_err(|error| error.context(format!("the container was told to do {line:?}")))
    };
    for address in OWN {
        comes_to_answer(ctx, address)?;
    }
    for address in TAKEN {
        tell(&mut task, &format!("ip address add {address} dev eth0"))?;
    }
    for address in TAKEN {
        let address = address.split('/').next().unwrap_or_default();
        if is_kept {
            ensure!(!answers(ctx, address)?, "the container is {address}, too");
        } else {
            comes_to_answer(ctx, address)?;
        }
    }
    // Another hardware address.
    let change =
        |mac: &str| format!("ip link set eth0 down; ip link set eth0 address {mac}; ip link set eth0 up");
    tell(&mut task, &change("02:77:00:00:00:99"))?;
    if is_kept {
        ensure!(!answers(ctx, OWN[0])?, "the container has another hardware address");
    } else {
        comes_to_answer(ctx, OWN[0])?;
    }
    tell(&mut task, &change(CABLE.mac))?;
    comes_to_answer(ctx, OWN[0])?;
    if is_kept {
        // What the interface is given is the container's from then on, and until it is taken.
        let [taken, _] = TAKEN;
        let address = taken.split('/').next().unwrap_or_default();
        cabled.inside(&format!("ip address add {taken} dev eth0"))?;
        comes_to_answer(ctx, address)?;
        cabled.inside(&format!("ip address del {taken} dev eth0"))?;
        until(&format!("{address} to be nobody's"), A_WHILE, || match answers(ctx, address) {
            Ok(false) => Attempt::Done(()),
            other => Attempt::Pending(format!("{other:?}")),
        })?;
        let qdiscs = cabled.inside("tc -s qdisc show")?;
        ctx.note(&qdiscs);
    }
    task.container.kill(9)?;
    let code = task.container.wait(A_WHILE)?;
    task.end(code)
}
