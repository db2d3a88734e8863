//! A containerd of a test's own, beside the host's.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use integration::Ctx;
use integration::command::Running;
use integration::containerd::{Api, Ctr};
use integration::process;
use integration::wait::{Attempt, until};
use nix::sys::prctl::set_child_subreaper;

use crate::world::Inside;

/// Until it answers.
const A_WHILE: Duration = Duration::from_mins(3);

/// One that serves at that socket, with the host's configuration or this one. It ends with this value.
pub fn containerd(ctx: &Ctx<'_, Inside>, ctr: &Ctr, config: Option<&Path>) -> Result<(Running, Api)> {
    let mut command = ctx.cmd("containerd").args(["--log-level", "trace"]);
    if let Some(config) = config {
        command = command.arg("--config").arg(config);
    }
    command = command.arg("--address").arg(&ctr.address);
    for name in ["root", "state"] {
        command = command.arg(format!("--{name}")).arg(ctx.path(name));
    }
    let running = command.start()?;
    let api = until("containerd to answer", A_WHILE, || {
        let api =
            Api::connect(&ctr.address, &ctr.namespace, A_WHILE).and_then(|api| api.version().map(|_| api));
        api.map_or_else(|error| Attempt::Pending(format!("{error:#}")), Attempt::Done)
    })?;
    Ok((running, api))
}

/// From now on shims that have nobody become children of this process.
pub fn reap_shims() -> Result<()> {
    set_child_subreaper(true).context("becoming the reaper of shims")
}

/// Waits for the end of all that has become a child of this process.
pub fn reap_all() -> Result<()> {
    let own = i32::try_from(std::process::id())?;
    let reaped = until("the shims to end", A_WHILE, || {
        process::reap(own, &process::descendants(own));
        let left = process::descendants(own);
        if left.is_empty() { Attempt::Done(()) } else { Attempt::Pending(format!("{left:?}")) }
    });
    Ok(reaped?)
}
