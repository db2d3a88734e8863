//! A container's control group.
//!
//! It is made, limited, frozen, killed and removed here; libcontainer only puts the process in. Limits are
//! converted by libcgroups, the same way for a new container and for an update.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use libcgroups::common::{CgroupManager, ControllerOpt};
use libcgroups::v2::manager::Manager;
use oci_spec::runtime::LinuxResources;
use tokio::time::{Instant, sleep};

/// Where the hierarchy is.
pub const ROOT: &str = "/sys/fs/cgroup";
/// The agent's own. No container can have this name.
const OWN: &str = ".agent";
/// What stays the agent's, whatever containers ask for.
const OWN_MEMORY: &str = "25165824";

const FREEZE_DEADLINE: Duration = Duration::from_secs(10);
const KILL_DEADLINE: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(2);

/// Readies the hierarchy for containers, and puts the agent aside.
pub fn prepare() -> Result<()> {
    let root = Path::new(ROOT);
    let own = root.join(OWN);
    fs::create_dir(&own).context("creating the agent's cgroup")?;
    fs::write(own.join("cgroup.procs"), "0").context("entering the agent's cgroup")?;
    let controllers = fs::read_to_string(root.join("cgroup.controllers"))?;
    let all: Vec<_> = controllers.split_whitespace().map(|name| format!("+{name}")).collect();
    fs::write(root.join("cgroup.subtree_control"), all.join(" ")).context("enabling controllers")?;
    fs::write(own.join("memory.min"), OWN_MEMORY).context("reserving the agent's memory")
}

/// A container's control group.
#[derive(Debug, Clone)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// The one of the container `id`.
    pub fn of(id: &str) -> Self {
        Self { path: Path::new(ROOT).join(id) }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its name in the hierarchy.
    pub fn name(&self) -> PathBuf {
        Path::new("/").join(self.path.strip_prefix(ROOT).unwrap_or(&self.path))
    }

    /// Makes it, without any limits.
    pub fn create(&self) -> Result<()> {
        fs::create_dir(&self.path).with_context(|| format!("creating the cgroup {}", self.path.display()))
    }

    /// Limits it. Lowering memory takes as long as the kernel needs to free it.
    pub fn limit(&self, resources: &LinuxResources) -> Result<()> {
        let mut resources = resources.clone();
        // Rules about devices are a program, not a file.
        resources.set_devices(None);
        let manager = Manager::new(ROOT.into(), self.name())?;
        let options = ControllerOpt {
            resources: &resources,
            freezer_state: None,
            oom_score_adj: None,
            disable_oom_killer: false,
        };
        manager.apply(&options).context("setting the limits of the cgroup")?;
        // No swap at all is 0 in v2, which libcgroups takes for nothing said.
        if let Some(memory) = resources.memory()
            && let (Some(limit), Some(swap)) = (memory.limit(), memory.swap())
            && limit > 0
            && swap == limit
        {
            let file = self.path.join("memory.swap.max");
            if file.exists() {
                fs::write(file, "0").context("limiting swap")?;
            }
        }
        Ok(())
    }

    /// What a file of it says.
    pub fn read(&self, file: &str) -> std::io::Result<String> {
        fs::read_to_string(self.path.join(file))
    }

    /// The number behind a word in a file of lines like `oom_kill 3`.
    pub fn keyed(&self, file: &str, key: &str) -> Option<u64> {
        keyed(&self.read(file).ok()?, key)
    }

    /// Its processes, and those of groups that the container made below it.
    pub fn pids(&self) -> Result<Vec<u32>> {
        let mut pids = Vec::new();
        collect(&self.path, &mut pids, 0).context("reading the processes of a cgroup")?;
        pids.sort_unstable();
        Ok(pids)
    }

    /// Kills all that is in it; new ones too, until it is empty.
    pub fn kill(&self) -> Result<()> {
        match fs::write(self.path.join("cgroup.kill"), "1") {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error).context("killing a cgroup"),
            _ => Ok(()),
        }
    }

    /// Stops or goes on with all that is in it. Freezing waits until everybody stands still.
    pub async fn freeze(&self, frozen: bool) -> Result<()> {
        let write = |word: &str| fs::write(self.path.join("cgroup.freeze"), word);
        write(if frozen { "1" } else { "0" }).context("freezing a cgroup")?;
        let ends = Instant::now() + FREEZE_DEADLINE;
        while frozen && self.keyed("cgroup.events", "frozen") != Some(1) {
            if Instant::now() > ends {
                let _ = write("0");
                bail!("the container did not stand still within {} s", FREEZE_DEADLINE.as_secs());
            }
            sleep(POLL).await;
        }
        Ok(())
    }

    /// Kills all that is in it and removes it.
    pub async fn remove(&self) -> Result<()> {
        if !self.path.exists() {
            return Ok(());
        }
        self.kill()?;
        let ends = Instant::now() + KILL_DEADLINE;
        loop {
            match remove_tree(&self.path, 0) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
                Err(error) if Instant::now() > ends => {
                    return Err(error).with_context(|| format!("removing {}", self.path.display()));
                }
                Err(_) => sleep(POLL).await,
            }
        }
    }
}

/// Deeper than any container's group goes that is meant well; the kernel's own limit is higher.
const DEPTH: usize = 64;

fn collect(path: &Path, pids: &mut Vec<u32>, depth: usize) -> std::io::Result<()> {
    match fs::read_to_string(path.join("cgroup.procs")) {
        Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok())),
        // A group of threads says so when it is asked for processes.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
        Err(error) => return Err(error),
    }
    if depth < DEPTH {
        for child in directories(path)? {
            match collect(&child, pids, depth + 1) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }
    Ok(())
}

fn remove_tree(path: &Path, depth: usize) -> std::io::Result<()> {
    if depth < DEPTH {
        for child in directories(path)? {
            remove_tree(&child, depth + 1)?;
        }
    }
    fs::remove_dir(path)
}

fn directories(path: &Path) -> std::io::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(path)?.filter_map(std::result::Result::ok);
    Ok(entries.filter(|entry| entry.file_type().is_ok_and(|typ| typ.is_dir())).map(|e| e.path()).collect())
}

/// The number behind a word in lines like `oom_kill 3`.
pub fn keyed(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_with_keys() {
        let text = "low 0\noom 2\noom_kill 3\noom_group_kill x\n";
        for (key, value) in
            [("oom", Some(2)), ("oom_kill", Some(3)), ("oom_group_kill", None), ("o", None), ("max", None)]
        {
            assert_eq!(keyed(text, key), value, "{key}");
        }
    }

    #[test]
    fn names() {
        assert_eq!(Cgroup::of("c1").name(), Path::new("/c1"));
        assert_eq!(Cgroup::of("c1").path(), Path::new("/sys/fs/cgroup/c1"));
    }
}
