//! `network-time`: what the network of a container carries, measured in the emulated host: ours, runc's and that of a
//! machine of QEMU's in turn. The same program is at both ends.

mod answer;
mod cable;
mod contained;
mod cost;
mod figures;
mod order;
mod qemu;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration::bench::{self, CALL, FAILURES, Host, STEP, note};
use integration::command::Cmd;
use integration::containerd::Api;
use integration::guest::Initrd;
use integration::network_time::{Network, Round, Samples, Side};
use lexopt::{Arg, Parser, ValueExt};

const USAGE: &str = "\
usage: network-time [OPTION]...
       network-time serve         answer whoever measures
       network-time init          the same as the init of a machine

  --millis N                how long each figure is measured (2000)
  --guest DIR               the guests' kernel, and archives (/usr/share/supermachine/guest)";

/// Where things are, and how long to measure.
struct Bench {
    host: Host,
    time: Duration,
    guest: PathBuf,
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
        host: Host::new("network", 8),
        time: Duration::from_secs(2),
        guest: "/usr/share/supermachine/guest".into(),
    };
    let mut parser = Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            Arg::Long("millis") => {
                bench.time = Duration::from_millis(u64::from(parser.value()?.parse::<u16>()?));
            }
            Arg::Long("guest") => bench.guest = parser.value()?.into(),
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
        let before = self.host.before()?;
        while samples.rounds.len() < self.host.rounds as usize {
            number += 1;
            match self.round(&api, &initrd, vhost, number, &mut samples.failures) {
                Ok(round) => samples.rounds.push(round),
                Err(error) => {
                    failed += 1;
                    note(&mut samples.failures, number, &error);
                }
            }
            self.host.keep(&samples)?;
            ensure!(failed <= FAILURES, "{failed} rounds failed");
        }
        self.host.check(&before)
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
            self.host.rounds,
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
}
