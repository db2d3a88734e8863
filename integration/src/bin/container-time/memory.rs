//! What the processes that serve a container take of the host.

use anyhow::{Context, Result, ensure};
use integration::container_time::Side;
use integration::containerd::shim_of;
use integration::process::{self, Memory};

/// No mapping of a monitor's own is so large, and no guest's RAM smaller.
const RAM: u64 = 128 << 20;

/// Of runc's shim; of our shim, its monitor and the process that stands for the container. With runc the container's
/// own processes are the host's and not counted; with ours they are in the guest's RAM.
pub fn of(id: &str, side: Side) -> Result<Memory> {
    let shim = shim_of(id)?;
    let mut all = vec![shim.clone()];
    let ours = matches!(side, Side::Ours | Side::Cold);
    if ours {
        all.extend(process::descendants(shim.pid));
        let monitors = all.iter().filter(|process| process.arguments.contains("supermachine-vmm run"));
        ensure!(monitors.count() == 1, "there is not one monitor below the shim, but {all:?}");
    }
    let mut sum = Memory::default();
    for process in &all {
        let memory = process::memory(process.pid, if ours { RAM } else { u64::MAX })
            .with_context(|| format!("reading the memory of {}", process.describe()))?;
        sum.all += memory.all;
        sum.large += memory.large;
    }
    Ok(sum)
}
