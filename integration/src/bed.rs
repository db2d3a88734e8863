//! The emulated host, as its users see it: a command, `hack/testbed`, and the processes and files it makes.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use crate::command::Cmd;
use crate::process::{self, Process};

/// The exit code with which the tool says that it failed itself, and not the command it ran.
pub const TOOL_FAILED: i32 = 125;

/// How the tool is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bed {
    /// The tool.
    pub tool: PathBuf,
    /// `x86_64` or `aarch64`.
    pub arch: String,
    /// Its cache directory.
    pub cache: PathBuf,
}

impl Bed {
    /// `command` runs `argv` in a host started with `options`. Its cache is `cache` also if the command's
    /// environment says otherwise by default.
    pub fn run<A, B>(
        &self,
        command: Cmd,
        options: impl IntoIterator<Item = A>,
        argv: impl IntoIterator<Item = B>,
    ) -> Cmd
    where
        A: AsRef<OsStr>,
        B: AsRef<OsStr>,
    {
        command.args(["--arch", &self.arch]).args(options).args(["run", "--"]).args(argv)
    }

    /// What exists of hosts that run: the directories of their files.
    pub fn run_directories(&self) -> BTreeSet<PathBuf> {
        let entries = fs::read_dir(self.cache.join("run")).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
    }

    /// What the cache holds, whole and half-made: the names of images and saved hosts.
    pub fn cached(&self) -> BTreeSet<PathBuf> {
        let below = |name: &str| fs::read_dir(self.cache.join(name)).into_iter().flatten().flatten();
        let entries = below("image").chain(below("saved")).map(|entry| entry.path());
        entries.filter(|path| path.is_dir()).collect()
    }
}

/// The QEMUs whose files are in `directory`.
pub fn emulators_of(directory: &Path) -> Vec<Process> {
    let text = directory.display().to_string();
    process::all()
        .into_iter()
        .filter(|process| process.name.starts_with("qemu-system") && !process.is_zombie())
        .filter(|process| process.arguments.contains(&text))
        .collect()
}

/// The QEMUs below the process `root`.
pub fn emulators_below(root: i32) -> Vec<Process> {
    let mut found = process::descendants(root);
    found.retain(|process| process.name.starts_with("qemu-system") && !process.is_zombie());
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_tool_gets_options_before_the_command() {
        let bed = Bed { tool: "echo".into(), arch: "aarch64".into(), cache: "/nowhere".into() };
        let command = Cmd::new(&bed.tool, Duration::from_secs(20));
        let done = bed.run(command, ["--cold"], ["uname", "-m"]).ok().unwrap();
        assert_eq!(done.out(), "--arch aarch64 --cold run -- uname -m\n");
        assert!(bed.run_directories().is_empty() && bed.cached().is_empty());
    }
}
