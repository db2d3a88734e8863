//! The name of a container that goes on under another one.

use std::fs::File;
use std::thread;

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns};

use crate::machine::settings;

/// Names whatever the process `pid` has its name from: the container, or the machine. Blocks.
pub fn set(pid: i32, hostname: &str) -> Result<()> {
    let path = format!("/proc/{pid}/ns/uts");
    let namespace = File::open(&path).with_context(|| format!("opening {path}"))?;
    // A thread of its own is in there, and ends with it.
    let naming = thread::scope(|scope| {
        let inside = || {
            setns(&namespace, CloneFlags::CLONE_NEWUTS).with_context(|| format!("entering {path}"))?;
            settings::set_hostname(hostname)
        };
        scope.spawn(inside).join()
    });
    naming.unwrap_or_else(|_| Err(anyhow!("naming a container: the thread has panicked")))
}
