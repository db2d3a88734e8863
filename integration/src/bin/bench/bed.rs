//! Starting the emulated host: restored from its saved state (ours) and booted (the peer).
//!
//! Measured as a user sees it: from typing `hack/testbed run -- true` to the prompt.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use integration::bed::Bed;
use integration::command::{Cmd, printable};
use report::{Comparison, Report};

use crate::Options;

/// For one run on a cache that is complete.
const RUN: Duration = Duration::from_mins(5);
/// For the first one, which builds what is missing.
const FIRST: Duration = Duration::from_hours(1);

pub(crate) fn measure(options: &Options) -> Result<Report> {
    let mut report = Report::default();
    for arch in &options.archs {
        let tool = options.testbed.canonicalize().with_context(|| {
            format!("finding {}; name the tool with --testbed", options.testbed.display())
        })?;
        let bed = Bed { tool, arch: arch.clone(), cache: "/nowhere".into() };
        report.results.push(one(&bed, options.runs)?);
    }
    Ok(report)
}

fn one(bed: &Bed, runs: u32) -> Result<Comparison> {
    eprintln!("{}: a first run, to complete the cache", bed.arch);
    time(bed, &[], FIRST)?;
    let (mut restores, mut boots) = (Vec::new(), Vec::new());
    for number in 1..=runs {
        // The side that goes first changes, so that neither always finds the caches as the other left them.
        let in_turn: [(&[&str], &mut Vec<f64>); 2] = [(&[], &mut restores), (&["--cold"], &mut boots)];
        let mut in_turn = Vec::from(in_turn);
        if number % 2 == 0 {
            in_turn.reverse();
        }
        for (flags, samples) in in_turn {
            samples.push(time(bed, flags, RUN)?);
        }
        if let (Some(restore), Some(boot)) = (restores.last(), boots.last()) {
            eprintln!("{}: {number}/{runs}: restore {restore:.2} s, boot {boot:.2} s", bed.arch);
        }
    }
    let name = format!("start to end of `true`, {}", bed.arch);
    Comparison::of(name, "s", &restores, Some(("boot", &boots))).context("summing up the samples")
}

/// The time of a run in which the tool had nothing else to do. What it says of itself begins with `::`; it
/// does so when it builds something or waits for another run that does.
fn time(bed: &Bed, flags: &[&str], deadline: Duration) -> Result<f64> {
    const TRIES: usize = 5;
    for _ in 0..TRIES {
        let done = bed.run(Cmd::new(&bed.tool, deadline), flags, ["true"]).ok()?;
        let (took, said) = (done.took.as_secs_f64(), done.err());
        match said.lines().find(|line| line.starts_with("::")) {
            None => return Ok(took),
            Some(line) => eprintln!("{}: not counted, {took:.2} s: {}", bed.arch, printable(line)),
        }
    }
    bail!("the tool did something besides running the host in each of {TRIES} runs; is its cache in use?")
}
