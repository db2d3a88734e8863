//! What the tool says while it works: one line a step, on standard error, with the time it took.

use std::fmt::Display;
use std::io::{IsTerminal, Write, stderr};
use std::time::Instant;

/// A step under way. Dropping it without [`Step::done`] leaves the line as it stands: the error
/// that ended the step follows.
pub struct Step {
    what: String,
    began: Instant,
    live: bool,
}

impl Step {
    pub fn begin(what: impl Into<String>) -> Self {
        let step = Self { what: what.into(), began: Instant::now(), live: stderr().is_terminal() };
        if step.live {
            let _ = write!(stderr(), "\r\x1b[2K:: {} ...", step.what);
        } else {
            let _ = writeln!(stderr(), ":: {} ...", step.what);
        }
        step
    }

    /// Says how far the step is; only where a person is watching.
    pub fn at(&self, detail: impl Display) {
        if self.live {
            let _ = write!(
                stderr(),
                "\r\x1b[2K:: {} ... {detail} ({:.0} s)",
                self.what,
                self.began.elapsed().as_secs_f64()
            );
            let _ = stderr().flush();
        }
    }

    pub fn done(self, detail: impl Display) {
        let detail = detail.to_string();
        let gap = if detail.is_empty() { "" } else { ": " };
        let start = if self.live { "\r\x1b[2K" } else { "" };
        let seconds = self.began.elapsed().as_secs_f64();
        let _ = writeln!(stderr(), "{start}:: {}{gap}{detail} ({seconds:.1} s)", self.what);
    }
}

/// One line that is not a step.
pub fn say(line: impl Display) {
    let _ = writeln!(stderr(), ":: {line}");
}
