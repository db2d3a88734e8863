//! `container-time`: the steps of a container's life, measured in the emulated host: ours, runc's and crun's in turn.
//!
//! It is its own program since it is brought into the host, and what tests bring into guests shall stay small.

mod crowd;
mod life;
mod memory;
mod saved;
mod service;
mod shim;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use integration::bench::{self, CALL, FAILURES, Host, STEP};
use integration::container_time::{Round, Samples, Saved, Side};
use integration::containerd::Api;
use lexopt::{Arg, Parser, ValueExt};

const USAGE: &str = "\
usage: container-time [OPTION]...

  --crowd N                 containers of ours that are asked for at once, afterwards (50)
  --containerd PROGRAM      containerd itself, which shims tell of events (/usr/bin/containerd)";

/// Where things are, and what is measured.
struct Bench {
    host: Host,
    crowd: u32,
    containerd: PathBuf,
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
    let mut bench =
        Bench { host: Host::new("container", 10), crowd: 50, containerd: "/usr/bin/containerd".into() };
    let mut parser = Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            Arg::Long("crowd") => bench.crowd = parser.value()?.parse()?,
            Arg::Long("containerd") => bench.containerd = parser.value()?.into(),
            Arg::Long("help") | Arg::Short('h') => {
                println!("{USAGE}\n{}", bench::OPTIONS);
                return Ok(None);
            }
            Arg::Long(name) => {
                let name = name.to_owned();
                ensure!(
                    bench.host.option(&name, &mut parser)?,
                    "--{name}: there is none\n{USAGE}\n{}",
                    bench::OPTIONS
                );
            }
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(Some(bench))
}

impl Bench {
    fn run(&self) -> Result<()> {
        self.host.work(|| self.measure())
    }

    fn measure(&self) -> Result<()> {
        let api = Api::connect(&self.host.address, &self.host.namespace, CALL)?;
        // Caches are filled, and what is made once for all containers is made, by lives that do not count.
        self.round(&api, 0).context("before the first round")?;
        let before = self.host.before()?;
        let mut samples = Samples::default();
        let mut number = 0;
        while samples.rounds.len() < self.host.rounds as usize {
            number += 1;
            match self.round(&api, number) {
                Ok(round) => samples.rounds.push(round),
                Err(error) => bench::note(&mut samples.failures, number, &error),
            }
            self.host.keep(&samples)?;
            ensure!(samples.failures.len() <= FAILURES, "{} rounds failed", samples.failures.len());
        }
        if self.crowd > 0 {
            let crowd = crowd::gather(self, self.crowd).context("many at once")?;
            eprintln!("{} at once: {:.2} s, {:.1} MiB each", crowd.count, crowd.seconds, crowd.mib_each);
            samples.crowd = Some(crowd);
            self.host.keep(&samples)?;
        }
        self.host.check(&before)
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
                self.host.rounds,
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
            self.host.rounds, service.ours, service.runc
        );
        let saved = saved::measure(self, api, number).context("a checkpoint")?;
        for Saved { mib, save, restore } in &saved {
            eprintln!(
                "{number}/{}: {mib} MiB changed: saved {save:.2}, restored {restore:.2} s",
                self.host.rounds
            );
        }
        let all = ours.zip(cold).zip(runc.zip(crun));
        all.map(|((ours, cold), (runc, crun))| Round { ours, cold, runc, crun, service, saved })
            .context("a side was left out")
    }

    /// Where containerd takes events.
    fn events(&self) -> String {
        format!("{}.ttrpc", text(&self.host.address))
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
