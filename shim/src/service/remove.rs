//! `Delete`, and what undoes everything.

use std::sync::Arc;

use containerd_shim_protos::api::DeleteResponse;
use log::warn;

use super::{Container, Shim, lock};
use crate::blocking::blocking;
use crate::error::{Attempt, Result};
use crate::journal::Journal;
use crate::time::timestamp;

impl Shim {
    /// `Delete`
    pub async fn delete(&self, id: &str, exec: &str) -> Result<DeleteResponse> {
        let _changing = self.changes.read().await;
        self.ledger.deleting(id, exec)?;
        let removed = if exec.is_empty() { self.remove(id).await } else { self.remove_exec(id, exec).await };
        removed.inspect_err(|_| self.ledger.not_deleted(id, exec))?;
        let (pid, exit) = self.ledger.deleted(id, exec)?;
        Ok(DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..DeleteResponse::default()
        })
    }

    pub(super) async fn remove_exec(&self, id: &str, exec: &str) -> Result<()> {
        let container = self.container(id)?;
        self.remove_in_guest(&container, exec).await;
        let streams = lock(&container.streams).remove(exec);
        if let Some(streams) = streams {
            streams.close().await;
        }
        Ok(())
    }

    async fn remove(&self, id: &str) -> Result<()> {
        let container = self.container(id)?;
        self.remove_in_guest(&container, "").await;
        let streams = std::mem::take(&mut *lock(&container.streams));
        for streams in streams.values() {
            streams.close().await;
        }
        let last = {
            let containers = lock(&self.containers);
            containers.len() == 1 && containers.contains_key(id)
        };
        let mut machine_journal = None;
        match self.machine() {
            Some(machine) if last => {
                machine.stop().await;
                machine.leave_network().await;
                machine_journal = Some(machine.journal.clone());
            }
            Some(machine) => machine.eject(&container.disks).await,
            None => {}
        }
        let holder = lock(&container.holder).take();
        drop(holder);
        if let Some(journal) = container.journal.clone() {
            self.teardown(journal, machine_journal).await?;
        }
        lock(&self.containers).remove(id);
        if last {
            lock(&self.machine).take();
        }
        Ok(())
    }

    /// The guest's part is best told to go, but does not decide: with the last container the machine goes, and of a
    /// machine that is gone nothing is left.
    async fn remove_in_guest(&self, container: &Container, exec: &str) {
        if self.machine().is_some_and(|machine| machine.is_over()) {
            return;
        }
        if let Err(error) = container.guest.delete(&container.id, exec).await {
            warn!("removing {} {exec} in the guest: {error}", container.id);
        }
    }

    /// Undoes what was made for a container, and for its machine if that ends with it.
    pub(super) async fn teardown(
        &self,
        container: Arc<Journal>,
        machine: Option<Arc<Journal>>,
    ) -> Result<()> {
        let undoing = move || {
            // Both, whatever the first says.
            let results = [container.undo(), machine.map_or(Ok(()), |journal| journal.undo())];
            results.into_iter().collect::<std::io::Result<Vec<()>>>().attempt("cleaning up").map(drop)
        };
        blocking("cleaning up", undoing).await
    }
}
