//! A process of a container: its own, or one beside it.
//!
//! It is announced, then made, then it runs, then it has exited; it goes nowhere else. Its streams have a life of their
//! own ([`streams`]), since they may begin before the process and end after it.

pub mod streams;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use agent_api::agent::{Exit, Stdio};
use agent_api::stdio::Stream;
use anyhow::{Context, Result};
use tokio::sync::watch;

use crate::helper::client::null;
use crate::helper::{self, Streams};
use streams::{Line, Side};

/// Where a process is in its life.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum Life {
    /// It is to be made.
    #[default]
    Announced,
    /// Somebody is making it.
    Starting,
    /// It waits to be started.
    Created(i32),
    /// It runs.
    Running(i32),
    /// It has exited.
    Exited(Exit),
}

/// A process.
pub struct Process {
    /// The container's id.
    pub id: String,
    /// Empty for the container's own.
    pub exec_id: String,
    /// Which streams it has.
    pub stdio: Stdio,
    life: watch::Sender<Life>,
    lines: [Option<Arc<Line>>; 3],
    terminal: Mutex<Terminal>,
}

#[derive(Default)]
struct Terminal {
    master: Option<OwnedFd>,
    size: Option<(u16, u16)>,
}

impl Process {
    /// One that is announced.
    pub fn new(id: &str, exec_id: &str, stdio: Stdio) -> Self {
        let line = |there: bool| there.then(Arc::<Line>::default);
        let lines = [line(stdio.stdin), line(stdio.stdout), line(stdio.stderr && !stdio.terminal)];
        Self {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            stdio,
            life: watch::Sender::default(),
            lines,
            terminal: Mutex::default(),
        }
    }

    /// Where it is in its life.
    pub fn life(&self) -> Life {
        self.life.borrow().clone()
    }

    /// Goes on from where it must be, or says where it is instead.
    pub fn advance(&self, from: &Life, to: Life) -> Result<(), Life> {
        let mut instead = None;
        self.life.send_if_modified(|life| {
            let fits = life == from;
            if fits {
                *life = to;
            } else {
                instead = Some(life.clone());
            }
            fits
        });
        instead.map_or(Ok(()), Err)
    }

    /// It has exited.
    pub fn exit(&self, exit: Exit) {
        self.life.send_replace(Life::Exited(exit));
    }

    /// Its number, while it has one that is its own.
    pub fn pid(&self) -> Option<i32> {
        match *self.life.borrow() {
            Life::Created(pid) | Life::Running(pid) => Some(pid),
            _ => None,
        }
    }

    /// Waits until it has exited.
    pub async fn exited(&self) -> Exit {
        let mut life = self.life.subscribe();
        match life.wait_for(|life| matches!(life, Life::Exited(_))).await.as_deref() {
            Ok(Life::Exited(exit)) => exit.clone(),
            // The sender is this process's own.
            _ => Exit::default(),
        }
    }

    /// The line of a stream that it has.
    pub fn line(&self, stream: Stream) -> Option<&Arc<Line>> {
        self.lines[stream as usize].as_ref()
    }

    /// Each line that it has.
    pub fn lines(&self) -> impl Iterator<Item = &Arc<Line>> {
        self.lines.iter().flatten()
    }

    /// Makes what the process holds of its streams, and lets the other ends run. A terminal comes later.
    pub fn open_streams(&self) -> Result<Streams> {
        if self.stdio.terminal {
            return Ok(Streams { stdin: null()?, stdout: null()?, stderr: null()? });
        }
        let end = |stream: Stream| match self.line(stream) {
            None => null(),
            Some(line) => {
                let (ours, theirs) = streams::pipe(stream)?;
                streams::run(line, stream, Side::Pipe(ours));
                Ok(theirs)
            }
        };
        Ok(Streams { stdin: end(Stream::Stdin)?, stdout: end(Stream::Stdout)?, stderr: end(Stream::Stderr)? })
    }

    /// Takes the terminal that was made for it, and lets its streams run.
    pub fn set_terminal(&self, master: OwnedFd) -> Result<()> {
        let mut terminal = self.terminal();
        if let Some(size) = terminal.size {
            let _ = helper::resize(&master, size);
        }
        for stream in [Stream::Stdin, Stream::Stdout] {
            if let Some(line) = self.line(stream) {
                streams::run(line, stream, Side::Terminal(master.try_clone().context("sharing a terminal")?));
            }
        }
        terminal.master = Some(master);
        Ok(())
    }

    /// How large its terminal is to be.
    pub fn size(&self) -> Option<(u16, u16)> {
        self.terminal().size
    }

    /// Says how large its terminal is, now or when there is one.
    pub fn resize(&self, size: (u16, u16)) -> Result<()> {
        let mut terminal = self.terminal();
        terminal.size = Some(size);
        match &terminal.master {
            Some(master) => helper::resize(master, size).context("resizing the terminal"),
            None => Ok(()),
        }
    }

    /// Ends its streams, when all that was written has been taken.
    pub fn end_streams(&self) {
        self.terminal().master = None;
        for line in self.lines() {
            line.finish();
        }
    }

    fn terminal(&self) -> MutexGuard<'_, Terminal> {
        self.terminal.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lives_go_one_way() {
        let process = Process::new("c", "", Stdio::default());
        assert_eq!(process.advance(&Life::Created(1), Life::Running(1)), Err(Life::Announced));
        assert_eq!(process.advance(&Life::Announced, Life::Starting), Ok(()));
        assert_eq!(process.advance(&Life::Announced, Life::Starting), Err(Life::Starting));
        assert_eq!(process.pid(), None);
        assert_eq!(process.advance(&Life::Starting, Life::Running(7)), Ok(()));
        assert_eq!(process.pid(), Some(7));
        process.exit(Exit::default());
        assert_eq!(process.pid(), None);
    }

    #[tokio::test]
    async fn an_exit_is_seen_before_and_after() {
        let process = Process::new("c", "", Stdio::default());
        let exit = Exit { status: 3, ..Exit::default() };
        let (before, ()) = tokio::join!(process.exited(), async { process.exit(exit.clone()) });
        assert_eq!((before, process.exited().await), (exit.clone(), exit));
    }
}
