//! Checkpoints over gRPC: what a task is written down as, and tasks that go on from there.

use std::time::Duration;

use anyhow::{Context, Result};
use containerd_client::services::v1::{
    CheckpointTaskRequest, CreateRequest, CreateTaskRequest, DeleteRequest,
};
use containerd_client::types::Descriptor;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::shim::oci::CheckpointOptions;
use prost_types::Any;

use super::api::Api;
use super::container::{Container, Stdio};

/// For the writing and the reading of a whole machine.
const LONG: Duration = Duration::from_mins(4);
/// Of the content that a task goes on from.
const MEMORY: &str = "application/vnd.containerd.container.criu.checkpoint.criu.tar";

/// A task that was written down. It is kept until this is dropped.
pub struct Checkpoint<'a> {
    api: &'a Api,
    lease: String,
    descriptor: Descriptor,
}

impl Container<'_> {
    /// Writes its task down, which goes on, or ends.
    pub fn checkpoint(&self, exit: bool) -> Result<Checkpoint<'_>> {
        let api = self.api;
        let lease = format!("checkpoint-{}", self.id);
        let request = api.within(CreateRequest { id: lease.clone(), ..CreateRequest::default() })?;
        api.call("Leases.Create", api.leases().create(request))?;
        // The lease goes with the value, whatever fails.
        let mut checkpoint = Checkpoint { api, lease, descriptor: Descriptor::default() };
        let options = CheckpointOptions { exit, ..CheckpointOptions::default() };
        let value = options.write_to_bytes().context("writing the options of a checkpoint")?;
        let mut request = api.within(CheckpointTaskRequest {
            container_id: self.id.clone(),
            options: Some(Any { type_url: "containerd.runc.v1.CheckpointOptions".into(), value }),
            ..CheckpointTaskRequest::default()
        })?;
        let name = checkpoint.lease.parse().context("the name of a lease")?;
        request.metadata_mut().insert("containerd-lease", name);
        let mut tasks = api.tasks();
        let answer = api.call_within("Tasks.Checkpoint", LONG, tasks.checkpoint(request))?;
        let memory = answer.descriptors.into_iter().find(|one| one.media_type == MEMORY);
        checkpoint.descriptor = memory.context("the checkpoint has no memory")?;
        Ok(checkpoint)
    }

    /// Creates its task from a checkpoint and returns the pid that containerd gives for it.
    pub fn create_task_from(&mut self, stdio: &Stdio, checkpoint: &Checkpoint<'_>) -> Result<u32> {
        let request =
            CreateTaskRequest { checkpoint: Some(checkpoint.descriptor.clone()), ..self.new_task(stdio) };
        let request = self.api.within(request)?;
        self.has_task = true;
        Ok(self.api.call_within("Tasks.Create", LONG, self.api.tasks().create(request))?.pid)
    }
}

impl Checkpoint<'_> {
    /// Its length, as it is kept.
    pub fn size(&self) -> i64 {
        self.descriptor.size
    }
}

impl Drop for Checkpoint<'_> {
    fn drop(&mut self) {
        let request = self.api.within(DeleteRequest { id: self.lease.clone(), sync: true });
        let removed =
            request.and_then(|request| self.api.call("Leases.Delete", self.api.leases().delete(request)));
        if let Err(error) = removed {
            eprintln!("# removing the lease {}: {error:#}", self.lease);
        }
    }
}
