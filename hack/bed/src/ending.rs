//! How the tool ends when it is told to: what it started ends with it, at once.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::Result;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

use crate::exec::Terminal;

/// The signals that end the tool.
const SIGNALS: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

/// What has to be undone. Signals are taken by one thread, so nothing happens in a handler.
#[derive(Clone, Default)]
pub struct Ending {
    owned: Arc<Mutex<Owned>>,
}

#[derive(Default)]
struct Owned {
    host: Option<(u32, PathBuf)>,
    terminal: Option<Terminal>,
}

impl Ending {
    /// Starts to watch. Must be called before the first thread, so that all of them leave the
    /// signals to this one. Programs that are started inherit that; `tools` undoes it for them.
    pub fn watch() -> Result<Self> {
        let ending = Self::default();
        let mut signals = SigSet::empty();
        for signal in SIGNALS {
            signals.add(signal);
        }
        signals.thread_block()?;
        let watching = ending.clone();
        thread::spawn(move || {
            if let Ok(signal) = signals.wait() {
                watching.end();
                std::process::exit(128 + signal as i32);
            }
        });
        Ok(ending)
    }

    /// A host that must not outlive the tool.
    pub fn owns(&self, qemu: u32, dir: &Path) {
        self.lock().host = Some((qemu, dir.to_owned()));
    }

    /// It may, from now on.
    pub fn leaves(&self) {
        self.lock().host = None;
    }

    /// The terminal is raw now, and these were its settings.
    pub fn restores(&self, terminal: Terminal) {
        self.lock().terminal = Some(terminal);
    }

    /// Puts the terminal back, if it is raw.
    pub fn restore_terminal(&self) {
        if let Some(terminal) = self.lock().terminal.take() {
            terminal.restore();
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Owned> {
        self.owned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self) {
        self.restore_terminal();
        if let Some((qemu, dir)) = self.lock().host.take() {
            let _ = kill(Pid::from_raw(qemu.cast_signed()), Signal::SIGKILL);
            // Left-overs are swept by the next call; this is for the usual case.
            let _ = fs::remove_dir_all(dir);
        }
    }
}
