//! One round of one test, in a process of its own.

use std::fs;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, Signal};

use crate::cli::{One, Scale, World};
use crate::leaks::{Scope, Snapshot};
use crate::test::{Ctx, Outcome, Test};

/// How long a look at the host may take before a test begins.
pub(super) const LOOK: Duration = Duration::from_secs(15);
/// How long what a test used may take to go away. Much of it goes asynchronously, and slowly in an emulated
/// host.
pub(super) const SETTLE: Duration = Duration::from_secs(40);

pub(super) fn run<W: World>(tests: &[Test<W>], world: &W, one: &One, scale: Scale) -> Result<ExitCode> {
    // Without this a runner that is killed would leave the test running.
    set_pdeathsig(Some(Signal::SIGKILL)).context("asking to end with the runner")?;
    // The runner's blocked signals were inherited, and would be by every program the test starts.
    SigSet::all().thread_unblock().context("unblocking signals")?;
    let test = tests
        .iter()
        .find(|test| test.name == one.name)
        .with_context(|| format!("there is no test {}", one.name))?;
    // The test's own outcome is written at once: by it the runner sees that the test met its deadline and
    // that what takes time now is the settling of the host.
    let attempted = || {
        let outcome = attempt(test, world, one, scale);
        write(one, &outcome).map(|()| outcome)
    };
    if let Some(scope) = world.leaks() {
        write(one, &watched(&scope, attempted)?)?;
    } else {
        attempted()?;
    }
    Ok(ExitCode::SUCCESS)
}

fn write(one: &One, outcome: &Outcome) -> Result<()> {
    fs::write(&one.outcome, serde_json::to_vec(outcome)?)
        .with_context(|| format!("writing the outcome to {}", one.outcome.display()))
}

fn attempt<W>(test: &Test<W>, world: &W, one: &One, scale: Scale) -> Outcome {
    let mut ctx = Ctx {
        world,
        round: one.round,
        scratch: &one.scratch,
        name: test.name,
        ends: Instant::now() + test.deadline,
        scale,
    };
    (test.run)(&mut ctx).unwrap_or_else(|error| Outcome::Failed(format!("{error:#}")))
}

/// Runs `test` and fails it if the host is not as it was afterwards.
fn watched(scope: &Scope, test: impl FnOnce() -> Result<Outcome>) -> Result<Outcome> {
    let before = match Snapshot::take(scope) {
        Ok(before) => before,
        Err(error) => {
            return Ok(Outcome::Failed(format!("looking at the host before the test: {error:#}")));
        }
    };
    let outcome = test()?;
    let complaint = match before.settle(scope, SETTLE) {
        Ok(differences) if differences.is_empty() => return Ok(outcome),
        Ok(differences) => {
            let lines: Vec<String> = differences.iter().map(|difference| format!("  {difference}")).collect();
            format!("the host is not as it was {} s after the test:\n{}", SETTLE.as_secs(), lines.join("\n"))
        }
        Err(error) => format!("looking at the host after the test: {error:#}"),
    };
    Ok(match outcome {
        Outcome::Failed(reason) => Outcome::Failed(format!("{reason}\nand {complaint}")),
        Outcome::Passed | Outcome::Skipped(_) => Outcome::Failed(complaint),
    })
}
