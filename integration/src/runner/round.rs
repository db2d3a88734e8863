//! The runner's side of one round: start its process, watch it, end it with all that it started.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::child::{LOOK, SETTLE};
use crate::logs::{LogSources, Watch};
use crate::process;
use crate::test::Outcome;

/// How often the child is looked after, in milliseconds.
const TICK: u16 = 20;
/// What a test started may take this long to end after the test itself.
const AFTER_THE_TEST: Duration = Duration::from_secs(3);
/// Nothing survives SIGKILL for long, except what hangs in the kernel.
const AFTER_SIGKILL: Duration = Duration::from_secs(20);

/// A signal asked the runner to stop.
#[derive(Debug, thiserror::Error)]
#[error("stopped by signal {signal}")]
pub(super) struct Interrupted {
    pub signal: u8,
}

/// What all rounds of a run share.
pub(super) struct Surroundings<'a> {
    program: PathBuf,
    arguments: &'a [OsString],
    signals: SignalFd,
    pid: i32,
}

impl<'a> Surroundings<'a> {
    /// Makes this process the reaper of everything below it and the receiver of its own signals.
    pub(super) fn prepare(arguments: &'a [OsString]) -> Result<Self> {
        set_child_subreaper(true).context("becoming the reaper of what the tests start")?;
        let mut wanted = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            wanted.add(signal);
        }
        wanted.thread_block().context("blocking signals")?;
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        Ok(Self {
            program: env::current_exe().context("finding this program to run a test with it")?,
            arguments,
            signals: SignalFd::with_flags(&wanted, flags).context("opening a signalfd")?,
            pid: i32::try_from(std::process::id()).context("a process id that is no pid_t")?,
        })
    }

    /// Waits one tick; a signal that arrived is an error.
    fn tick(&self) -> Result<()> {
        let mut wanted = [PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        // Whatever interrupts the wait, the next read tells.
        let _ = poll(&mut wanted, PollTimeout::from(TICK));
        match self.signals.read_signal().context("reading the signalfd")? {
            Some(info) => Err(Interrupted { signal: u8::try_from(info.ssi_signo).unwrap_or(0) }.into()),
            None => Ok(()),
        }
    }
}

/// One round about to be run.
pub(super) struct Round {
    pub name: &'static str,
    pub number: u32,
    pub deadline: Duration,
    pub checks_leaks: bool,
    pub directory: PathBuf,
}

/// A round that has ended.
pub(super) struct Ended {
    pub outcome: Outcome,
    pub logs: Vec<(String, String)>,
}

impl Round {
    /// Runs it. An error is a defect of the runner's surroundings, not of the test.
    pub(super) fn run(&self, surroundings: &Surroundings<'_>, sources: &LogSources) -> Result<Ended> {
        let scratch = self.directory.join("scratch");
        fs::create_dir_all(&scratch).with_context(|| format!("creating {}", scratch.display()))?;
        let mut watch = Watch::begin(&sources.clone().with_files_in(&scratch));
        let child = self.start(surroundings)?;
        let ended = self.attend(surroundings, child, || watch.look_now_and_then());
        let survivors = end_survivors(surroundings.pid, ended.is_ok())?;
        let outcome = with_survivors(self.outcome(ended?), &survivors);

        let own = fs::read(self.directory.join("test.log")).unwrap_or_default();
        let mut logs = vec![("test".to_owned(), String::from_utf8_lossy(&own).into_owned())];
        logs.retain(|(_, text)| !text.is_empty());
        logs.extend(watch.end());
        fs::remove_dir_all(&self.directory)
            .with_context(|| format!("removing {}", self.directory.display()))?;
        Ok(Ended { outcome, logs })
    }

    fn start(&self, surroundings: &Surroundings<'_>) -> Result<Child> {
        let log = self.directory.join("test.log");
        let log = File::create(&log).with_context(|| format!("creating {}", log.display()))?;
        Command::new(&surroundings.program)
            .args(surroundings.arguments)
            .args(["--one", self.name, "--round", &self.number.to_string()])
            .arg("--scratch")
            .arg(self.directory.join("scratch"))
            .arg("--outcome")
            .arg(self.directory.join("outcome"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("sharing the log of a test")?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("starting {} for {}", surroundings.program.display(), self.name))
    }

    /// Waits for the end of `child`, at the latest at its deadline, and looks around meanwhile. `None` means
    /// that the deadline was reached.
    fn attend(
        &self,
        surroundings: &Surroundings<'_>,
        mut child: Child,
        mut look: impl FnMut(),
    ) -> Result<Option<ExitStatus>> {
        let begun = Instant::now();
        let (first_look, settle) = if self.checks_leaks { (LOOK, 2 * SETTLE) } else { Default::default() };
        let outcome = self.directory.join("outcome");
        let ended = loop {
            if let Some(status) = child.try_wait().context("waiting for a test")? {
                break Ok(Some(status));
            }
            let taken = begun.elapsed();
            // The outcome is there as soon as the test itself is over; the rest is settling.
            let late = first_look + self.deadline;
            if taken >= late && (taken >= late + settle || !outcome.exists()) {
                break Ok(None);
            }
            if let Err(stopped) = surroundings.tick() {
                break Err(stopped);
            }
            look();
        };
        if !matches!(ended, Ok(Some(_))) {
            let _ = child.kill();
            let _ = child.wait();
        }
        ended
    }

    fn outcome(&self, ended: Option<ExitStatus>) -> Outcome {
        let Some(status) = ended else {
            let seconds = self.deadline.as_secs();
            return Outcome::Failed(format!("still running at its deadline of {seconds} s, and killed"));
        };
        let written = fs::read(self.directory.join("outcome")).ok();
        match written.and_then(|bytes| serde_json::from_slice(&bytes).ok()) {
            Some(outcome) => outcome,
            None => Outcome::Failed(format!("its process ended ({status}) without an outcome")),
        }
    }
}

/// Ends what a test started and did not end itself, and names it. A test that is `over` gets a moment for
/// this, one that was stopped does not.
fn end_survivors(pid: i32, over: bool) -> Result<Vec<String>> {
    if over {
        let gone = crate::wait::until_true("the test's processes to end", AFTER_THE_TEST, || {
            let left = process::descendants(pid);
            process::reap(pid, &left);
            left.is_empty()
        });
        if gone.is_ok() {
            return Ok(Vec::new());
        }
    }
    let survivors = process::descendants(pid);
    process::kill_descendants(pid, AFTER_SIGKILL).context("ending what a test left running")?;
    Ok(survivors.iter().filter(|one| !one.is_zombie()).map(process::Process::describe).collect())
}

fn with_survivors(outcome: Outcome, survivors: &[String]) -> Outcome {
    if survivors.is_empty() {
        return outcome;
    }
    let complaint = format!("left running:\n  {}", survivors.join("\n  "));
    match outcome {
        Outcome::Failed(reason) => Outcome::Failed(format!("{reason}\nand {complaint}")),
        Outcome::Passed | Outcome::Skipped(_) => Outcome::Failed(complaint),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survivors_turn_a_pass_into_a_failure() {
        assert_eq!(with_survivors(Outcome::Passed, &[]), Outcome::Passed);
        let found = with_survivors(Outcome::Passed, &["7 sleep".into()]);
        assert_eq!(found, Outcome::Failed("left running:\n  7 sleep".into()));
        let found = with_survivors(Outcome::Failed("why".into()), &["7 sleep".into()]);
        assert_eq!(found, Outcome::Failed("why\nand left running:\n  7 sleep".into()));
    }
}
