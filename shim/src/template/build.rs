//! The machine that becomes a template: it boots until its agent serves, has no container and is of nobody, and is
//! saved and ended.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Instant;

use log::info;
use tokio::net::UnixListener;
use vmm::snapshot::Form;

use super::{Making, Parts, Unmade};
use crate::deadlines;
use crate::error::{Attempt, Error, Result};
use crate::guest;
use crate::machine::monitor::{self, Boot, Greeting, Monitor, Origin, Start, places};
use crate::process::Process;

/// What can be told of a making, as it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Its kernel and its agent start.
    Boot,
    /// It forgets what it can read again.
    Settle,
    /// It is written.
    Save,
}

/// Boots a machine in `directory` and saves it. `noted` is told of its process before anything else happens, and
/// `step` of where it is.
pub async fn make(
    parts: &Parts,
    making: &Making,
    directory: &Path,
    noted: impl FnOnce(Process) -> Result<()>,
    step: impl Fn(Step),
) -> std::result::Result<(), Unmade> {
    let (started, ready) = start(parts, directory).map_err(Unmade::Here)?;
    let (monitor, greeting) = started;
    let made = async {
        noted(monitor.process())?;
        save(&monitor, greeting, ready, making, step).await
    };
    let made = made.await;
    let killed = monitor.has_ended().is_some_and(|ended| ended.killed);
    // Before anybody removes what it has open.
    monitor.kill().await;
    made.map_err(|error| if killed { Unmade::Here(error) } else { Unmade::Anywhere(error) })
}

fn start(parts: &Parts, directory: &Path) -> Result<((Monitor, Greeting), UnixListener)> {
    let ready = monitor::prepare(directory)?;
    // No guest mounts it before its first container, so a restored machine has another one.
    let tree = directory.join(places::TREE);
    fs::create_dir_all(&tree).attempt(format_args!("making {}", tree.display()))?;
    let origin = Origin::Boot(Boot {
        kernel: parts.kernel.clone(),
        initrd: parts.initrd.clone(),
        append: parts.append.clone(),
        memory: parts.memory,
        memory_max: (parts.memory_max > parts.memory).then_some(parts.memory_max),
        cpus: parts.cpus,
    });
    let start = Start { directory, origin, blocks: &[], network: None, cgroup: None };
    Ok((Monitor::start(&start)?, ready))
}

async fn save(
    monitor: &Monitor,
    greeting: Greeting,
    ready: UnixListener,
    making: &Making,
    step: impl Fn(Step),
) -> Result<()> {
    let begun = Instant::now();
    step(Step::Boot);
    let booting = async {
        greeting.heard().await?;
        ready.accept().await.attempt("waiting for the agent of the machine").map(drop)
    };
    if let Err(error) =
        monitor.while_alive("booting a machine for a template", deadlines::BOOT, booting).await
    {
        return Err(monitor.stuck(error).await);
    }
    let booted = begun.elapsed();
    step(Step::Settle);
    // Nothing else is asked of it: what it were to draw from its pool for an answer, all that come from it would have.
    let vsock = monitor.vsock();
    let settling = guest::settle(&vsock);
    monitor.while_alive("settling a machine for a template", deadlines::AGENT_WORK, settling).await?;
    let settled = begun.elapsed();
    step(Step::Save);
    let (state, memory) = (making.state.try_clone(), making.memory.try_clone());
    let what = "saving a machine";
    let (state, memory) = (state.attempt(what)?, memory.attempt(what)?);
    let saving = monitor.ask(what, move |control| {
        control.pause(deadlines::STANDSTILL)?;
        control.snapshot(state.as_fd(), memory.as_fd(), Form::Sparse, deadlines::SAVE)
    });
    let (length, data) = monitor.while_alive(what, deadlines::STANDSTILL + deadlines::SAVE, saving).await?;
    info!(
        "a template of {length} bytes, of which {data} are something: booted after {booted:?}, settled after {settled:?}, \
         saved after {:?}",
        begun.elapsed()
    );
    match making.memory.metadata().attempt(what)?.len() {
        found if found == length => Ok(()),
        found => {
            Err(Error::unknown(format!("{what}: its memory has {found} bytes, and should have {length}")))
        }
    }
}
