//! One part: what it is, how it is run, what is kept of it.

use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use integration::command::{Cmd, tail};
use integration::{NO_SUCH_TEST, Record, Verdict};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use crate::{Options, sibling};

/// Each round has its own deadline; this one is for a runner that hangs itself.
const LONGEST: Duration = Duration::from_hours(6);

/// Which program of tests, and where it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Suite {
    /// On this machine, driving emulated hosts.
    Outside,
    /// In an emulated host with this containerd, in which containers' machines are restored or boot.
    Inside { containerd: String, boots: bool },
}

/// One test in one environment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    pub suite: Suite,
    pub arch: String,
    pub test: String,
}

impl Part {
    /// Where it runs, in words.
    pub fn place(&self) -> String {
        match &self.suite {
            Suite::Outside => self.arch.clone(),
            Suite::Inside { containerd, boots: false } => format!("{}, containerd {containerd}", self.arch),
            Suite::Inside { containerd, boots: true } => {
                format!("{}, containerd {containerd}, cold", self.arch)
            }
        }
    }

    /// A name fit for a file.
    pub fn name(&self) -> String {
        match &self.suite {
            Suite::Outside => format!("outside-{}-{}", self.arch, self.test),
            Suite::Inside { containerd, boots } => {
                let how = if *boots { "-cold" } else { "" };
                format!("inside-{}-{containerd}{how}-{}", self.arch, self.test)
            }
        }
    }
}

/// A part that was run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Done {
    /// When it began, in seconds since 1970.
    pub began: u64,
    /// What was run.
    pub commit: String,
    pub record: Record,
}

impl Done {
    /// For whoever soaks `now`.
    pub fn in_short(&self, now: &str) -> String {
        let result = self.result();
        if self.commit == now { result } else { format!("{result}, on {}", self.commit) }
    }

    fn result(&self) -> String {
        let Record { verdict, rounds_passed, rounds, seconds, .. } = &self.record;
        match verdict {
            Verdict::Passed => format!("{rounds_passed}/{rounds} passed in {seconds:.0} s"),
            Verdict::Failed => format!("FAILED after {rounds_passed} of {rounds}, {seconds:.0} s"),
            Verdict::Skipped => format!("skipped: {}", self.record.reason.as_deref().unwrap_or("no reason")),
        }
    }
}

/// What hack/testbed ends with when the host under a test broke, and not the test.
const BED_FAILED: i32 = 125;

/// Runs `part` to its end; once more where the host under it broke.
pub fn run(part: &Part, options: &Options, commit: &str) -> Result<Done> {
    match attempt(part, options, commit)? {
        Ok(done) => Ok(done),
        Err(broken) => {
            eprintln!("the host under {} broke; once more: {broken}", part.name());
            attempt(part, options, commit)?.map_err(|broken| anyhow!("{broken}"))
        }
    }
}

/// Inside, why there is no result although nothing is wrong with the test.
fn attempt(part: &Part, options: &Options, commit: &str) -> Result<Result<Done, String>> {
    let began = SystemTime::now().duration_since(UNIX_EPOCH).context("a clock before 1970")?.as_secs();
    let (command, results) = match &part.suite {
        Suite::Outside => outside(part, options)?,
        Suite::Inside { containerd, boots } => inside(part, containerd, *boots, options),
    };
    if let Err(error) = fs::remove_file(&results)
        && error.kind() != ErrorKind::NotFound
    {
        return Err(error).with_context(|| format!("removing {}", results.display()));
    }
    let mut command = command.args(["--filter", &format!("={}", part.test), "--scale", "long"]);
    if let Some(count) = options.count {
        command = command.args(["--count", &count.to_string()]);
    }
    // SIGTERM, so that a runner whose soak is gone ends its test and tidies up.
    let done = command.when_orphaned(Signal::SIGTERM).run()?;
    let text = fs::read_to_string(&results).unwrap_or_default();
    let records = Record::parse_lines(&text).with_context(|| format!("reading {}", results.display()))?;
    let record = match <[Record; 1]>::try_from(records) {
        Ok([record]) if record.name == part.test => record,
        // The list is this machine's.
        Err(none) if none.is_empty() && done.err().contains(NO_SUCH_TEST) => Record {
            name: part.test.clone(),
            verdict: Verdict::Skipped,
            reason: Some(format!("there is none on {}", part.arch)),
            rounds_passed: 0,
            rounds: 0,
            seconds: 0.0,
            control: false,
        },
        // Neither passed nor failed: the soak stops, since it would say nothing about the test.
        _ => {
            let said = format!(
                "{} ended with {} and no result of {}:\n{}",
                done.command,
                done.status,
                part.test,
                tail(&done.out(), 20) + "\n" + &tail(&done.err(), 20)
            );
            if done.code() == Some(BED_FAILED) {
                return Ok(Err(said));
            }
            bail!(said);
        }
    };
    Ok(Ok(Done { began, commit: commit.to_owned(), record }))
}

fn outside(part: &Part, options: &Options) -> Result<(Cmd, PathBuf)> {
    let results = options.logs.join("outside.jsonl");
    let command = Cmd::new(sibling("outside")?, LONGEST)
        .arg("--testbed")
        .arg(&options.testbed)
        .args(["--arch", &part.arch])
        .arg("--results")
        .arg(&results)
        .arg("--logs")
        .arg(options.logs.join("logs").join(part.name()));
    Ok((command, results))
}

fn inside(part: &Part, containerd: &str, boots: bool, options: &Options) -> (Cmd, PathBuf) {
    let how = if boots { "-cold" } else { "" };
    let results = PathBuf::from(format!("target/e2e/{}-{containerd}{how}/results.jsonl", part.arch));
    let command = Cmd::new(&options.e2e, LONGEST).env("E2E_TIMEOUT", LONGEST.as_secs().to_string()).args([
        "--arch",
        &part.arch,
        "--containerd",
        containerd,
        "--boot",
        if boots { "cold" } else { "restore" },
    ]);
    (command, results)
}
