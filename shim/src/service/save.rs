//! `Checkpoint`: a container is written down with its machine, and goes on, or ends.
//!
//! It stands still while that happens, by its guest's freezer, and so it does in those that are restored, until they
//! are started. Nothing of its streams is on its way between shim and guest when the machine is saved: what was sent is
//! where it was sent to, and the rest waits on the side that has it.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use agent_api::agent::Input;
use agent_api::stdio::Stream;
use containerd_shim_protos::api::CheckpointTaskRequest;
use containerd_shim_protos::shim::oci::CheckpointOptions;
use log::{info, warn};
use protobuf::Message;
use tokio::time::timeout;
use vmm::snapshot::Form;

use super::{Container, Shim, lock};
use crate::checkpoint::{About, Exec, Writing, disks};
use crate::deadlines;
use crate::error::{Error, Result};
use crate::ledger::Phase;
use crate::machine::Machine;
use crate::stdio::Streams;

/// Of runc's shim, whose options clients send.
const OPTIONS: &str = "containerd.runc.v1.CheckpointOptions";

impl Shim {
    /// `Checkpoint`
    pub async fn checkpoint(&self, request: CheckpointTaskRequest) -> Result<()> {
        let id = request.id.as_str();
        let exit = exits(&request)?;
        let _alone = self.changes.write().await;
        let paused = match self.ledger.view(id, "")?.phase {
            Phase::Running => false,
            Phase::Paused => true,
            _ => return Err(Error::precondition("cannot checkpoint a container that does not run")),
        };
        let container = self.container(id)?;
        let machine = self.machine().ok_or_else(|| Error::precondition("the machine is gone"))?;
        if let Some(why) = container.stays.or_else(|| self.obstacle()) {
            return Err(Error::precondition(format!("cannot checkpoint this container: {why}")));
        }
        let begun = Instant::now();
        let writing = Writing::begin(Path::new(&request.path))?;
        let writes = async |about| {
            writing.describe(&about)?;
            machine.save(&writing.state, &writing.memory, Form::Packed, !exit, || Ok(())).await
        };
        self.while_still(&container, &machine, !paused, exit, writes).await?;
        info!("{id} is written down after {:?}{}", begun.elapsed(), if exit { ", and ends" } else { "" });
        self.ledger.checkpointed(id, &request.path)?;
        if exit {
            machine.kill().await;
        }
        writing.keep();
        Ok(())
    }

    /// Does it while a container stands still with its streams, by its guest's freezer if it runs. It goes on
    /// afterwards, whatever came of it; unless it is to end, when that has succeeded.
    pub(super) async fn while_still(
        &self,
        container: &Container,
        machine: &Machine,
        runs: bool,
        ends: bool,
        work: impl AsyncFnOnce(About) -> Result<()>,
    ) -> Result<()> {
        let id = container.id.as_str();
        let held = Held::begin(container);
        let done = async {
            if runs {
                container.guest.pause(id).await?;
            }
            work(self.hold(container, machine, &held).await?).await
        };
        let done = done.await;
        drop(held);
        if ends && done.is_ok() {
            return Ok(());
        }
        let released = container.guest.release(id).await;
        let resumed = if runs { container.guest.resume(id).await } else { Ok(()) };
        done.and(released).and(resumed)
    }

    /// Lets all streams stand still; says what there is to know of the container then.
    async fn hold(&self, container: &Container, machine: &Machine, held: &Held) -> Result<About> {
        let id = container.id.as_str();
        container.guest.begin_hold(id).await?;
        let mut inputs = Vec::new();
        for (exec, streams) in &held.0 {
            // What is not read is taken in by the guest, up to a limit.
            let sent = timeout(deadlines::HOLD, streams.sent()).await;
            let sent = sent.map_err(|_| Error::deadline("the guest does not take what was sent to it"))?;
            if let Some((bytes, ended)) = sent {
                inputs.push(Input { exec_id: exec.clone(), bytes, ended, ..Input::default() });
            }
        }
        for output in container.guest.hold(id, inputs).await? {
            let stream = if output.stderr { Stream::Stderr } else { Stream::Stdout };
            let Some(streams) = held.0.get(&output.exec_id) else { continue };
            let arrived = timeout(deadlines::HOLD, streams.arrived(stream, output.bytes)).await;
            arrived.map_err(|_| Error::deadline("what the guest has sent did not arrive"))?;
        }
        let set = |exec: &str| held.0.get(exec).map(|streams| streams.set).unwrap_or_default();
        let heard = machine.heard.load(Ordering::Relaxed);
        let mut about = About::new(&container.guest.name(id), &container.spec, set(""), heard);
        about.disks = disks(&container.disks)?;
        let execs = held.0.keys().filter(|exec| !exec.is_empty());
        about.execs.extend(execs.map(|exec| {
            let exited = self.ledger.view(id, exec).is_ok_and(|view| view.phase == Phase::Exited);
            Exec { id: exec.clone(), streams: set(exec), exited }
        }));
        Ok(about)
    }
}

/// Whether the container is to end.
fn exits(request: &CheckpointTaskRequest) -> Result<bool> {
    let Some(options) = request.options.as_ref() else { return Ok(false) };
    if options.type_url.rsplit('/').next() != Some(OPTIONS) {
        // Another runtime's.
        warn!("options of a checkpoint that are of type {} are not for this runtime", options.type_url);
        return Ok(false);
    }
    let options = CheckpointOptions::parse_from_bytes(&options.value)
        .map_err(|error| Error::invalid(format!("reading the options of a checkpoint: {error}")))?;
    Ok(options.exit)
}

/// Streams of each process, which are held until this is dropped.
struct Held(HashMap<String, Arc<Streams>>);

impl Held {
    fn begin(container: &Container) -> Self {
        let held = Self(lock(&container.streams).clone());
        held.set(true);
        held
    }

    fn set(&self, held: bool) {
        for streams in self.0.values() {
            streams.hold(held);
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.set(false);
    }
}
