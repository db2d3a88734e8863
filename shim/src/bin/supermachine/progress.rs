//! What is said of something that takes long, on standard error: on a terminal a line that is written over, elsewhere
//! each step once. Of what is over within a second, nothing.

use std::io::{IsTerminal, Write, stderr};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{JoinHandle, spawn};
use std::time::{Duration, Instant};

/// Nobody wonders before.
const PATIENCE: Duration = Duration::from_secs(1);
const TICK: Duration = Duration::from_millis(200);
/// Columns of a bar.
const COLUMNS: u64 = 30;

/// A step, and how far it is, of how much, where that is known.
type Step = (String, Option<(u64, u64)>);

/// Goes on until it is dropped.
pub struct Progress {
    tell: Option<Sender<Step>>,
    shown: Option<JoinHandle<()>>,
}

impl Progress {
    /// Begins with this step.
    pub fn of(step: &str) -> Self {
        let (tell, told) = channel::<Step>();
        let mut step = (step.to_owned(), None);
        let shown = spawn(move || {
            let (begun, terminal) = (Instant::now(), stderr().is_terminal());
            let mut said = String::new();
            loop {
                match told.recv_timeout(TICK) {
                    Ok(next) => step = next,
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => break,
                }
                let age = begun.elapsed();
                if age < PATIENCE || (!terminal && said == step.0) {
                    continue;
                }
                said.clone_from(&step.0);
                let text = line(&step, age);
                // Nobody depends on it.
                let _ =
                    if terminal { write!(stderr(), "\r\x1b[K{text}") } else { writeln!(stderr(), "{text}") };
            }
            if terminal && !said.is_empty() {
                let _ = write!(stderr(), "\r\x1b[K");
            }
        });
        Self { tell: Some(tell), shown: Some(shown) }
    }

    /// The next step, or the same one further on.
    pub fn step(&self, step: &str, part: Option<(u64, u64)>) {
        if let Some(tell) = &self.tell {
            let _ = tell.send((step.to_owned(), part));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        drop(self.tell.take());
        if let Some(shown) = self.shown.take() {
            let _ = shown.join();
        }
    }
}

fn line((step, part): &Step, age: Duration) -> String {
    let bar = part.filter(|(_, whole)| *whole > 0).map(|(done, whole)| {
        let full = usize::try_from(done.min(whole) * COLUMNS / whole).unwrap_or(0);
        let empty = COLUMNS as usize - full;
        format!(" ▕{}{}▏ {} of {} MiB", "█".repeat(full), " ".repeat(empty), done >> 20, whole >> 20)
    });
    format!("{step}{} ({} s)", bar.unwrap_or_default(), age.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        let half = line(&("reading".into(), Some((32 << 20, 64 << 20))), Duration::from_secs(3));
        assert_eq!(half, format!("reading ▕{}{}▏ 32 of 64 MiB (3 s)", "█".repeat(15), " ".repeat(15)));
        assert_eq!(line(&("booting".into(), None), Duration::from_secs(1)), "booting (1 s)");
        assert_eq!(line(&("reading".into(), Some((5, 0))), Duration::ZERO), "reading (0 s)");
    }
}
