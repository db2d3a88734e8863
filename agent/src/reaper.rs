//! The one that waits: every process whose parent is gone becomes process 1's child, and processes of containers are
//! among them once the helper that made them has ended.
//!
//! Whoever wants to know of a process's end says so before it can end unseen: a helper stays, as the parent,
//! until the agent has asked here for the process that it made.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// How a process ended, as a shell tells it.
pub type Status = u32;

/// Who waits for whom.
#[derive(Clone, Default)]
pub struct Reaper {
    waiting: Arc<Mutex<HashMap<i32, oneshot::Sender<Status>>>>,
}

impl Reaper {
    /// Begins to wait; for ever, in a task of its own.
    pub fn start() -> Result<Self> {
        let reaper = Self::default();
        let mut children = signal(SignalKind::child()).context("waiting for children")?;
        let also = reaper.clone();
        tokio::spawn(async move {
            loop {
                also.reap();
                if children.recv().await.is_none() {
                    return;
                }
            }
        });
        Ok(reaper)
    }

    /// The end of `pid`, which must be a process that is not waited for already.
    pub fn watch(&self, pid: i32) -> oneshot::Receiver<Status> {
        let (tell, told) = oneshot::channel();
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(pid, tell);
        told
    }

    /// Collects everybody who has ended.
    fn reap(&self) {
        while let Some((pid, status)) = next() {
            let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&pid);
            if let Some(tell) = waiting {
                let _ = tell.send(status);
            }
        }
    }
}

/// One that has ended. Not by nix, whose signals have no real-time ones: such an end would be lost.
fn next() -> Option<(i32, Status)> {
    let mut status = 0;
    // SAFETY: the status is an integer of ours.
    let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
    let code =
        if libc::WIFSIGNALED(status) { 128 + libc::WTERMSIG(status) } else { libc::WEXITSTATUS(status) };
    (pid > 0).then(|| (pid, code.cast_unsigned()))
}
