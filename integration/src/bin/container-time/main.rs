//! `container-time`: the steps of a container's life, measured in the emulated host: ours, runc's and crun's in turn.
//!
//! It is its own program since it is brought into the host, and what tests bring into guests shall stay small.

mod crowd;
mod life;
mod memory;
mod saved;
mod service;
mod shim;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use integration::container_time::{Round, Samples, Saved, Side};
use integration::containerd::Api;
use integration::leaks::{Scope, Snapshot};
use lexopt::{Arg, Parser, ValueExt};

const USAGE: &str = "\
usage: container-time [OPTION]...

  --rounds N                lives of each side (10)
  --crowd N                 containers of ours that are asked for at once, afterwards (50)
  --output FILE             where the samples go, after each round (container-samples.json)
  --address SOCKET          containerd's socket (/run/containerd/containerd.sock)
  --containerd PROGRAM      containerd itself, which shims tell of events (/usr/bin/containerd)
  --state DIR               containerd's state directory (/run/containerd)
  --root DIR                containerd's root directory (/var/lib/containerd)
  --namespace NAME          containerd's namespace to work in (default)
  --image NAME              an image with a busybox (docker.io/library/busybox:latest)";

/// For one call to containerd. Emulated, a task's creation takes seconds.
const CALL: Duration = Duration::from_mins(3);
/// For one step that is more than a call.
const STEP: Duration = Duration::from_mins(2);
/// More rounds that fail are no accidents of the emulation.
const FAILURES: usize = 2;

/// Where things are, and where to put one's own.
struct Bench {
    rounds: u32,
    crowd: u32,
    output: PathBuf,
    address: PathBuf,
    containerd: PathBuf,
    state: PathBuf,
    root: PathBuf,
    namespace: String,
    image: String,
    scratch: PathBuf,
}

fn main() -> ExitCode {
    match options().and_then(|bench| bench.map_or(Ok(()), |bench| bench.run())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("container-time: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// None when help is all that was asked for.
fn options() -> Result<Option<Bench>> {
    let mut bench = Bench {
        rounds: 10,
        crowd: 50,
        output: "container-samples.json".into(),
        address: "/run/containerd/containerd.sock".into(),
        containerd: "/usr/bin/containerd".into(),
        state: "/run/containerd".into(),
        root: "/var/lib/containerd".into(),
        namespace: "default".into(),
        image: "docker.io/library/busybox:latest".into(),
        scratch: std::env::temp_dir().join(format!("container-time-{}", std::process::id())),
    };
    let mut parser = Parser::from_env();
    while let Some(argument) = parser.next()? {
        let place = match argument {
            Arg::Long("rounds") => {
                bench.rounds = parser.value()?.parse()?;
                continue;
            }
            Arg::Long("crowd") => {
                bench.crowd = parser.value()?.parse()?;
                continue;
            }
            Arg::Long("namespace") => {
                bench.namespace = parser.value()?.string()?;
                continue;
            }
            Arg::Long("image") => {
                bench.image = parser.value()?.string()?;
                continue;
            }
            Arg::Long("help") | Arg::Short('h') => {
                println!("{USAGE}");
                return Ok(None);
            }
            Arg::Long("output") => &mut bench.output,
            Arg::Long("address") => &mut bench.address,
            Arg::Long("containerd") => &mut bench.containerd,
            Arg::Long("state") => &mut bench.state,
            Arg::Long("root") => &mut bench.root,
            other => bail!("{}\n{USAGE}", other.unexpected()),
        };
        *place = parser.value()?.into();
    }
    Ok(Some(bench))
}

impl Bench {
    fn run(&self) -> Result<()> {
        fs::create_dir(&self.scratch).with_context(|| format!("creating {}", self.scratch.display()))?;
        let measured = self.measure();
        fs::remove_dir_all(&self.scratch).with_context(|| format!("removing {}", self.scratch.display()))?;
        measured
    }

    fn measure(&self) -> Result<()> {
        let api = Api::connect(&self.address, &self.namespace, CALL)?;
        // Caches are filled, and what is made once for all containers is made, by lives that do not count.
        self.round(&api, 0).context("before the first round")?;
        let scope = self.scope();
        let before = Snapshot::take(&scope)?;
        let mut samples = Samples::default();
        let mut number = 0;
        while samples.rounds.len() < self.rounds as usize {
            number += 1;
            match self.round(&api, number) {
                Ok(round) => samples.rounds.push(round),
                Err(error) => {
                    let failure = format!("round {number}: {error:#}");
                    eprintln!("does not count: {failure}");
                    samples.failures.push(failure);
                }
            }
            self.keep(&samples)?;
            ensure!(samples.failures.len() <= FAILURES, "{} rounds failed", samples.failures.len());
        }
        if self.crowd > 0 {
            let crowd = crowd::gather(self, self.crowd).context("many at once")?;
            eprintln!("{} at once: {:.2} s, {:.1} MiB each", crowd.count, crowd.seconds, crowd.mib_each);
            samples.crowd = Some(crowd);
            self.keep(&samples)?;
        }
        let left = before.settle(&scope, STEP)?;
        let left: Vec<_> = left.iter().map(ToString::to_string).collect();
        ensure!(left.is_empty(), "after all rounds the host is not as before: {}", left.join("; "));
        Ok(())
    }

    /// Whoever goes first changes, so that none always finds the caches as one of the others left them.
    fn round(&self, api: &Api, number: u32) -> Result<Round> {
        let mut sides = Side::ALL;
        sides.rotate_left(number as usize % Side::ALL.len());
        let (mut ours, mut cold, mut runc, mut crun) = (None, None, None, None);
        for side in sides {
            let life = life::live(self, api, side, number).with_context(|| side.name())?;
            eprintln!(
                "{number}/{}: {}: shim {:.2}, create {:.2}, start {:.2}, output {:.2}, exec {:.2}, delete {:.2} s; \
                 {:.1} MiB",
                self.rounds,
                side.name(),
                life.shim_start,
                life.create,
                life.start,
                life.first_output,
                life.exec,
                life.delete,
                life.own_mib
            );
            *match side {
                Side::Ours => &mut ours,
                Side::Cold => &mut cold,
                Side::Runc => &mut runc,
                Side::Crun => &mut crun,
            } = Some(life);
        }
        let service = service::start(self, api, number)?;
        eprintln!(
            "{number}/{}: a service: warm {:.2}, runc {:.2} s",
            self.rounds, service.ours, service.runc
        );
        let saved = saved::measure(self, api, number).context("a checkpoint")?;
        for Saved { mib, save, restore } in &saved {
            eprintln!(
                "{number}/{}: {mib} MiB changed: saved {save:.2}, restored {restore:.2} s",
                self.rounds
            );
        }
        let all = ours.zip(cold).zip(runc.zip(crun));
        all.map(|((ours, cold), (runc, crun))| Round { ours, cold, runc, crun, service, saved })
            .context("a side was left out")
    }

    /// A host may end at any moment: the rounds until then are kept.
    fn keep(&self, samples: &Samples) -> Result<()> {
        let aside = self.output.with_extension("new");
        let keeping = || format!("writing {}", self.output.display());
        fs::write(&aside, serde_json::to_vec(samples)?).with_context(keeping)?;
        fs::rename(&aside, &self.output).with_context(keeping)
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

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    /// Where containerd takes events.
    fn events(&self) -> String {
        format!("{}.ttrpc", text(&self.address))
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
