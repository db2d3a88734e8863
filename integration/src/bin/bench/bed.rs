//! Starting the emulated host: restored from its saved state (ours) and booted (the peer).
//!
//! Measured as a user sees it: from typing `hack/testbed run -- true` to the prompt.

use std::time::Duration;

use anyhow::{Context, Result};
use integration::bed::Bed;
use integration::command::Cmd;
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

fn time(bed: &Bed, flags: &[&str], deadline: Duration) -> Result<f64> {
    let done = bed.run(Cmd::new(&bed.tool, deadline), flags, ["true"]).ok()?;
    Ok(done.took.as_secs_f64())
}
