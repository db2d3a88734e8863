//! The file format: what a benchmark writes and everything else reads.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::stats::{BadSamples, Summary};

/// A file of results.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// In the order in which they are shown.
    pub results: Vec<Comparison>,
}

/// One thing measured, on our side and (where there is one) on a peer's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Comparison {
    /// What was measured, for a person: "start to first command, x86_64".
    pub name: String,
    /// `s`, `ms`, `MiB`, `MiB/s`... A unit per second, and `%`, is better when higher, any other when lower.
    pub unit: String,
    /// Our side.
    pub ours: Summary,
    /// The other side, if there is one.
    pub peer: Option<Summary>,
    /// Who the other side is. Present exactly when `peer` is.
    pub peer_name: Option<String>,
    /// Median of ours by median of the peer. Absent without a peer or when the peer's median is zero.
    pub ratio: Option<f64>,
}

/// Why a file of results could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The file itself.
    #[error("reading {}: {source}; run the benchmark that writes it first", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Not of the schema.
    #[error("{} is not a benchmark report: {source}", path.display())]
    Format {
        /// Which file.
        path: PathBuf,
        /// Where and how it departs.
        source: serde_json::Error,
    },
    /// Of the schema, but it cannot have been measured.
    #[error("{}: result {name:?}: {reason}; run the benchmark again", path.display())]
    Content {
        /// Which file.
        path: PathBuf,
        /// Which result.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// Why a file of results could not be written.
#[derive(Debug, thiserror::Error)]
#[error("writing {}: {source}", path.display())]
pub struct WriteError {
    /// Which file.
    pub path: PathBuf,
    /// What the system said.
    pub source: io::Error,
}

impl Comparison {
    /// Summarises the samples of both sides; `peer` is its name and its samples.
    pub fn of(
        name: impl Into<String>,
        unit: impl Into<String>,
        ours: &[f64],
        peer: Option<(&str, &[f64])>,
    ) -> Result<Self, BadSamples> {
        let ours = Summary::of(ours)?;
        let (peer_name, peer) = match peer {
            Some((name, samples)) => (Some(name.to_owned()), Some(Summary::of(samples)?)),
            None => (None, None),
        };
        let ratio = peer.and_then(|peer| ratio(&ours, &peer));
        Ok(Self { name: name.into(), unit: unit.into(), ours, peer, peer_name, ratio })
    }

    fn check(&self) -> Result<(), String> {
        self.ours.check().map_err(|bad| format!("ours: {bad}"))?;
        if let Some(peer) = &self.peer {
            peer.check().map_err(|bad| format!("peer: {bad}"))?;
        }
        if self.peer.is_some() != self.peer_name.is_some() {
            return Err("peer and peer_name must be both present or both null".into());
        }
        let expected = self.peer.and_then(|peer| ratio(&self.ours, &peer));
        match (self.ratio, expected) {
            (None, None) => Ok(()),
            // Rounding by whoever wrote the file is fine, another quotient is not.
            (Some(found), Some(expected))
                if (found - expected).abs() <= 0.01 * expected.max(f64::EPSILON) =>
            {
                Ok(())
            }
            (found, expected) => {
                Err(format!("ratio is {found:?} where ours/peer of the medians is {expected:?}"))
            }
        }
    }
}

fn ratio(ours: &Summary, peer: &Summary) -> Option<f64> {
    (peer.median > 0.0).then(|| ours.median / peer.median)
}

impl Report {
    /// Reads and checks a file.
    pub fn read(path: &Path) -> Result<Self, ReadError> {
        let text =
            fs::read_to_string(path).map_err(|source| ReadError::File { path: path.to_owned(), source })?;
        Self::parse(path, &text)
    }

    /// Checks `text`, which came from `path`.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ReadError> {
        let report: Self = serde_json::from_str(text)
            .map_err(|source| ReadError::Format { path: path.to_owned(), source })?;
        for result in &report.results {
            result.check().map_err(|reason| ReadError::Content {
                path: path.to_owned(),
                name: result.name.clone(),
                reason,
            })?;
        }
        Ok(report)
    }

    /// Writes the file, creating its directory. A reader sees the old content or the new, never a part.
    pub fn write(&self, path: &Path) -> Result<(), WriteError> {
        let put = || -> io::Result<()> {
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            let aside = path.with_extension("json.new");
            fs::write(&aside, serde_json::to_string_pretty(self).map_err(io::Error::other)? + "\n")?;
            fs::rename(&aside, path)
        };
        put().map_err(|source| WriteError { path: path.to_owned(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"results":[
        {"name":"bed","unit":"s","ours":{"median":1.0,"p10":0.9,"p90":1.2,"n":5},
         "peer":{"median":8.0,"p10":7.0,"p90":9.0,"n":5},"peer_name":"boot","ratio":0.125},
        {"name":"alone","unit":"MiB","ours":{"median":3,"p10":3,"p90":3,"n":1},
         "peer":null,"peer_name":null,"ratio":null}]}"#;

    fn parse(text: &str) -> Result<Report, ReadError> {
        Report::parse(Path::new("target/bench/x.json"), text)
    }

    #[test]
    fn reads_what_it_is_given_and_writes_it_back() {
        let report = parse(GOOD).unwrap();
        assert_eq!(report.results.len(), 2);
        assert_eq!(report.results[0].ratio, Some(0.125));
        let dir = std::env::temp_dir().join(format!("report-{}", std::process::id()));
        let path = dir.join("deep/bed.json");
        report.write(&path).unwrap();
        assert_eq!(Report::read(&path).unwrap(), report);
        let names: Vec<_> =
            fs::read_dir(path.parent().unwrap()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["bed.json"], "nothing is left beside the report");
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn samples_make_a_result_that_reads_back() {
        let made = Comparison::of("x", "s", &[1.0, 2.0, 3.0], Some(("boot", &[8.0, 8.0]))).unwrap();
        assert_eq!(made.ratio, Some(0.25));
        let text = serde_json::to_string(&Report { results: vec![made.clone()] }).unwrap();
        assert_eq!(parse(&text).unwrap().results, [made]);
        let idle = Comparison::of("x", "s", &[1.0], Some(("idle", &[0.0]))).unwrap();
        assert_eq!(idle.ratio, None, "nothing is a multiple of zero");
        assert_eq!(Comparison::of("x", "s", &[], None).unwrap_err(), BadSamples::None);
    }

    #[test]
    fn malformed_files_are_refused_with_a_reason() {
        let cases: &[(&str, String, &str)] = &[
            ("empty", String::new(), "not a benchmark report"),
            ("cut short", GOOD[..GOOD.len() / 2].into(), "not a benchmark report"),
            ("no list", "{}".into(), "missing field `results`"),
            ("list of text", r#"{"results":["a"]}"#.into(), "not a benchmark report"),
            ("text for a number", GOOD.replace("1.2", "\"slow\""), "invalid type"),
            ("unknown field", GOOD.replace("\"ratio\":0.125", "\"ratio\":0.125,\"x\":1"), "unknown field"),
            ("no samples", GOOD.replace("\"n\":1", "\"n\":0"), "no samples"),
            ("negative count", GOOD.replace("\"n\":1", "\"n\":-1"), "not a benchmark report"),
            ("upside down", GOOD.replace("\"p90\":1.2", "\"p90\":0.1"), "rising order"),
            ("below zero", GOOD.replace("\"p10\":0.9", "\"p10\":-0.9"), "not a measurement"),
            ("other quotient", GOOD.replace("0.125", "8.0"), "ratio is Some(8.0)"),
            ("peer without a name", GOOD.replace("\"boot\"", "null"), "both present"),
            ("huge number", GOOD.replace("1.2", "1e999"), "not a benchmark report"),
        ];
        for (what, text, expected) in cases {
            let said = parse(text).unwrap_err().to_string();
            assert!(said.contains(expected), "{what}: {said}");
            assert!(said.contains("target/bench/x.json"), "{what}: {said}");
        }
        let absent = Report::read(Path::new("/nonexistent/bench.json")).unwrap_err().to_string();
        assert!(absent.contains("/nonexistent/bench.json"), "{absent}");
    }
}
