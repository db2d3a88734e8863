//! `network-time`: what the network of a container carries, measured in the emulated host: ours, runc's and that of a
//! machine of QEMU's in turn. The same program is at both ends.

mod answer;
mod cable;
mod contained;
mod cost;
mod figures;
mod order;
mod qemu;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use integration::command::Cmd;
use integration::containerd::Api;
use integration::guest::Initrd;
use integration::leaks::{Scope, Snapshot};
use integration::network_time::{Network, Round, Samples, Side};
use lexopt::{Arg, Parser, ValueExt};

const USAGE: &str = "\
usage: network-time [OPTION]...
       network-time serve         answer whoever measures
       network-time init          the same as the init of a machine

  --rounds N                measurements of each side (8)
  --millis N                how long each figure is measured (2000)
  --output FILE             where the samples go, after each round (network-samples.json)
  --address SOCKET          containerd's socket (/run/containerd/containerd.sock)
  --state DIR               containerd's state directory (/run/containerd)
  --root DIR                containerd's root directory (/var/lib/containerd)
  --namespace NAME          containerd's namespace to work in (default)
  --image NAME              an image (docker.io/library/busybox:latest)
  --guest DIR               the guests' kernel, and archives (/usr/share/supermachine/guest)";

/// For one call to containerd. Emulated, a task's creation takes seconds.
const CALL: Duration = Duration::from_mins(3);
/// For one step that is more than a call.
const STEP: Duration = Duration::from_mins(2);
/// More rounds that fail are no accidents of the emulation.
const FAILURES: usize = 2;

/// Where things are, and where to put one's own.
struct Bench {
    rounds: u32,
    time: Duration,
    output: PathBuf,
    address: PathBuf,
    state: PathBuf,
    root: PathBuf,
    namespace: String,
    image: String,
    guest: PathBuf,
    scratch: PathBuf,
}

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let done = match words.first().map(String::as_str) {
        Some("init") => qemu::init(),
        Some("serve") => answer::serve(),
        _ => options().and_then(|bench| bench.map_or(Ok(()), |bench| bench.run())),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("network-time: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// None when help is all that was asked for.
fn options() -> Result<Option<Bench>> {
    let mut bench = Bench {
        rounds: 8,
        time: Duration::from_secs(2),
        output: "network-samples.json".into(),
        address: "/run/containerd/containerd.sock".into(),
        state: "/run/containerd".into(),
        root: "/var/lib/containerd".into(),
        namespace: "default".into(),
        image: "docker.io/library/busybox:latest".into(),
        guest: "/usr/share/supermachine/guest".into(),
        scratch: std::env::temp_dir().join(format!("network-time-{}", std::process::id())),
    };
    let mut parser = Parser::from_env();
    while let Some(argument) = parser.next()? {
        let place = match argument {
            Arg::Long("rounds") => {
                bench.rounds = parser.value()?.parse()?;
                continue;
            }
            Arg::Long("millis") => {
                bench.time = Duration::from_millis(u64::from(parser.value()?.parse::<u16>()?));
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
            Arg::Long("state") => &mut bench.state,
            Arg::Long("root") => &mut bench.root,
            Arg::Long("guest") => &mut bench.guest,
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
        let initrd = qemu::initrd(self)?;
        // The kernel of a host that has it may not have loaded it yet.
        let loaded = Cmd::new("modprobe", STEP).arg("vhost_net").run()?;
        let vhost = Path::new("/dev/vhost-net").exists();
        if !vhost {
            eprintln!("this host has no vhost-net: {}", loaded.err().trim());
        }
        let mut samples = Samples::default();
        let (mut number, mut failed) = (0, 0);
        // Caches are filled, and what is made once for all containers is made, by a round that does not count.
        while let Err(error) = self.round(&api, &initrd, vhost, number, &mut samples.failures) {
            note(&mut samples.failures, number, &error);
            number += 1;
            failed += 1;
            ensure!(failed <= FAILURES, "{failed} rounds failed before the first one");
        }
        let scope = self.scope();
        let before = Snapshot::take(&scope)?;
        while samples.rounds.len() < self.rounds as usize {
            number += 1;
            match self.round(&api, &initrd, vhost, number, &mut samples.failures) {
                Ok(round) => samples.rounds.push(round),
                Err(error) => {
                    failed += 1;
                    note(&mut samples.failures, number, &error);
                }
            }
            self.keep(&samples)?;
            ensure!(failed <= FAILURES, "{failed} rounds failed");
        }
        let left = before.settle(&scope, STEP)?;
        let left: Vec<_> = left.iter().map(ToString::to_string).collect();
        ensure!(left.is_empty(), "after all rounds the host is not as before: {}", left.join("; "));
        Ok(())
    }

    /// Whoever goes first changes, so that none always finds the caches as one of the others left them. Without
    /// vhost-net, which does not always answer in an emulated host, a round is one still.
    fn round(
        &self,
        api: &Api,
        initrd: &Initrd,
        vhost: bool,
        number: u32,
        failures: &mut Vec<String>,
    ) -> Result<Round> {
        let mut sides = Side::ALL;
        sides.rotate_left(number as usize % Side::ALL.len());
        let (mut ours, mut runc, mut qemu, mut with_vhost) = (None, None, None, None);
        for side in sides.into_iter().filter(|side| vhost || *side != Side::Vhost) {
            let network = match side {
                Side::Ours | Side::Runc => contained::measure(self, api, side, number),
                Side::Qemu | Side::Vhost => qemu::measure(self, initrd, side),
            };
            let network = match network.with_context(|| side.name()) {
                Err(error) if side == Side::Vhost => {
                    note(failures, number, &error);
                    continue;
                }
                network => network?,
            };
            self.tell(side, number, &network);
            *match side {
                Side::Ours => &mut ours,
                Side::Runc => &mut runc,
                Side::Qemu => &mut qemu,
                Side::Vhost => &mut with_vhost,
            } = Some(network);
        }
        let nobody = "a side is missing";
        Ok(Round {
            ours: ours.context(nobody)?,
            runc: runc.context(nobody)?,
            qemu: qemu.context(nobody)?,
            vhost: with_vhost,
        })
    }

    fn tell(&self, side: Side, number: u32, network: &Network) {
        const MIB: f64 = 1024.0 * 1024.0;
        let Network { to_one, to_eight, from_one, from_eight, datagrams, arrived, answers, connections } =
            network;
        eprintln!(
            "{number}/{}: {}: to it {:.1}, {:.1}, from it {:.1}, {:.1}, datagrams {:.1} MiB/s of which {:.0} % came; \
             answers {:.3}, p99 {:.3} ms; {:.0} connections/s",
            self.rounds,
            side.name(),
            to_one.per_second / MIB,
            to_eight.per_second / MIB,
            from_one.per_second / MIB,
            from_eight.per_second / MIB,
            datagrams.per_second / MIB,
            arrived * 100.0,
            answers.median * 1e3,
            answers.p99 * 1e3,
            connections.per_second
        );
    }

    /// A host may end at any moment: the rounds until then are kept.
    fn keep(&self, samples: &Samples) -> Result<()> {
        let aside = self.output.with_extension("new");
        let keeping = || format!("writing {}", self.output.display());
        fs::write(&aside, serde_json::to_vec(samples)?).with_context(keeping)?;
        fs::rename(&aside, &self.output).with_context(keeping)
    }

    fn scope(&self) -> Scope {
        let ours = ["/run/supermachine", "/var/lib/supermachine", "/run/runc", "/run/netns"];
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
}

/// Keeps what went wrong in a round.
fn note(failures: &mut Vec<String>, number: u32, error: &anyhow::Error) {
    let failure = format!("round {number}: {error:#}");
    eprintln!("does not count: {failure}");
    failures.push(failure);
}
