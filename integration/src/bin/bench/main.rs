//! Benchmarks: ours and a peer, measured in turn, written in the one schema to `target/bench/NAME.json`.

mod bed;
mod boot;
mod container;
mod network;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use lexopt::{Arg, Parser, ValueExt};

const USAGE: &str = "\
usage: bench bed|boot|container|network [OPTION]...

  bed                       restoring the emulated host, compared with booting it
  boot                      a machine of ours to its init, compared with QEMU's, in that host
  container                 the steps of a container's life, compared with runc and crun, in that host; and a
                            machine from a template, compared with one that boots (snapshot.json)
  network                   what a container's network carries, compared with runc and QEMU, in that host

  --runs N                  samples of each side (10)
  --arch ARCH[,ARCH]        x86_64, aarch64 (this machine's)
  --testbed PROGRAM         the tool that runs emulated hosts (hack/testbed)
  --share DIR               DIR/ARCH has guest-part, container-time and network-time for that host
                            (target/bench)
  --output DIR              where the results go (target/bench)";

/// What all benchmarks take.
struct Options {
    runs: u32,
    archs: Vec<String>,
    testbed: PathBuf,
    share: PathBuf,
    output: PathBuf,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut parser = Parser::from_env();
    let mut options = Options {
        runs: 10,
        archs: vec![std::env::consts::ARCH.into()],
        testbed: "hack/testbed".into(),
        share: "target/bench".into(),
        output: "target/bench".into(),
    };
    let mut names = Vec::new();
    while let Some(argument) = parser.next()? {
        match argument {
            Arg::Value(name) => names.push(name.string()?),
            Arg::Long("runs") => options.runs = parser.value()?.parse()?,
            Arg::Long("arch") => {
                options.archs = parser.value()?.string()?.split(',').map(str::to_owned).collect();
            }
            Arg::Long("testbed") => options.testbed = parser.value()?.into(),
            Arg::Long("share") => options.share = parser.value()?.into(),
            Arg::Long("output") => options.output = parser.value()?.into(),
            Arg::Long("help") | Arg::Short('h') => {
                println!("{USAGE}");
                return Ok(());
            }
            other => return Err(other.unexpected().into()),
        }
    }
    if options.runs == 0 {
        bail!("--runs 0 measures nothing");
    }
    if names.is_empty() {
        bail!("which benchmark?\n{USAGE}");
    }
    for name in &names {
        let reports = match name.as_str() {
            "bed" => vec![("bed", bed::measure(&options)?)],
            "boot" => vec![("boot", boot::measure(&options)?)],
            "container" => {
                let (life, restored) = container::measure(&options)?;
                vec![("container", life), ("snapshot", restored)]
            }
            "network" => vec![("network", network::measure(&options)?)],
            other => bail!("there is no benchmark {other}\n{USAGE}"),
        };
        for (name, report) in reports {
            let path = options.output.join(format!("{name}.json"));
            report.write(&path).context("keeping the results")?;
            println!("results: {}", path.display());
        }
    }
    Ok(())
}
