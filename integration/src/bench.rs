//! What programs that measure in an emulated host have in common: where containerd is, where samples go, and that
//! nothing is left of it.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Error, Result, ensure};
use lexopt::{Parser, ValueExt};
use serde::Serialize;

use crate::leaks::{Scope, Snapshot};

/// For one call to containerd. Emulated, a task's creation takes seconds.
pub const CALL: Duration = Duration::from_mins(3);
/// For one step that is more than a call.
pub const STEP: Duration = Duration::from_mins(2);
/// More rounds that fail are no accidents of the emulation.
pub const FAILURES: usize = 2;

/// The options of all.
pub const OPTIONS: &str = "\
  --rounds N                measurements of each side
  --output FILE             where the samples go, after each round (NAME-samples.json, of the program's name)
  --address SOCKET          containerd's socket (/run/containerd/containerd.sock)
  --state DIR               containerd's state directory (/run/containerd)
  --root DIR                containerd's root directory (/var/lib/containerd)
  --namespace NAME          containerd's namespace to work in (default)
  --image NAME              an image with a busybox (docker.io/library/busybox:latest)";

/// Where things are, and where to put one's own.
pub struct Host {
    /// How often each side is measured.
    pub rounds: u32,
    output: PathBuf,
    /// containerd's socket.
    pub address: PathBuf,
    state: PathBuf,
    root: PathBuf,
    /// containerd's namespace to work in.
    pub namespace: String,
    /// An image with a busybox.
    pub image: String,
    /// A directory that is there while something is measured.
    pub scratch: PathBuf,
}

impl Host {
    /// As it is unless options say otherwise, for the program `NAME-time`.
    pub fn new(name: &str, rounds: u32) -> Self {
        Self {
            rounds,
            output: format!("{name}-samples.json").into(),
            address: "/run/containerd/containerd.sock".into(),
            state: "/run/containerd".into(),
            root: "/var/lib/containerd".into(),
            namespace: "default".into(),
            image: "docker.io/library/busybox:latest".into(),
            scratch: std::env::temp_dir().join(format!("{name}-time-{}", std::process::id())),
        }
    }

    /// Takes the value of the option `name`, if it is one of [`OPTIONS`].
    pub fn option(&mut self, name: &str, parser: &mut Parser) -> Result<bool> {
        let place = match name {
            "rounds" => {
                self.rounds = parser.value()?.parse()?;
                return Ok(true);
            }
            "namespace" => {
                self.namespace = parser.value()?.string()?;
                return Ok(true);
            }
            "image" => {
                self.image = parser.value()?.string()?;
                return Ok(true);
            }
            "output" => &mut self.output,
            "address" => &mut self.address,
            "state" => &mut self.state,
            "root" => &mut self.root,
            _ => return Ok(false),
        };
        *place = parser.value()?.into();
        Ok(true)
    }

    /// Measures, with the directory there.
    pub fn work(&self, measure: impl FnOnce() -> Result<()>) -> Result<()> {
        fs::create_dir(&self.scratch).with_context(|| format!("creating {}", self.scratch.display()))?;
        let measured = measure();
        fs::remove_dir_all(&self.scratch).with_context(|| format!("removing {}", self.scratch.display()))?;
        measured
    }

    /// Something in the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    /// Writes the samples that there are: a host may end at any moment.
    pub fn keep(&self, samples: &impl Serialize) -> Result<()> {
        let aside = self.output.with_extension("new");
        let keeping = || format!("writing {}", self.output.display());
        fs::write(&aside, serde_json::to_vec(samples)?).with_context(keeping)?;
        fs::rename(&aside, &self.output).with_context(keeping)
    }

    /// What is there before.
    pub fn before(&self) -> Result<Snapshot> {
        Snapshot::take(&self.scope())
    }

    /// It has to be as it was `before`.
    pub fn check(&self, before: &Snapshot) -> Result<()> {
        let left = before.settle(&self.scope(), STEP)?;
        let left: Vec<_> = left.iter().map(ToString::to_string).collect();
        ensure!(left.is_empty(), "after all rounds the host is not as before: {}", left.join("; "));
        Ok(())
    }

    fn scope(&self) -> Scope {
        let ours = ["/run/supermachine", "/var/lib/supermachine", "/run/runc", "/run/crun", "/run/netns"];
        let directories = [&self.state, &self.root].into_iter().cloned();
        Scope {
            containerd: self.address.clone(),
            directories: directories.chain(ours.map(PathBuf::from)).collect(),
            only: None,
        }
    }
}

/// Keeps why a round does not count.
pub fn note(failures: &mut Vec<String>, number: u32, error: &Error) {
    let failure = format!("round {number}: {error:#}");
    eprintln!("does not count: {failure}");
    failures.push(failure);
}
