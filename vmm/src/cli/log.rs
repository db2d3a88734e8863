//! What the machine says about itself, on stderr, a line each.
//!
//! A guest can make a device complain again and again: a burst is shown, then so many lines a second,
//! and how many were left out.

use std::fmt::Arguments;
use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use log::{LevelFilter, Log, Metadata, Record};

/// Lines that may come at once.
const BURST: u32 = 50;
/// Lines a second after that.
const RATE: u32 = 5;

/// How much of what is said is shown; from the command line.
pub(super) fn level(text: &str) -> Result<LevelFilter, String> {
    match text {
        "off" | "error" | "warn" | "info" | "debug" | "trace" => {
            text.parse().map_err(|_| format!("{text} is no level"))
        }
        _ => Err(format!("{text} is no level of logs: give off, error, warn, info, debug or trace")),
    }
}

/// Shows everything up to `level` from here on.
pub(super) fn start(level: LevelFilter) {
    let stderr = Stderr(Mutex::new(Allowance::new(Instant::now())));
    // It fails when there is one already, which then serves as well.
    if log::set_boxed_logger(Box::new(stderr)).is_ok() {
        log::set_max_level(level);
    }
}

struct Stderr(Mutex<Allowance>);

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let mut allowance = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(left_out) = allowance.take(Instant::now()) {
            if left_out > 0 {
                say(format_args!("{left_out} lines were left out"));
            }
            say(format_args!("{}: {}", record.level().as_str().to_ascii_lowercase(), record.args()));
        }
    }

    fn flush(&self) {}
}

/// In one write, so that lines of several processes do not mix. Nobody is told when stderr is gone.
fn say(text: Arguments<'_>) {
    let _ = io::stderr().write_all(format!("supermachine-vmm: {text}\n").as_bytes());
}

/// How many lines may still be said.
struct Allowance {
    left: u32,
    since: Instant,
    left_out: u64,
}

impl Allowance {
    fn new(now: Instant) -> Self {
        Self { left: BURST, since: now, left_out: 0 }
    }

    /// Whether a line may be said now, and how many were not since the last one.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let earned = now.duration_since(self.since).as_secs().saturating_mul(RATE.into());
        if earned > 0 {
            self.left =
                u32::try_from(earned).map_or(BURST, |earned| self.left.saturating_add(earned)).min(BURST);
            self.since = now;
        }
        if self.left == 0 {
            self.left_out += 1;
            return None;
        }
        self.left -= 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_flood_is_cut_and_counted() {
        let begin = Instant::now();
        let mut allowance = Allowance::new(begin);
        let said = (0..1000).filter(|_| allowance.take(begin).is_some()).count();
        assert_eq!(said, BURST as usize);
        let later = begin + Duration::from_secs(2);
        assert_eq!(allowance.take(later), Some(1000 - u64::from(BURST)));
        let said = (0..1000).filter(|_| allowance.take(later).is_some()).count();
        assert_eq!(said, 2 * RATE as usize - 1);
        let much_later = later + Duration::from_secs(1 << 40);
        let said = (0..1000).filter(|_| allowance.take(much_later).is_some()).count();
        assert_eq!(said, BURST as usize, "not more than a burst is saved up");
    }

    #[test]
    fn levels() {
        assert_eq!(level("off"), Ok(LevelFilter::Off));
        assert_eq!(level("debug"), Ok(LevelFilter::Debug));
        assert!(level("loud").is_err());
        assert!(level("").is_err());
    }
}
