//! Can this host run guests? The answer as data: what was looked at, what was found, what mends it.
//!
//! A device node proves nothing, since there are hypervisors in software behind the same interface
//! that cannot run a stock kernel. So the check looks at the processor as well, and ends with a
//! guest of a few instructions that goes through the same seam as every real one.

mod probe;

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

pub use probe::{ProbeError, run as probe};

/// What to look at. [`Host::default`] is this host; tests look at hosts that are not there.
#[derive(Debug, Clone)]
pub struct Host {
    /// The hypervisor's device node.
    pub device: PathBuf,
    /// The processor's feature flags, as `/proc/cpuinfo` words them. Looked at on x86_64 only:
    /// elsewhere nothing but the hypervisor itself tells.
    pub flags: ProcessorFlags,
}

/// Feature flags of the processor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProcessorFlags {
    /// All words of the flags line.
    Known(Vec<String>),
    /// The list could not be had; why.
    Unknown(String),
}

impl ProcessorFlags {
    /// Of the processor that this runs on.
    pub fn of_this_host() -> Self {
        match std::fs::read_to_string("/proc/cpuinfo") {
            Ok(cpuinfo) => Self::parse(&cpuinfo),
            Err(error) => Self::Unknown(format!("cannot read /proc/cpuinfo: {error}")),
        }
    }

    /// From the text of `/proc/cpuinfo`.
    pub fn parse(cpuinfo: &str) -> Self {
        let line = cpuinfo.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            (name.trim() == "flags").then_some(value)
        });
        match line {
            Some(line) => Self::Known(line.split_whitespace().map(str::to_owned).collect()),
            None => Self::Unknown("/proc/cpuinfo has no line of flags".into()),
        }
    }
}

#[cfg(target_os = "linux")]
impl Default for Host {
    fn default() -> Self {
        Self { device: super::kvm::DEVICE.into(), flags: ProcessorFlags::of_this_host() }
    }
}

/// How one look went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// As it must be.
    Ok,
    /// Not so: guests will not run.
    Fail,
    /// Not looked at, because of an earlier failure.
    Skipped,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Fail => "fail",
            Self::Skipped => "skipped",
        })
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Short, stable, for programs.
    pub name: &'static str,
    /// How it went.
    pub outcome: Outcome,
    /// What was seen.
    pub detail: String,
    /// What to do about it, when it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mend: Option<String>,
}

impl Finding {
    /// As it must be.
    pub fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, outcome: Outcome::Ok, detail: detail.into(), mend: None }
    }

    /// Amiss, and how to mend it.
    pub fn fail(name: &'static str, detail: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { name, outcome: Outcome::Fail, detail: detail.into(), mend: Some(mend.into()) }
    }

    /// Not looked at, `because` of the failed finding of that name.
    pub fn skipped(name: &'static str, because: &str) -> Self {
        Self {
            name,
            outcome: Outcome::Skipped,
            detail: format!("not looked at: {because} failed"),
            mend: None,
        }
    }
}

/// All findings, in the order in which they were made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The findings.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Whether guests will run: everything was looked at and nothing was amiss.
    pub fn usable(&self) -> bool {
        self.findings.iter().all(|finding| finding.outcome == Outcome::Ok)
    }

    /// One line for people.
    pub fn verdict(&self) -> String {
        match self.findings.iter().find(|finding| finding.outcome == Outcome::Fail) {
            None => "this host runs microVMs".into(),
            Some(first) => format!("this host cannot run microVMs: {}: {}", first.name, first.detail),
        }
    }

    /// The whole report as one JSON object.
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({
            "usable": self.usable(),
            "verdict": self.verdict(),
            "findings": self.findings,
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.findings {
            writeln!(f, "{:<8} {:<13} {}", finding.outcome, finding.name, finding.detail)?;
            if let Some(mend) = &finding.mend {
                writeln!(f, "{:<8} {:<13} mend: {mend}", "", "")?;
            }
        }
        write!(f, "{}", self.verdict())
    }
}

/// Looks at a host.
#[cfg(target_os = "linux")]
pub fn host(host: &Host) -> Report {
    Report { findings: super::kvm::ability::findings(host) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_the_words_of_the_first_flags_line() {
        let two = "processor\t: 0\nflags\t\t: fpu svm\nvmx flags\t: vnmi\nprocessor : 1\nflags: fpu vmx\n";
        assert_eq!(ProcessorFlags::parse(two), ProcessorFlags::Known(vec!["fpu".into(), "svm".into()]));
        assert_eq!(ProcessorFlags::parse("flags:\n"), ProcessorFlags::Known(vec![]));
        assert!(matches!(ProcessorFlags::parse("Features\t: fp asimd\n"), ProcessorFlags::Unknown(_)));
        assert!(matches!(ProcessorFlags::parse(""), ProcessorFlags::Unknown(_)));
    }

    #[test]
    fn one_failure_or_one_gap_makes_a_host_unusable() {
        let cases = [
            (vec![Finding::ok("a", "x")], true),
            (vec![Finding::ok("a", "x"), Finding::fail("b", "y", "z")], false),
            (vec![Finding::ok("a", "x"), Finding::skipped("b", "a")], false),
        ];
        for (findings, usable) in cases {
            assert_eq!(Report { findings }.usable(), usable);
        }
    }

    #[test]
    fn the_report_names_the_mend_and_the_first_failure() {
        let report = Report {
            findings: vec![
                Finding::ok("processor", "svm"),
                Finding::fail("device", "/dev/kvm is not there", "modprobe kvm_amd"),
                Finding::skipped("guest", "device"),
            ],
        };
        let text = report.to_string();
        assert!(text.contains("mend: modprobe kvm_amd"), "{text}");
        assert!(text.ends_with("this host cannot run microVMs: device: /dev/kvm is not there"), "{text}");

        let json = report.to_json();
        assert_eq!(json["usable"], false);
        assert_eq!(json["findings"][1]["outcome"], "fail");
        assert_eq!(json["findings"][1]["mend"], "modprobe kvm_amd");
        assert!(json["findings"][0].get("mend").is_none());
    }
}
