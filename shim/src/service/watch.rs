//! What the machine tells: exits, memory that ran out, and its own end.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use agent_api::agent::Event;
use agent_api::agent::event::What;
use log::{debug, info, warn};
use tokio::time::{sleep, timeout};

use super::Shim;
use crate::error::{Attempt, Error, Result};
use crate::guest::Guest;
use crate::ledger::Exit;
use crate::machine::Machine;
use crate::{deadlines, time};

/// Of a process whose machine is gone: as if it had been killed.
const KILLED: u32 = 128 + 9;

impl Shim {
    /// Hears from a machine, until it is over.
    pub(super) fn watch(self: &Arc<Self>, machine: Arc<Machine>) {
        let (shim, followed) = (self.clone(), machine.clone());
        tokio::spawn(async move {
            if let Err(error) = shim.follow_network(&followed).await {
                warn!("changes of the machine's network are not followed: {}", error.text);
            }
        });
        let (shim, followed) = (self.clone(), machine.clone());
        tokio::spawn(async move {
            if let Err(error) = shim.follow_files(&followed).await {
                warn!("who watches files of binds is not told of what others do with them: {}", error.text);
            }
        });
        let shim = self.clone();
        tokio::spawn(async move {
            tokio::select! {
                error = shim.hear(&machine.guest, &machine.heard) => {
                    // Of a machine that turns itself off the connection goes first.
                    if timeout(deadlines::POWER_OFF, machine.ended()).await.is_err() {
                        warn!("the machine is turned off, since nobody can speak with it: {}", machine.explain(error));
                        machine.stop().await;
                    }
                }
                how = machine.ended() => info!("the machine has ended: {how}"),
            }
            shim.over().await;
        });
    }

    /// Gives the guest of a machine what comes into its network namespace, and takes what goes, until it has ended. What
    /// could not be done is tried again.
    async fn follow_network(&self, machine: &Machine) -> Result<()> {
        let mut failed = None;
        let mut refused = false;
        loop {
            if let Err(error) = machine.forward_localhost().await
                && !std::mem::replace(&mut refused, true)
            {
                warn!("ports of the machine cannot be forwarded from its network namespace: {}", error.text);
            }
            let changed = async {
                match failed {
                    None => machine.network_changes().await,
                    // No change is needed for another attempt.
                    Some(_) => {
                        timeout(deadlines::NETWORK_AGAIN, machine.network_changes()).await.unwrap_or(Ok(()))
                    }
                }
            };
            tokio::select! {
                changed = changed => changed?,
                _ = machine.ended() => return Ok(()),
            }
            // A guest that is being written down answers nobody.
            let _changing = self.changes.read().await;
            let error = machine.bring_network(false).await.err().map(|error| error.text);
            if let Some(error) = &error
                && failed.as_ref() != Some(error)
            {
                warn!("the network of the machine has changed, and the guest has it as it was: {error}");
            }
            failed = error;
        }
    }

    /// Tells those processes of a machine that watch files of binds of what others do with them, until it has ended.
    async fn follow_files(&self, machine: &Machine) -> Result<()> {
        let ask = |known| Box::pin(machine.guest.watched(known));
        let mut watches = machine.watches()?;
        let (mut known, mut asking, mut refused) = (0, ask(0), false);
        loop {
            tokio::select! {
                answer = &mut asking => {
                    match answer {
                        Ok((version, places)) if version != known => {
                            known = version;
                            // It may be gone already, and others come.
                            if let Err(error) = watches.set(places)
                                && !std::mem::replace(&mut refused, true)
                            {
                                warn!("of what the guest watches nothing can be watched on the host: {error}");
                            }
                        }
                        Ok(_) => {}
                        // A guest that is busy answers late, and then again.
                        Err(ttrpc::Error::RpcStatus(_) | ttrpc::Error::Others(_)) => sleep(deadlines::WATCHED_AGAIN).await,
                        // That is told by who hears of exits.
                        Err(_) => return Ok(()),
                    }
                    asking = ask(known);
                }
                news = watches.next() => {
                    let news = news.attempt("hearing of what happens to files")?;
                    // A guest that is being written down answers nobody.
                    let _changing = self.changes.read().await;
                    if let Err(error) = machine.guest.tell(news).await {
                        debug!("telling of what has happened to files: {}", error.text);
                    }
                }
                _ = machine.ended() => return Ok(()),
            }
        }
    }

    /// Hears from an agent, until the connection is lost. No event is when a call fails: the next asks for those after
    /// the last one heard.
    pub(super) async fn hear(self: &Arc<Self>, guest: &Guest, last: &AtomicU64) -> Error {
        loop {
            match guest.events(last.load(Ordering::Relaxed)).await {
                Ok(events) => {
                    for event in events {
                        last.fetch_max(event.sequence, Ordering::Relaxed);
                        self.heard(event);
                    }
                }
                // A guest that is busy answers late, and then again.
                Err(error @ (ttrpc::Error::RpcStatus(_) | ttrpc::Error::Others(_))) => {
                    debug!("asking for events: {error}");
                    sleep(Duration::from_millis(200)).await;
                }
                Err(lost) => return lost.into(),
            }
        }
    }

    fn heard(self: &Arc<Self>, event: Event) {
        let (id, exec) = (event.id, event.exec_id);
        match event.what {
            Some(What::Oom(_)) => self.ledger.oom(&id),
            Some(What::Exit(exit)) => {
                let exit = Exit { status: exit.status, at: exit.exited_at };
                let shim = self.clone();
                tokio::spawn(async move { shim.exited(&id, &exec, exit).await });
            }
            _ => {}
        }
    }

    /// A process has exited: told when what it wrote is where its client reads it.
    async fn exited(&self, id: &str, exec: &str, exit: Exit) {
        let streams = self.container(id).ok().and_then(|container| container.streams(exec));
        if let Some(streams) = streams {
            streams.drain().await;
        }
        self.ledger.exited(id, exec, exit);
        if exec.is_empty() {
            self.last_exits(id).await;
        } else if self.ledger.view(id, exec).is_err() {
            self.forget(id, exec).await;
        }
    }

    /// A process that a container had when it was written down has ended in one that is restored. No client knows of it,
    /// so none deletes it.
    async fn forget(&self, id: &str, exec: &str) {
        let _changing = self.changes.read().await;
        let known = self.container(id).is_ok_and(|container| container.streams(exec).is_some());
        if known && let Err(error) = self.remove_exec(id, exec).await {
            info!("removing {exec} of {id}: {error}");
        }
    }

    /// With a container's own process all others of it end. Should the guest not tell, the shim does.
    async fn last_exits(&self, id: &str) {
        if self.ledger.overdue(id).is_empty() {
            return;
        }
        sleep(deadlines::LAST_EXITS + deadlines::DRAIN).await;
        for exec in self.ledger.overdue(id) {
            warn!("the exit of {exec} in {id} is overdue");
            self.ledger.exited(id, &exec, Exit { status: KILLED, at: time::now() });
        }
    }

    /// Nothing runs in a machine that is over.
    async fn over(&self) {
        for (id, exec) in self.ledger.live() {
            let streams = self.container(&id).ok().and_then(|container| container.streams(&exec));
            if let Some(streams) = streams {
                streams.drain().await;
            }
            self.ledger.exited(&id, &exec, Exit { status: KILLED, at: time::now() });
        }
    }
}
