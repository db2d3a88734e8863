//! What the network of a container carries, side by side with runc's and with that of a machine of QEMU's, in the
//! emulated host.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use integration::bed::TOOL_FAILED;
use integration::command::Cmd;
use integration::network_time::{Cost, Network, Round, Samples};
use report::{Comparison, Report};

use crate::Options;

/// For the rounds that one host makes.
const ALL: Duration = Duration::from_hours(2);
/// So many hosts may end by themselves.
const HOSTS: u32 = 4;
/// The one whose networks are mostly in use.
const CONTAINERD: &str = "2.1";

const MIB: f64 = 1024.0 * 1024.0;

type Figure = fn(&Network) -> f64;
type Peer = fn(&Round) -> Option<&Network>;

/// What is compared, in which unit.
const FIGURES: [(&str, &str, Figure); 9] = [
    ("TCP to the container, 1 stream", "MiB/s", |network| network.to_one.per_second / MIB),
    ("TCP to the container, 8 streams", "MiB/s", |network| network.to_eight.per_second / MIB),
    ("TCP from the container, 1 stream", "MiB/s", |network| network.from_one.per_second / MIB),
    ("TCP from the container, 8 streams", "MiB/s", |network| network.from_eight.per_second / MIB),
    ("UDP from the container, what arrived", "MiB/s", |network| network.datagrams.per_second / MIB),
    ("UDP from the container, share that arrived", "%", |network| network.arrived * 100.0),
    ("one byte there and back, median", "ms", |network| network.answers.median * 1e3),
    ("one byte there and back, p99", "ms", |network| network.answers.p99 * 1e3),
    ("connections", "1/s", |network| network.connections.per_second),
];

/// Beside whom.
const PEERS: [(&str, Peer); 3] = [
    ("runc", |round| Some(&round.runc)),
    ("QEMU", |round| Some(&round.qemu)),
    ("QEMU with vhost", |round| round.vhost.as_ref()),
];

type Part = fn(&Network) -> &Cost;
type Amount = fn(&Cost) -> f64;

/// Large packets and small ones are told apart by what they carry, and those that are all small by their number.
const MIBS: (&str, Amount) = ("MiB", |cost| float(cost.bytes) / MIB);
const PACKETS: (&str, Amount) = ("packet", |cost| float(cost.packets));

/// Of what it is told what it took, and for how much.
const COSTS: [(&str, Part, (&str, Amount)); 5] = [
    ("TCP to the container, 1 stream", |network| &network.to_one.cost, MIBS),
    ("TCP from the container, 1 stream", |network| &network.from_one.cost, MIBS),
    ("UDP from the container", |network| &network.datagrams.cost, MIBS),
    ("one byte there and back", |network| &network.answers.cost, PACKETS),
    ("connections", |network| &network.connections.cost, PACKETS),
];

pub(crate) fn measure(options: &Options) -> Result<Report> {
    let mut report = Report::default();
    for arch in &options.archs {
        let rounds = rounds(options, arch).with_context(|| format!("measuring on {arch}"))?;
        show(&mut report, arch, &rounds)?;
        show_costs(&mut report, arch, &rounds)?;
    }
    Ok(report)
}

fn show(report: &mut Report, arch: &str, rounds: &[Round]) -> Result<()> {
    for (name, unit, figure) in FIGURES {
        let ours: Vec<f64> = rounds.iter().map(|round| figure(&round.ours)).collect();
        for (peer, side) in PEERS {
            let theirs: Vec<f64> = rounds.iter().filter_map(side).map(figure).collect();
            if !theirs.is_empty() {
                let name = format!("{name}, beside {peer}, {arch}");
                report.results.push(Comparison::of(name, unit, &ours, Some((peer, &theirs)))?);
            }
        }
    }
    Ok(())
}

/// What the monitors of the machines take.
fn show_costs(report: &mut Report, arch: &str, rounds: &[Round]) -> Result<()> {
    let sides: [(&str, Peer); 2] = [("ours", |round| Some(&round.ours)), ("QEMU", |round| Some(&round.qemu))];
    for (name, part, (each, amount)) in COSTS {
        let of = |side: Peer, value: &dyn Fn(&Cost) -> f64| -> Vec<f64> {
            rounds.iter().filter_map(side).map(|network| value(part(network))).collect()
        };
        let exits =
            |cost: &Cost| float(cost.machine.get("exits").copied().unwrap_or(0)) / amount(cost).max(1e-6);
        let time = |cost: &Cost| cost.threads.values().sum::<f64>() * 1e3 / amount(cost).max(1e-6);
        let pairs = [
            ("exits", "exits", sides.map(|(_, side)| of(side, &exits))),
            ("processor time", "ms", sides.map(|(_, side)| of(side, &time))),
        ];
        for (what, unit, [ours, qemu]) in pairs {
            let name = format!("{what} for each {each}, {name}, {arch}");
            report.results.push(Comparison::of(name, unit, &ours, Some(("QEMU", &qemu)))?);
        }
        for (who, side) in sides {
            let sizes = of(side, &|cost| float(cost.bytes) / float(cost.packets.max(1)));
            let title = format!("{who}: a packet, {name}, {arch}");
            report.results.push(Comparison::of(title, "B", &sizes, None)?);
            let costs = || rounds.iter().filter_map(side).map(part);
            let threads: BTreeSet<&String> = costs().flat_map(|cost| cost.threads.keys()).collect();
            for thread in threads {
                let times = of(side, &|cost| cost.threads.get(thread).copied().unwrap_or(0.0) * 1e3);
                let title = format!("{who}: processor time of {thread}, {name}, {arch}");
                report.results.push(Comparison::of(title, "ms", &times, None)?);
            }
        }
    }
    Ok(())
}

#[allow(clippy::cast_precision_loss, reason = "nothing is counted up to 2^52")]
fn float(count: u64) -> f64 {
    count as f64
}

/// Has the rounds made in the host by the program in the shared directory. Where a host ends by itself, another goes on.
fn rounds(options: &Options, arch: &str) -> Result<Vec<Round>> {
    let share = options.share.join(arch);
    let file = share.join("network-samples.json");
    let mut all = Samples::default();
    for _ in 0..HOSTS {
        let left = options.runs.saturating_sub(u32::try_from(all.rounds.len())?);
        if left == 0 {
            break;
        }
        let _ = fs::remove_file(&file);
        let ended = Cmd::new(&options.testbed, ALL)
            .args(["--arch", arch, "--containerd", CONTAINERD, "--share"])
            .arg(&share)
            .args(["run", "--", "/share/network-time", "--rounds", &left.to_string()])
            .args(["--output", "/share/network-samples.json"])
            .traced()
            .run()
            .context("measuring networks in the emulated host")?;
        if ended.code() != Some(TOOL_FAILED) {
            ended.expect_code(0)?;
        }
        // A host that has ended before its first round is over has left none.
        if let Ok(text) = fs::read(&file) {
            let samples: Samples = serde_json::from_slice(&text)
                .with_context(|| format!("{} is not what was measured", file.display()))?;
            all.rounds.extend(samples.rounds);
            all.failures.extend(samples.failures);
        }
    }
    for failure in &all.failures {
        eprintln!("{arch}: does not count: {failure}");
    }
    if all.rounds.len() < options.runs as usize {
        bail!(
            "{HOSTS} hosts have ended by themselves; {} of {} rounds were made",
            all.rounds.len(),
            options.runs
        );
    }
    Ok(all.rounds)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use integration::network_time::Rate;

    fn network(mib: f64) -> Network {
        let cost = Cost {
            packets: 100,
            bytes: 1 << 18,
            threads: BTreeMap::from([("vcpu".to_owned(), 0.5)]),
            machine: BTreeMap::from([("exits".to_owned(), 400)]),
        };
        Network { to_one: Rate { per_second: mib * MIB, cost }, arrived: 0.5, ..Network::default() }
    }

    #[test]
    fn each_figure_is_compared_with_whoever_is_there() {
        let round = |vhost| Round { ours: network(50.0), runc: network(200.0), qemu: network(25.0), vhost };
        let mut report = Report::default();
        show(&mut report, "x86_64", &[round(None)]).unwrap();
        assert_eq!(report.results.len(), FIGURES.len() * 2);
        let mut report = Report::default();
        let rounds = [round(Some(network(100.0)))];
        show(&mut report, "x86_64", &rounds).unwrap();
        show_costs(&mut report, "x86_64", &rounds).unwrap();
        let found = |name: &str| report.results.iter().find(|result| result.name == name).unwrap();
        for (peer, ratio) in [("runc", 0.25), ("QEMU", 2.0), ("QEMU with vhost", 0.5)] {
            let name = format!("TCP to the container, 1 stream, beside {peer}, x86_64");
            assert_eq!(found(&name).ratio, Some(ratio), "{peer}");
        }
        let exits = found("exits for each packet, connections, x86_64");
        assert_eq!((exits.ours.median, exits.ratio), (0.0, None));
        let exits = found("exits for each MiB, TCP to the container, 1 stream, x86_64");
        assert!((exits.ours.median - 400.0 / 0.25).abs() < 1e-6);
        let time = found("ours: processor time of vcpu, TCP to the container, 1 stream, x86_64");
        assert!((time.ours.median - 500.0).abs() < 1e-9);
    }
}
