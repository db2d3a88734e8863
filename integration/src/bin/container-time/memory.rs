//! What the processes that serve a container take of the host.

use anyhow::{Context, Result};
use integration::container_time::Side;
use integration::containerd::shim_of;
use integration::process::{self, Memory, Process};

/// Of runc's shim; of our shim, its monitor and the process that stands for the container. With runc the container's
/// own processes are the host's and not counted; with ours they are in the guest's RAM.
pub fn of(id: &str, side: Side) -> Result<Memory> {
    let shim = shim_of(id)?;
    let mut all = vec![shim.clone()];
    if side == Side::Ours {
        all.extend(process::descendants(shim.pid));
    }
    let ram =
        if side == Side::Ours { ram(&all).context("there is no monitor below the shim")? } else { u64::MAX };
    let mut sum = Memory::default();
    for process in &all {
        let memory = process::memory(process.pid, ram)
            .with_context(|| format!("reading the memory of {}", process.describe()))?;
        sum.all += memory.all;
        sum.large += memory.large;
    }
    Ok(sum)
}

/// The size of the guest's RAM: what the monitor was told.
fn ram(processes: &[Process]) -> Option<u64> {
    let monitor = processes.iter().find(|process| process.arguments.contains("supermachine-vmm run"))?;
    let mut words = monitor.arguments.split(' ').skip_while(|word| *word != "--memory");
    words.nth(1)?.parse().ok()
}
