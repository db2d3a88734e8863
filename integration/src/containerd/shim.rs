//! The process that serves a container.

use anyhow::{Context, Result};

use crate::process::{self, Process};

/// The shim of the container `id`, which has one of its own.
pub fn shim_of(id: &str) -> Result<Process> {
    let of_it = |process: &Process| {
        process.arguments.contains("containerd-shim-") && process.arguments.contains(&format!("-id {id} "))
    };
    process::all().into_iter().find(of_it).with_context(|| format!("there is no shim of {id}"))
}
