//! A machine to its init: ours beside QEMU's smallest, both in the emulated host.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use integration::boot_time::{Phases, Sample, Samples};
use integration::command::Cmd;
use report::{Comparison, Report};

use crate::Options;

/// For all boots of an architecture.
const ALL: Duration = Duration::from_hours(1);

type Part = fn(&Phases) -> f64;

/// What our time is made of, in order.
const PARTS: [(&str, Part); 7] = [
    ("process", |phases| phases.process),
    ("prepare", |phases| phases.prepare),
    ("KVM", |phases| phases.hypervisor),
    ("load, beside KVM", |phases| phases.load),
    ("build, with both", |phases| phases.build),
    ("kernel", |phases| phases.kernel),
    ("init", |phases| phases.init),
];

pub(crate) fn measure(options: &Options) -> Result<Report> {
    let mut report = Report::default();
    for arch in &options.archs {
        let samples = samples(options, arch).with_context(|| format!("measuring on {arch}"))?;
        let peer = if arch == "aarch64" { "QEMU virt" } else { "QEMU microvm" };
        let seconds = |of: &[Sample]| of.iter().map(|sample| sample.seconds).collect::<Vec<_>>();
        let (ours, theirs) = (seconds(&samples.ours), seconds(&samples.qemu));
        let name = format!("boot to init, {arch}");
        report.results.push(Comparison::of(name, "s", &ours, Some((peer, &theirs)))?);
        let own: Vec<f64> = samples.ours.iter().filter_map(|sample| sample.own_mib).collect();
        let name = format!("the monitor's own memory, {arch}");
        report.results.push(Comparison::of(name, "MiB", &own, None)?);
        let phases: Vec<Phases> = samples.ours.iter().filter_map(|sample| sample.phases).collect();
        for (name, part) in PARTS {
            let millis: Vec<f64> = phases.iter().map(|phases| part(phases) * 1e3).collect();
            report.results.push(Comparison::of(format!("ours: {name}, {arch}"), "ms", &millis, None)?);
        }
    }
    Ok(report)
}

/// Has the boots made in the host by the program in the shared directory, and reads what came out.
fn samples(options: &Options, arch: &str) -> Result<Samples> {
    let share = options.share.join(arch);
    let file = share.join("boot-samples.json");
    Cmd::new(&options.testbed, ALL)
        .args(["--arch", arch, "--share"])
        .arg(&share)
        .args(["run", "--", "/share/guest-part", "boot-time", &options.runs.to_string()])
        .args(["/share/boot-samples.json"])
        .traced()
        .ok()
        .context("booting in the emulated host")?;
    let text = fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is not what was measured", file.display()))
}
