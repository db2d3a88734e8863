//! Containers whose network is made by hooks, as nerdctl does: the container has an empty namespace, and a program of the
//! client's finds it by the pid of the state that it is given.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Result, ensure};
use integration::{Ctx, Outcome, Test};
use serde_json::{Value, json};

use super::network::with_rights;
use super::{A_WHILE, OURS, Piped, test};
use crate::world::{Inside, RUNC};

pub fn tests() -> Vec<Test<Inside>> {
    vec![test(
        "task.network-hooks",
        "a container whose hooks have CNI set its namespace up, and down, as nerdctl's do, has the network that it has with \
         runc",
        by_hooks,
    )]
}

/// Has a plugin of CNI make an interface in the namespace of the state's process, or has it forget that.
const HOOK: &str = r#"#!/bin/sh
set -eu
export PATH=/usr/sbin:/usr/bin:/sbin:/bin CNI_PATH=/usr/lib/cni CNI_IFNAME=eth0 CNI_COMMAND=$1 CNI_NETNS=
state=$(cat)
export CNI_CONTAINERID=$(echo "$state" | jq -r .id)
if [ "$1" = ADD ]; then CNI_NETNS=/proc/$(echo "$state" | jq -r .pid)/ns/net; fi
jq -c '{ cniVersion, name } + .plugins[0]' /etc/cni/net.d/10-testbed.conflist | /usr/lib/cni/bridge
echo "$1" >>"$2"
"#;

const SCRIPT: &str =
    "cat /sys/class/net/eth0/mtu; ip -4 route | sed 's/10.88.0.[0-9][0-9]*/X/g;s/ *$//' | sort
    ping -c 1 -W 20 10.88.0.1 >/dev/null && ping -c 1 -W 20 fd00:88::1 >/dev/null; exit $?";

/// The bridge that the plugin makes, which it leaves.
struct Bridge<'a>(&'a Ctx<'a, Inside>);

impl Drop for Bridge<'_> {
    fn drop(&mut self) {
        let _ = self.0.cmd("ip").args(["link", "del", "cni0"]).run();
    }
}

fn by_hooks(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let program = ctx.path("hook");
    fs::write(&program, HOOK)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let _bridge = Bridge(ctx);
    let mut said = Vec::new();
    for (name, runtime) in [("runc", RUNC), ("ours", OURS)] {
        let log = ctx.path(name);
        let edit = |spec: &mut Value| {
            with_rights(spec);
            let hook = |word: &str| json!([{ "path": program, "args": ["hook", word, log], "timeout": 60 }]);
            spec["hooks"] = json!({ "createRuntime": hook("ADD"), "poststop": hook("DEL") });
        };
        let mut task = Piped::new(ctx, &api, runtime, &["sh", "-c", SCRIPT], edit)?;
        task.container.start()?;
        let code = task.container.wait(A_WHILE)?;
        let seen = String::from_utf8_lossy(&task.stdout.read_to_end(A_WHILE)?).into_owned();
        let errors = String::from_utf8_lossy(&task.stderr.read_to_end(A_WHILE)?).into_owned();
        task.end(code)?;
        ensure!(code == 0, "{runtime}: exit code {code}, {errors:?}, after {seen:?}");
        let hooks = fs::read_to_string(&log)?;
        ensure!(hooks == "ADD\nDEL\n", "{runtime}: the hooks were {hooks:?}");
        said.push(seen);
    }
    ensure!(said[0] == said[1], "a container sees {:?}, with runc {:?}", said[1], said[0]);
    Ok(Outcome::Passed)
}
