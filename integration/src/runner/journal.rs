//! Going on where a run was cut off: its host ended under it, and with it all that it knew.

use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::record::Record;

/// A round that was cut off so often is not begun again: it may well be what ends hosts.
pub(super) const TOO_OFTEN: usize = 4;

/// What earlier runs with the same results have done, and what this one begins. Beside the file of results, as
/// `FILE.begun`: one line for each round.
pub(super) struct Journal {
    path: PathBuf,
    ended: Vec<Record>,
    begun: Vec<(String, u32)>,
}

/// How far earlier runs have come with a test that has no result.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Progress {
    /// Rounds that have passed.
    pub passed: u32,
    /// How often the one after them was cut off.
    pub cut_off: usize,
}

impl Journal {
    /// Reads what there is. A line of the results that was cut off with its writer is removed.
    pub(super) fn open(results: &Path) -> Result<Self> {
        let path = PathBuf::from(format!("{}.begun", results.display()));
        let text = read(results)?;
        let ended = Record::parse_lines(&text)
            .with_context(|| format!("reading the results in {}", results.display()))?;
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        if whole < text.len() {
            fs::write(results, &text[..whole]).with_context(|| format!("mending {}", results.display()))?;
        }
        let begun = read(&path)?.lines().filter_map(parse).collect();
        Ok(Self { path, ended, begun })
    }

    /// The result of a test that earlier runs brought to its end.
    pub(super) fn ended(&self, name: &str) -> Option<&Record> {
        self.ended.iter().find(|record| record.name == name)
    }

    pub(super) fn progress(&self, name: &str) -> Progress {
        let rounds = || self.begun.iter().filter(|(begun, _)| begun == name).map(|(_, round)| *round);
        let Some(last) = rounds().max() else { return Progress::default() };
        Progress { passed: last - 1, cut_off: rounds().filter(|round| *round == last).count() }
    }

    /// To be called before each round. What it writes must outlive this host.
    pub(super) fn begin(&self, name: &str, round: u32) -> Result<()> {
        let write = || -> io::Result<()> {
            let mut file = OpenOptions::new().create(true).append(true).open(&self.path)?;
            // In front, too: a line before it may have been cut off.
            file.write_all(format!("\n{name} {round}\n").as_bytes())?;
            file.sync_all()
        };
        write().with_context(|| format!("noting in {} that a test begins", self.path.display()))
    }
}

fn read(path: &Path) -> Result<String> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(String::new()),
        read => read.with_context(|| format!("reading {}", path.display())),
    }
}

fn parse(line: &str) -> Option<(String, u32)> {
    let (name, round) = line.split_once(' ')?;
    let round = round.parse().ok().filter(|round| *round > 0)?;
    Some((name.to_owned(), round))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Verdict;

    struct Results(PathBuf);

    impl Results {
        fn new(name: &str) -> Self {
            Self(std::env::temp_dir().join(format!("journal-{name}-{}", std::process::id())))
        }
    }

    impl Drop for Results {
        fn drop(&mut self) {
            let _ = fs::remove_file(&self.0);
            let _ = fs::remove_file(format!("{}.begun", self.0.display()));
        }
    }

    #[test]
    fn a_run_goes_on_in_the_round_that_was_cut_off() {
        let results = Results::new("goes-on");
        let journal = Journal::open(&results.0).unwrap();
        assert_eq!(journal.progress("a"), Progress::default());
        for round in 1..=3 {
            journal.begin("a", round).unwrap();
        }
        let again = Journal::open(&results.0).unwrap();
        assert_eq!(again.progress("a"), Progress { passed: 2, cut_off: 1 });
        assert_eq!(again.progress("b"), Progress::default());
        again.begin("a", 3).unwrap();
        assert_eq!(Journal::open(&results.0).unwrap().progress("a"), Progress { passed: 2, cut_off: 2 });
    }

    #[test]
    fn a_result_that_was_cut_off_is_none_and_harms_no_later_one() {
        let results = Results::new("cut");
        let record = |name: &str| Record {
            name: name.into(),
            verdict: Verdict::Passed,
            reason: None,
            rounds_passed: 1,
            rounds: 1,
            seconds: 1.0,
            control: false,
            beds_failed: 0,
        };
        record("a").append(&results.0).unwrap();
        record("b").append(&results.0).unwrap();
        let text = fs::read_to_string(&results.0).unwrap();
        fs::write(&results.0, &text[..text.len() - 3]).unwrap();
        fs::write(format!("{}.begun", results.0.display()), "a 1\nb 1\nc").unwrap();

        let journal = Journal::open(&results.0).unwrap();
        assert_eq!(journal.ended("a"), Some(&record("a")));
        assert_eq!(journal.ended("b"), None);
        journal.begin("c", 1).unwrap();
        record("b").append(&results.0).unwrap();
        let journal = Journal::open(&results.0).unwrap();
        assert_eq!(journal.ended("b"), Some(&record("b")));
        assert_eq!(journal.progress("c"), Progress { passed: 0, cut_off: 1 });
    }
}
