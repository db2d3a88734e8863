//! What is kept of a test that was run: one line of JSON, for the soak and for machines.

use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

/// How a test ended, all its rounds together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Every round passed.
    Passed,
    /// Some round failed; no further one was tried.
    Failed,
    /// It could not be tried.
    Skipped,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Passed => "passed",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
        })
    }
}

/// One test that was run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The test.
    pub name: String,
    /// How it ended.
    pub verdict: Verdict,
    /// Why it failed or was skipped.
    pub reason: Option<String>,
    /// Rounds that passed.
    pub rounds_passed: u32,
    /// Rounds asked for.
    pub rounds: u32,
    /// From the first round's start to the last one's end.
    pub seconds: f64,
    /// Whether nothing of the product takes part in it.
    pub control: bool,
}

impl Record {
    /// Adds it to the lines of `path`.
    pub fn append(&self, path: &Path) -> io::Result<()> {
        let mut line = serde_json::to_string(self)?;
        line.push('\n');
        OpenOptions::new().create(true).append(true).open(path)?.write_all(line.as_bytes())
    }

    /// The lines of `text`. A last line that was cut short by a crash of its writer is left out, any other
    /// is an error.
    pub fn parse_lines(text: &str) -> serde_json::Result<Vec<Self>> {
        let complete = text.rfind('\n').map_or("", |end| &text[..end]);
        complete.lines().map(serde_json::from_str).collect()
    }
}

/// The numbers of the last line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub passed: u32,
    pub failed: u32,
    pub skipped: u32,
}

impl Tally {
    pub(crate) fn count(&mut self, verdict: Verdict) {
        match verdict {
            Verdict::Passed => self.passed += 1,
            Verdict::Failed => self.failed += 1,
            Verdict::Skipped => self.skipped += 1,
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(name: &str, verdict: Verdict) -> Record {
        Record {
            name: name.into(),
            verdict,
            reason: Some("a\nb".into()),
            rounds_passed: 1,
            rounds: 2,
            seconds: 1.5,
            control: true,
        }
    }

    #[test]
    fn lines_are_read_back_and_a_cut_one_is_left_out() {
        let path = std::env::temp_dir().join(format!("records-{}", std::process::id()));
        let records = [record("a", Verdict::Passed), record("b", Verdict::Failed)];
        for record in &records {
            record.append(&path).unwrap();
        }
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(text.lines().count(), 2, "a reason of two lines stays on one");
        assert_eq!(Record::parse_lines(&text).unwrap(), records);
        assert_eq!(Record::parse_lines(&text[..text.len() - 5]).unwrap(), records[..1]);
        assert_eq!(Record::parse_lines("").unwrap(), []);
        assert!(Record::parse_lines("{}\n").is_err());
    }

    #[test]
    fn the_last_line_is_exact() {
        let mut tally = Tally::default();
        for verdict in [Verdict::Passed, Verdict::Passed, Verdict::Failed, Verdict::Skipped] {
            tally.count(verdict);
        }
        assert_eq!(tally.to_string(), "2 passed, 1 failed, 1 skipped");
    }
}
