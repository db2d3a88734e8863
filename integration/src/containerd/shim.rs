//! The process that serves a container.

use anyhow::{Context, Result};

use crate::process::{self, Process};

/// The shim of the container `id`, which has one of its own. Not the program that starts it, nor the one that tidies
/// up after it.
pub fn shim_of(id: &str) -> Result<Process> {
    let of_it = |process: &Process| {
        let arguments = &process.arguments;
        let is_brief =
            ["start", "delete"].iter().any(|verb| arguments.trim_end().ends_with(&format!(" {verb}")));
        !is_brief && arguments.contains("containerd-shim-") && arguments.contains(&format!("-id {id} "))
    };
    process::all().into_iter().find(of_it).with_context(|| format!("there is no shim of {id}"))
}
