//! The steps of a container's life, side by side with runc and crun, in the emulated host.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use integration::bed::TOOL_FAILED;
use integration::command::Cmd;
use integration::container_time::{Crowd, Life, Round, Samples, Saved};
use report::{Comparison, Report};

use crate::Options;

/// For the rounds that one host makes.
const ALL: Duration = Duration::from_hours(2);
/// So many hosts may end by themselves.
const HOSTS: u32 = 4;

type Step = fn(&Life) -> f64;
type Side = fn(&Round) -> &Life;

/// What is shown of a life, in milliseconds. The shim of runc and crun is the same program.
const STEPS: [(&str, Step, bool); 6] = [
    ("a shim's start", |life| life.shim_start, false),
    ("Create", |life| life.create, true),
    ("Start", |life| life.start, true),
    ("Create to first output", |life| life.first_output, true),
    ("Exec to first output", |life| life.exec, true),
    ("end to deleted", |life| life.delete, true),
];

/// In MiB.
const MEMORY: [(&str, Step); 2] =
    [("memory, without the guest's", |life| life.own_mib), ("memory, with the guest's", |life| life.all_mib)];

/// What a container's life takes, and what restoring its machine is worth.
pub(crate) fn measure(options: &Options) -> Result<(Report, Report)> {
    let (mut life, mut restored) = (Report::default(), Report::default());
    for arch in &options.archs {
        let (rounds, crowd) = rounds(options, arch).with_context(|| format!("measuring on {arch}"))?;
        show(&mut life, arch, &rounds)?;
        show_restored(&mut restored, arch, &rounds)?;
        if let Some(crowd) = crowd {
            show_crowd(&mut restored, arch, crowd)?;
        }
    }
    Ok((life, restored))
}

/// A machine from a template, beside one that boots, and beside runc.
fn show_restored(report: &mut Report, arch: &str, rounds: &[Round]) -> Result<()> {
    let values = |side: Side, step: Step, scale: f64| -> Vec<f64> {
        rounds.iter().map(|round| step(side(round)) * scale).collect()
    };
    let sides: [(&str, Side); 2] = [("cold", |round| &round.cold), ("runc", |round| &round.runc)];
    let steps: [(&str, &str, Step, f64); 3] = [
        ("Create", "ms", |life| life.create, 1e3),
        ("Create to first output", "ms", |life| life.first_output, 1e3),
        ("memory, with the guest's", "MiB", |life| life.all_mib, 1.0),
    ];
    for (name, unit, step, scale) in steps {
        let own = values(|round| &round.ours, step, scale);
        for (peer, side) in sides {
            let theirs = values(side, step, scale);
            let name = format!("{name}, restored, beside {peer}, {arch}");
            report.results.push(Comparison::of(name, unit, &own, Some((peer, &theirs)))?);
        }
    }
    let [ours, runc] = [|round: &Round| round.service.ours, |round: &Round| round.service.runc]
        .map(|time| rounds.iter().map(|round| time(round) * 1e3).collect::<Vec<_>>());
    let name = format!("Create to a service's first answer, warm, {arch}");
    report.results.push(Comparison::of(name, "ms", &ours, Some(("runc", &runc)))?);
    for (index, saved) in rounds.first().into_iter().flat_map(|round| round.saved.iter().enumerate()) {
        let of = |time: fn(&Saved) -> f64| -> Vec<f64> {
            rounds.iter().filter_map(|round| round.saved.get(index)).map(|saved| time(saved) * 1e3).collect()
        };
        let name = |what: &str| format!("a checkpoint with {} MiB changed: {what}, {arch}", saved.mib);
        report.results.push(Comparison::of(name("written"), "ms", &of(|saved| saved.save), None)?);
        report.results.push(Comparison::of(name("restored"), "ms", &of(|saved| saved.restore), None)?);
    }
    let sides: [(&str, Side); 2] = [("restored", |round| &round.ours), ("cold", |round| &round.cold)];
    for (name, side) in sides {
        for phase in phases(rounds, side) {
            let millis = millis(rounds, side, &phase);
            report.results.push(Comparison::of(format!("{name}: {phase}, {arch}"), "ms", &millis, None)?);
        }
    }
    Ok(())
}

fn show_crowd(report: &mut Report, arch: &str, crowd: Crowd) -> Result<()> {
    let Crowd { count, seconds, mib_each } = crowd;
    let of = |what: &str| format!("{count} at once: {what}, {arch}");
    report.results.push(Comparison::of(of("all have said something"), "ms", &[seconds * 1e3], None)?);
    report.results.push(Comparison::of(of("memory of each"), "MiB", &[mib_each], None)?);
    Ok(())
}

fn show(report: &mut Report, arch: &str, rounds: &[Round]) -> Result<()> {
    let values = |side: Side, step: Step, scale: f64| -> Vec<f64> {
        rounds.iter().map(|round| step(side(round)) * scale).collect()
    };
    let (ours, runc, crun): (Side, Side, Side) =
        (|round| &round.ours, |round| &round.runc, |round| &round.crun);
    let mut add = |name: String, unit: &str, step: Step, scale: f64, peer: (&str, Side)| -> Result<()> {
        let (own, theirs) = (values(ours, step, scale), values(peer.1, step, scale));
        report.results.push(Comparison::of(name, unit, &own, Some((peer.0, &theirs)))?);
        Ok(())
    };
    for (name, step, with_crun) in STEPS {
        add(format!("{name}, {arch}"), "ms", step, 1e3, ("runc", runc))?;
        if with_crun {
            add(format!("{name}, beside crun, {arch}"), "ms", step, 1e3, ("crun", crun))?;
        }
    }
    for (name, step) in MEMORY {
        add(format!("{name}, {arch}"), "MiB", step, 1.0, ("runc", runc))?;
    }
    for name in phases(rounds, ours) {
        let millis = millis(rounds, ours, &name);
        report.results.push(Comparison::of(format!("ours: {name}, {arch}"), "ms", &millis, None)?);
    }
    Ok(())
}

/// The phases of a creation of ours, in the order in which they begin.
fn phases(rounds: &[Round], side: Side) -> Vec<String> {
    let mut first = rounds.first().map(|round| side(round).phases.clone()).unwrap_or_default();
    first.sort_by(|a, b| a.from_ms.total_cmp(&b.from_ms));
    first.into_iter().map(|phase| phase.name).collect()
}

fn millis(rounds: &[Round], side: Side, name: &str) -> Vec<f64> {
    let of = |round: &Round| side(round).phases.iter().find(|phase| phase.name == name).map(|phase| phase.ms);
    rounds.iter().filter_map(of).collect()
}

/// Has the rounds made in the host by the program in the shared directory. Where a host ends by itself, another goes on.
fn rounds(options: &Options, arch: &str) -> Result<(Vec<Round>, Option<Crowd>)> {
    let share = options.share.join(arch);
    let file = share.join("container-samples.json");
    let (mut rounds, mut failures, mut crowd) = (Vec::new(), Vec::new(), None);
    for _ in 0..HOSTS {
        let left = options.runs.saturating_sub(u32::try_from(rounds.len())?);
        if left == 0 {
            break;
        }
        let _ = fs::remove_file(&file);
        let ended = Cmd::new(&options.testbed, ALL)
            .args(["--arch", arch, "--share"])
            .arg(&share)
            .args(["run", "--", "/share/container-time", "--rounds", &left.to_string()])
            .args(["--output", "/share/container-samples.json"])
            .traced()
            .run()
            .context("running containers in the emulated host")?;
        if ended.code() != Some(TOOL_FAILED) {
            ended.expect_code(0)?;
        }
        // A host that has ended before its first round is over has left none.
        if let Ok(text) = fs::read(&file) {
            let samples: Samples = serde_json::from_slice(&text)
                .with_context(|| format!("{} is not what was measured", file.display()))?;
            rounds.extend(samples.rounds);
            failures.extend(samples.failures);
            crowd = samples.crowd;
        }
    }
    for failure in failures {
        eprintln!("{arch}: does not count: {failure}");
    }
    if rounds.len() < options.runs as usize {
        bail!(
            "{HOSTS} hosts have ended by themselves; {} of {} rounds were made",
            rounds.len(),
            options.runs
        );
    }
    Ok((rounds, crowd))
}

#[cfg(test)]
mod tests {
    use super::*;
    use integration::container_time::{Phase, Service};

    fn life(create: f64, phases: &[(&str, f64)]) -> Life {
        let phases =
            phases.iter().map(|(name, from)| Phase { name: (*name).into(), from_ms: *from, ms: 5.0 });
        Life {
            shim_start: 0.1,
            create,
            start: 0.1,
            first_output: create,
            exec: 0.1,
            delete: 0.1,
            own_mib: 10.0,
            all_mib: 20.0,
            phases: phases.collect(),
        }
    }

    #[test]
    fn each_step_is_compared_with_both_and_phases_stand_alone() {
        let round = Round {
            ours: life(3.0, &[("kernel", 2.0), ("create", 0.0)]),
            cold: life(30.0, &[("kernel", 1.0)]),
            runc: life(1.0, &[]),
            crun: life(0.5, &[]),
            service: Service { ours: 1.0, runc: 4.0 },
            saved: vec![Saved { mib: 64, save: 1.0, restore: 2.0 }],
        };
        let mut report = Report::default();
        let rounds = [round.clone(), round];
        show(&mut report, "x86_64", &rounds).unwrap();
        let mut restored = Report::default();
        show_restored(&mut restored, "x86_64", &rounds).unwrap();
        let create =
            restored.results.iter().find(|result| result.name == "Create, restored, beside cold, x86_64");
        assert_eq!(create.unwrap().ratio, Some(0.1));
        assert_eq!(restored.results.last().unwrap().name, "cold: kernel, x86_64");
        assert_eq!(restored.results.len(), 6 + 1 + 2 + 2 + 1);
        assert_eq!(restored.results[8].name, "a checkpoint with 64 MiB changed: restored, x86_64");
        assert_eq!(restored.results[6].ratio, Some(0.25));
        let found = |name: &str| report.results.iter().find(|result| result.name == name).unwrap();
        assert_eq!(found("Create, x86_64").ratio, Some(3.0));
        assert_eq!(found("Create, beside crun, x86_64").ratio, Some(6.0));
        assert!((found("Create, x86_64").ours.median - 3000.0).abs() < 1e-6);
        let names: Vec<_> = report.results.iter().map(|result| result.name.as_str()).collect();
        assert_eq!(names[names.len() - 2..], ["ours: create, x86_64", "ours: kernel, x86_64"]);
        assert_eq!(names.len(), 6 + 5 + 2 + 2);
    }
}
