//! The container's cgroup on the host, in which its monitor is: what only the host can enforce.
//!
//! The directory is made and written to directly, also where systemd has the names (`SLICE:PREFIX:NAME`): systemd
//! lets alone what it did not make.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use log::{info, warn};
use oci_spec::runtime::LinuxResources;
use runtime_spec::plan::HostCgroup;

use crate::error::{Attempt, Result};
use crate::journal::{Journal, Made};

/// The hierarchy.
const ROOT: &str = "/sys/fs/cgroup";

/// Makes a container's cgroup. None on hosts without cgroup v2, where a machine is in that of the shim.
pub fn make(journal: &Journal, plan: &HostCgroup) -> Result<Option<PathBuf>> {
    let root = Path::new(ROOT);
    if !root.join("cgroup.controllers").exists() {
        info!("{ROOT} is not cgroup v2: the machine is in the cgroup of its shim");
        return Ok(None);
    }
    let relative = plan.path.directory();
    let relative = relative.strip_prefix("/").unwrap_or(&relative);
    let path = root.join(relative);
    let keep = path.ancestors().skip(1).find(|parent| parent.exists()).unwrap_or(root).to_owned();
    journal.note(Made::Cgroup { path: path.clone(), keep }).attempt("writing the journal")?;
    fs::create_dir_all(&path).attempt(format_args!("making the cgroup {}", path.display()))?;
    delegate(root, relative);
    limit(&path, &plan.resources);
    Ok(Some(path))
}

/// Lets each parent's children have its controllers. One that refuses has processes of its own, which is its business.
fn delegate(root: &Path, relative: &Path) {
    let mut parent = root.to_owned();
    for part in relative.components() {
        for controller in ["cpu", "cpuset", "io", "memory", "pids"] {
            let _ = fs::write(parent.join("cgroup.subtree_control"), format!("+{controller}"));
        }
        parent.push(part);
    }
}

/// Sets what a plan leaves to the host. What cannot be set is logged: a controller may be missing.
pub fn limit(path: &Path, resources: &LinuxResources) {
    for (file, text) in settings(resources) {
        if let Err(error) = fs::write(path.join(file), &text) {
            warn!("setting {file} of {} to {text:?}: {error}", path.display());
        }
    }
}

fn settings(resources: &LinuxResources) -> Vec<(&'static str, String)> {
    let mut settings = Vec::new();
    if let Some(cpu) = resources.cpu() {
        if let Some(shares) = cpu.shares().filter(|shares| *shares > 0) {
            settings.push(("cpu.weight", weight(shares).to_string()));
        }
        if let Some(quota) = cpu.quota() {
            let quota = if quota > 0 { quota.to_string() } else { "max".to_owned() };
            settings.push(("cpu.max", format!("{quota} {}", cpu.period().unwrap_or(100_000))));
        }
        for (file, list) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
            settings.extend(list.clone().filter(|list| !list.is_empty()).map(|list| (file, list)));
        }
    }
    if let Some(io) = resources.block_io() {
        if let Some(weight) = io.weight().filter(|weight| *weight > 0) {
            settings.push(("io.weight", format!("default {}", io_weight(weight))));
        }
        for (key, list) in [
            ("rbps", io.throttle_read_bps_device()),
            ("wbps", io.throttle_write_bps_device()),
            ("riops", io.throttle_read_iops_device()),
            ("wiops", io.throttle_write_iops_device()),
        ] {
            for device in list.iter().flatten() {
                let text = format!("{}:{} {key}={}", device.major(), device.minor(), device.rate());
                settings.push(("io.max", text));
            }
        }
    }
    for (name, value) in resources.unified().iter().flatten() {
        warn!("{name}={value} is for the guest's cgroup, not the host's");
    }
    settings
}

/// From 2..=262144 to 1..=10000, as every runtime does it.
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

/// From 10..=1000 to 1..=10000.
fn io_weight(weight: u16) -> u32 {
    1 + (u32::from(weight.clamp(10, 1000)) - 10) * 9999 / 990
}

/// Lifts the limit of processor time: its machine has other containers, too. What each of them may use, the guest sees
/// to.
pub fn lift(path: &Path) {
    if let Err(error) = fs::write(path.join("cpu.max"), "max") {
        info!("lifting cpu.max of {}: {error}", path.display());
    }
}

/// Whether a process is in a cgroup.
pub fn holds(path: &Path, pid: u32) -> bool {
    let pids = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
    pids.lines().any(|line| line.parse() == Ok(pid))
}

/// Puts a process into a cgroup.
pub fn enter(path: &Path, pid: u32) -> io::Result<()> {
    fs::write(path.join("cgroup.procs"), pid.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights() {
        for (shares, expected) in [(0, 1), (2, 1), (1024, 39), (262_144, 10_000), (1 << 40, 10_000)] {
            assert_eq!(weight(shares), expected, "{shares}");
        }
        assert_eq!((io_weight(10), io_weight(1000)), (1, 10_000));
    }

    #[test]
    fn files_that_are_written() {
        let resources: LinuxResources = serde_json::from_value(serde_json::json!({
            "cpu": { "shares": 1024, "quota": 200_000, "period": 100_000, "cpus": "0-1" },
            "blockIO": { "weight": 500, "throttleReadBpsDevice": [{ "major": 8, "minor": 0, "rate": 1000 }] },
        }))
        .unwrap();
        assert_eq!(
            settings(&resources),
            [
                ("cpu.weight", "39".to_owned()),
                ("cpu.max", "200000 100000".to_owned()),
                ("cpuset.cpus", "0-1".to_owned()),
                ("io.weight", "default 4950".to_owned()),
                ("io.max", "8:0 rbps=1000".to_owned()),
            ]
        );
    }
}
