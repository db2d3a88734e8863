//! Control: containerd is there.

use std::time::Duration;

use anyhow::{Result, bail};
use integration::{Ctx, Outcome, Rounds, Test};

use crate::world::Inside;

pub fn tests() -> Vec<Test<Inside>> {
    vec![Test {
        name: "control.containerd-answers",
        proves: "containerd answers ctr and gRPC, and both name the same version",
        run: answers,
        deadline: Duration::from_secs(90),
        rounds: Rounds::once_or(5),
        tags: &["control"],
    }]
}

fn answers(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let printed = ctx.world.ctr().with(ctx.cmd("ctr"), ["version"]).ok()?;
    let told = ctx.world.api()?.version()?;
    let text = printed.out();
    let Some((_, server)) = text.split_once("Server:") else {
        bail!("`ctr version` names no server: {text}");
    };
    for (what, value) in [("Version", &told.version), ("Revision", &told.revision)] {
        let line = server.lines().find_map(|line| line.trim().strip_prefix(what)?.strip_prefix(':'));
        if line.map(str::trim) != Some(value.as_str()) {
            bail!("over gRPC containerd's {what} is {value:?}, `ctr version` has {line:?}");
        }
    }
    ctx.note(format!("containerd {}", told.version));
    Ok(Outcome::Passed)
}
