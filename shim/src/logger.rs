//! The log: lines as containerd writes them, to the FIFO `log` in the bundle, and to a file of the shim's own.
//!
//! containerd reads the FIFO while it lives. Nothing may wait for that, so what the FIFO does not take is dropped. The file
//! is for operators; its older half goes when it is full.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use log::{LevelFilter, Log, Metadata, Record};
use vmm::console::Tail;

use crate::time::rfc3339;

/// So large the shim's own file may become.
const KEPT: usize = 256 * 1024;

struct Lines {
    to: Option<File>,
    kept: Mutex<Option<Tail>>,
    id: String,
    level: LevelFilter,
}

impl Log for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Libraries tell of their own workings below that.
        let ours = metadata.target().starts_with("shim");
        metadata.level() <= if ours { self.level } else { LevelFilter::Warn }
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let level = record.level().as_str().to_lowercase();
            let level = if level == "warn" { "warning" } else { &level };
            let text = line(SystemTime::now(), level, &self.id, &record.args().to_string());
            // One write a line, so that lines of several writers do not mix.
            if let Some(mut to) = self.to.as_ref() {
                let _ = to.write(text.as_bytes());
            }
            // A full disk costs the log, and nothing else.
            if let Some(kept) = &mut *self.kept.lock().unwrap_or_else(PoisonError::into_inner) {
                let _ = kept.write_all(text.as_bytes());
            }
        }
    }

    fn flush(&self) {}
}

fn line(time: SystemTime, level: &str, id: &str, message: &str) -> String {
    format!(
        "time={:?} level={level} msg={message:?} runtime=io.containerd.supermachine.v2 id={id}\n",
        rfc3339(time)
    )
}

/// Logs to the FIFO at `fifo` and the file at `kept` from now on, to those of them that can be opened.
pub fn start(fifo: &Path, kept: &Path, id: &str, debug: bool) {
    let flags = libc::O_NONBLOCK | libc::O_CLOEXEC;
    let to = OpenOptions::new().write(true).custom_flags(flags).open(fifo).ok();
    let level = if debug { LevelFilter::Debug } else { LevelFilter::Info };
    let lines = Lines { to, kept: Mutex::new(Tail::create(kept, KEPT).ok()), id: id.to_owned(), level };
    if log::set_boxed_logger(Box::new(lines)).is_ok() {
        log::set_max_level(level);
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    #[test]
    fn lines_are_containerds() {
        let time = UNIX_EPOCH + Duration::new(1_700_000_000, 5_000_000);
        assert_eq!(
            line(time, "info", "c1", "a \"b\"\nc"),
            "time=\"2023-11-14T22:13:20.005000000Z\" level=info msg=\"a \\\"b\\\"\\nc\" runtime=io.containerd.supermachine.v2 id=c1\n"
        );
    }
}
