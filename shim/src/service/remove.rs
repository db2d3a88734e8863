//! `Delete`, and what undoes everything.

use std::sync::Arc;

use containerd_shim_protos::api::DeleteResponse;
use log::warn;

use super::{Container, Leaving, Shim, lock};
use crate::blocking::blocking;
use crate::error::{Attempt, Result};
use crate::journal::{Journal, undo_all};
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
        let removed = self.take_away(&container).await;
        *lock(&container.leaving) = Leaving::No;
        self.left.notify_waiters();
        removed
    }

    /// Decides whether a container is the last of its machine's. Several may leave at a time: one of them takes the machine
    /// along, when the others, who use it until then, are gone.
    pub(super) async fn is_last(&self, container: &Container) -> bool {
        loop {
            let left = self.left.notified();
            {
                let containers = lock(&self.containers);
                let others = containers.values().filter(|other| other.id != container.id);
                let others: Vec<_> = others.map(|other| *lock(&other.leaving)).collect();
                // Who waits already waits for this one, too; none longer than what the others do takes, which has
                // its deadlines.
                let is_last = others.iter().all(|other| *other == Leaving::Before);
                *lock(&container.leaving) = if is_last { Leaving::Last } else { Leaving::Before };
                if !is_last || others.is_empty() {
                    return is_last;
                }
            }
            left.await;
        }
    }

    async fn take_away(&self, container: &Container) -> Result<()> {
        let id = container.id.as_str();
        self.remove_in_guest(container, "").await;
        let streams = std::mem::take(&mut *lock(&container.streams));
        for streams in streams.values() {
            streams.close().await;
        }
        let last = self.is_last(container).await;
        let mut machine_journal = None;
        match self.machine() {
            Some(machine) if last => {
                machine.stop().await;
                machine.leave_network().await;
                machine_journal = Some(machine.journal.clone());
            }
            Some(machine) => {
                machine.eject(&container.disks).await;
                machine.give_back(container.room).await;
                self.resettle(container, &machine);
            }
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
        let undoing = move || undo_all([&*container], machine.as_deref()).attempt("cleaning up");
        blocking("cleaning up", undoing).await
    }
}
