//! What a test is, and what it gets to work with.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::cli::Scale;
use crate::command::Cmd;

/// One line of the table of tests. `W` is what all tests of the program share: where things are.
pub struct Test<W> {
    /// Dotted, from the general to the particular: `control.runc-output`.
    pub name: &'static str,
    /// What is known when it has passed, in one sentence.
    pub proves: &'static str,
    /// One round of it.
    pub run: fn(&mut Ctx<'_, W>) -> anyhow::Result<Outcome>,
    /// For one round. What is still running then is killed and the test has failed.
    pub deadline: Duration,
    /// How often it is run.
    pub rounds: Rounds,
    /// `control`: fails only if the bed is broken, as nothing of the product takes part.
    pub tags: &'static [&'static str],
}

impl<W> Test<W> {
    /// Whether a failure means that the bed is broken.
    pub fn is_control(&self) -> bool {
        self.tags.contains(&"control")
    }
}

/// How often a test is run at either scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rounds {
    /// For every change.
    pub short: u32,
    /// In a soak.
    pub long: u32,
}

impl Rounds {
    /// Once for every change, `long` times in a soak.
    pub const fn once_or(long: u32) -> Self {
        Self { short: 1, long }
    }
}

/// How one round of a test ended. An error returned by a test counts as `Failed`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// What it proves holds.
    Passed,
    /// It does not, for this reason.
    Failed(String),
    /// It could not be tried here, for this reason.
    Skipped(String),
}

/// What a test gets.
pub struct Ctx<'a, W> {
    /// What all tests of the program share.
    pub world: &'a W,
    /// This round, counted from 1.
    pub round: u32,
    /// A directory of this round alone, removed afterwards.
    pub scratch: &'a Path,
    pub(crate) name: &'static str,
    pub(crate) ends: Instant,
    pub(crate) scale: Scale,
}

impl<W> Ctx<'_, W> {
    /// What is left of the deadline.
    pub fn left(&self) -> Duration {
        self.ends.saturating_duration_since(Instant::now())
    }

    /// How much is to be done: `short` for every change, `long` in a soak.
    pub fn either<T>(&self, short: T, long: T) -> T {
        match self.scale {
            Scale::Short => short,
            Scale::Long => long,
        }
    }

    /// A command that is recorded in the log of the test and ends a little before the test would be killed,
    /// so that the report says which command it was.
    pub fn cmd(&self, program: impl AsRef<OsStr>) -> Cmd {
        Cmd::new(program, self.left().mul_f64(0.9)).traced()
    }

    /// A path below [`Self::scratch`].
    pub fn path(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    /// An identifier of this test and round, fit for a container. `suffix` tells several apart.
    pub fn id(&self, suffix: &str) -> String {
        let name: String =
            self.name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        format!("it-{name}-{}-{suffix}", std::process::id())
    }

    /// Says in the log of the test what is going on.
    pub fn note(&self, what: impl std::fmt::Display) {
        eprintln!("# {what}");
    }
}
