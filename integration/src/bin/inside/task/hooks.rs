//! Programs that a configuration asks for, before and after a container's own.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result, ensure};
use integration::{Ctx, Outcome, Test};
use serde_json::{Value, json};

use super::{A_WHILE, OURS, Piped, test};
use crate::world::{Inside, RUNC};

pub fn tests() -> Vec<Test<Inside>> {
    vec![test(
        "task.hooks",
        "hooks run on the host in the order and with the state they have with runc, and one that fails is told of",
        hooks,
    )]
}

/// Notes which it is, the state's parts, and whether the process stands in a network namespace that is not this one.
const HOOK: &str = r#"#!/bin/sh
PATH=/usr/sbin:/usr/bin:/sbin:/bin
state=$(cat)
of() { echo "$state" | jq -r ".$1"; }
net=none
pid=$(of pid)
if [ "$pid" != 0 ] && [ "$pid" != null ]; then
    if [ "$(readlink /proc/$pid/ns/net)" != "$(readlink /proc/self/ns/net)" ]; then net=own; else net=host; fi
fi
echo "$1 $WORD $(of status) $(of ociVersion | cut -c 1) $(of 'annotations.kept') $net $(basename "$(of bundle)") $(of id)" >>"$2"
"#;

fn hooks(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let program = ctx.path("hook");
    fs::write(&program, HOOK)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let mut told = Vec::new();
    for (name, runtime) in [("runc", RUNC), ("ours", OURS)] {
        let log = ctx.path(name);
        let edit = |spec: &mut Value| {
            let hook = |kind: &str| json!([{ "path": program, "args": ["hook", kind, log], "env": [format!("WORD=of-{kind}")], "timeout": 20 }]);
            spec["annotations"] = json!({ "kept": "yes" });
            spec["hooks"] = json!({
                "prestart": hook("prestart"), "createRuntime": hook("createRuntime"),
                "poststart": hook("poststart"), "poststop": hook("poststop"),
                "startContainer": [{ "path": "/bin/sh", "args": ["sh", "-c", "echo in the container >/hooked"] }],
            });
        };
        let mut task = Piped::new(ctx, &api, runtime, &["sh", "-c", "cat /hooked; read line"], edit)?;
        let id = task.id.clone();
        task.container.start()?;
        task.stdout.read_until("in the container\n", A_WHILE)?;
        task.stdin.write(b"go\n")?;
        let code = task.container.wait(A_WHILE)?;
        ensure!(code == 0, "{runtime}: exit code {code}");
        task.end(code)?;
        let text = fs::read_to_string(&log).with_context(|| format!("{runtime}: no hook ran"))?;
        told.push(text.replace(&id, "ID"));
    }
    // runc 1.1 says of a container that has started what it was before.
    told[0] = told[0].replace("of-poststart created", "of-poststart running");
    ensure!(told[0] == told[1], "they are told {:?}, with runc {:?}", told[1], told[0]);
    ensure!(told[0].lines().count() == 4, "they are told {:?}", told[0]);
    Ok(Outcome::Passed)
}
