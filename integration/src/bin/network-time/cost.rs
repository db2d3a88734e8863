//! What a measurement takes: packets on the cable, the monitor's threads, and the exits of its machine.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use integration::network_time::Cost;
use integration::process;

/// Where KVM has a directory for each machine, named after the thread that made it.
const MACHINES: &str = "/sys/kernel/debug/kvm";
/// Processor time is counted in hundredths of a second.
const TICK: f64 = 0.01;

/// Where to look.
pub struct Meter {
    /// The host's end of the cable.
    link: &'static str,
    monitor: Option<Monitor>,
}

struct Monitor {
    pid: i32,
    counters: PathBuf,
}

/// What was found there.
pub struct Reading {
    packets: u64,
    bytes: u64,
    threads: HashMap<(String, String), u64>,
    machine: BTreeMap<String, u64>,
}

impl Meter {
    /// Of the cable `link`, and of the machine of the process `monitor` if there is one.
    pub fn new(link: &'static str, monitor: Option<i32>) -> Result<Self> {
        let monitor = monitor.map(|pid| Ok::<_, anyhow::Error>(Monitor { pid, counters: counters(pid)? }));
        Ok(Self { link, monitor: monitor.transpose()? })
    }

    /// Looks now.
    pub fn read(&self) -> Result<Reading> {
        let (threads, machine) = match &self.monitor {
            Some(Monitor { pid, counters }) => {
                let threads = process::thread_ticks(*pid).context("reading the monitor's processor time")?;
                (threads, numbers(counters)?)
            }
            None => Default::default(),
        };
        let sum = |what: &str| Ok::<_, anyhow::Error>(self.count("rx", what)? + self.count("tx", what)?);
        Ok(Reading { packets: sum("packets")?, bytes: sum("bytes")?, threads, machine })
    }

    fn count(&self, direction: &str, what: &str) -> Result<u64> {
        let path = format!("/sys/class/net/{}/statistics/{direction}_{what}", self.link);
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        text.trim().parse().with_context(|| format!("{path} has {text:?}"))
    }
}

impl Reading {
    /// What came since `before`; nothing where there was nothing.
    pub fn since(&self, before: &Self) -> Cost {
        let mut threads: BTreeMap<String, f64> = BTreeMap::new();
        for (thread, now) in &self.threads {
            let ticks = now.saturating_sub(*before.threads.get(thread).unwrap_or(&0));
            if ticks > 0 {
                #[allow(clippy::cast_precision_loss, reason = "nobody waits for 2^52 ticks")]
                let seconds = ticks as f64 * TICK;
                *threads.entry(thread.1.clone()).or_default() += seconds;
            }
        }
        let machine = self.machine.iter().filter_map(|(name, now)| {
            let more = now.saturating_sub(*before.machine.get(name)?);
            (more > 0).then(|| (name.clone(), more))
        });
        Cost {
            packets: self.packets - before.packets,
            bytes: self.bytes - before.bytes,
            threads,
            machine: machine.collect(),
        }
    }
}

/// The directory of the one machine that a thread of `pid` has made.
fn counters(pid: i32) -> Result<PathBuf> {
    let entries = fs::read_dir(MACHINES).with_context(|| format!("looking for machines in {MACHINES}"))?;
    let of_it = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let thread = name.split_once('-').map(|(thread, _)| thread.to_owned());
        thread.is_some_and(|thread| Path::new(&format!("/proc/{pid}/task/{thread}")).exists())
    };
    let mut found = entries.flatten().map(|entry| entry.path()).filter(of_it);
    found.next().with_context(|| format!("{MACHINES} has no machine of process {pid}"))
}

/// All files there that have a number. Those of single processors are summed up in them.
fn numbers(directory: &Path) -> Result<BTreeMap<String, u64>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))? {
        let entry = entry?;
        if let Ok(text) = fs::read_to_string(entry.path())
            && let Ok(number) = text.trim().parse()
        {
            found.insert(entry.file_name().to_string_lossy().into_owned(), number);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_of_a_name_are_summed_and_only_what_changed_is_told() {
        let thread = |id: &str, name: &str, ticks| ((id.to_owned(), name.to_owned()), ticks);
        let machine = |exits| BTreeMap::from([("exits".to_owned(), exits), ("nmi".to_owned(), 3)]);
        let before = Reading {
            packets: 10,
            bytes: 100,
            threads: HashMap::from([thread("1", "vcpu", 50), thread("3", "main", 7)]),
            machine: machine(1000),
        };
        let after = Reading {
            packets: 14,
            bytes: 700,
            threads: HashMap::from([
                thread("1", "vcpu", 100),
                thread("2", "vcpu", 25),
                thread("3", "main", 7),
            ]),
            machine: machine(1500),
        };
        let cost = after.since(&before);
        assert_eq!((cost.packets, cost.bytes), (4, 600));
        assert_eq!(cost.threads.keys().collect::<Vec<_>>(), ["vcpu"]);
        assert!((cost.threads["vcpu"] - 0.75).abs() < 1e-9);
        assert_eq!(cost.machine, BTreeMap::from([("exits".to_owned(), 500)]));
    }
}
