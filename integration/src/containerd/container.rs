//! The life of one container over gRPC, step by step as a client like docker takes them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use containerd_client::services::v1::container::Runtime;
use containerd_client::services::v1::{
    CloseIoRequest, Container as Record, CreateContainerRequest, CreateTaskRequest, DeleteContainerRequest,
    DeleteTaskRequest, GetRequest, KillRequest, MetricsRequest, PauseTaskRequest, ResizePtyRequest,
    ResumeTaskRequest, StartRequest, UpdateTaskRequest, WaitRequest,
};
use containerd_client::tonic::Code;
use containerd_client::types::Mount;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::shim::oci::Options;
use prost_types::Any;
use serde_json::Value;

use super::api::{Api, SNAPSHOTTER, code};
use super::spec::spec;

/// What a container is made from.
#[derive(Clone, Copy, Debug)]
pub struct NewContainer<'a> {
    /// Its id, new in its namespace.
    pub id: &'a str,
    /// The name of an image that is unpacked already.
    pub image: &'a str,
    /// `io.containerd.runc.v2` and the like.
    pub runtime: &'a str,
    /// What it runs.
    pub process: &'a [&'a str],
}

/// Paths of the FIFOs a task reads and writes, or addresses like `file:///path`. The runc shim wants stdout and stderr
/// both or neither; an empty one is none, as that of errors is when there is a terminal.
#[derive(Clone, Debug)]
pub struct Stdio {
    /// What it reads; without it, /dev/null.
    pub stdin: Option<PathBuf>,
    /// What it writes.
    pub stdout: PathBuf,
    /// What it complains to.
    pub stderr: PathBuf,
}

/// A container of a test. Dropping it removes whatever is left of it, so that a test which fails half way
/// leaves nothing for the next.
pub struct Container<'a> {
    pub(super) api: &'a Api,
    pub(super) id: String,
    rootfs: Vec<Mount>,
    terminal: bool,
    pub(super) has_task: bool,
}

impl Api {
    /// Prepares a root file system and registers the container; nothing runs yet.
    pub fn create(&self, new: &NewContainer<'_>) -> Result<Container<'_>> {
        self.create_with(new, |_| {})
    }

    /// The same, of a configuration that `edit` has had in its hands.
    pub fn create_with(
        &self,
        new: &NewContainer<'_>,
        edit: impl FnOnce(&mut Value),
    ) -> Result<Container<'_>> {
        self.register(new, None, edit)
    }

    /// The same as [`Api::create`], for a runtime whose shim is runc's: it shall call `binary` in runc's place.
    pub fn create_through(&self, new: &NewContainer<'_>, binary: &str) -> Result<Container<'_>> {
        let options = Options { binary_name: binary.into(), ..Options::default() };
        let value = options.write_to_bytes().context("writing the runtime's options")?;
        let options = Any { type_url: "containerd.runc.v1.Options".into(), value };
        self.register(new, Some(options), |_| {})
    }

    fn register(
        &self,
        new: &NewContainer<'_>,
        options: Option<Any>,
        edit: impl FnOnce(&mut Value),
    ) -> Result<Container<'_>> {
        let parent = self.top_layer(new.image)?;
        let rootfs = self.prepare_snapshot(new.id, &parent)?;
        let mut spec = spec(new.id, self.namespace(), new.process, false);
        edit(&mut spec);
        let terminal = spec["process"]["terminal"] == true;
        // From here on the snapshot goes with the value, whatever fails.
        let container = Container { api: self, id: new.id.to_owned(), rootfs, terminal, has_task: false };
        let record = Record {
            id: new.id.into(),
            image: new.image.into(),
            runtime: Some(Runtime { name: new.runtime.into(), options }),
            spec: Some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Spec".into(),
                value: serde_json::to_vec(&spec).context("writing the container's configuration")?,
            }),
            snapshotter: SNAPSHOTTER.into(),
            snapshot_key: new.id.into(),
            ..Record::default()
        };
        let request = self.within(CreateContainerRequest { container: Some(record) })?;
        self.call("Containers.Create", self.containers().create(request))?;
        Ok(container)
    }
}

impl Api {
    /// Removes whatever there is of a container `id`, running or not; fine if there is nothing.
    pub fn purge(&self, id: &str) -> Result<()> {
        let mut container = self.adopt(id);
        let removed = container.abandon();
        std::mem::forget(container);
        removed
    }

    /// The container `id` and its task, which are there.
    pub fn adopt(&self, id: &str) -> Container<'_> {
        Container { api: self, id: id.to_owned(), rootfs: Vec::new(), terminal: false, has_task: true }
    }
}

impl Container<'_> {
    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its id, to be adopted through another connection; nobody removes it until then.
    pub fn hand_over(self) -> String {
        let id = self.id.clone();
        std::mem::forget(self);
        id
    }

    /// Gives it these mounts for its root file system, in the place of those of its snapshot.
    pub fn set_root(&mut self, rootfs: Vec<Mount>) {
        self.rootfs = rootfs;
    }

    /// What it takes to create its task.
    pub(super) fn new_task(&self, stdio: &Stdio) -> CreateTaskRequest {
        CreateTaskRequest {
            container_id: self.id.clone(),
            rootfs: self.rootfs.clone(),
            stdin: stdio.stdin.as_deref().map(text).unwrap_or_default(),
            stdout: text(&stdio.stdout),
            stderr: text(&stdio.stderr),
            terminal: self.terminal,
            ..CreateTaskRequest::default()
        }
    }

    /// Creates its task and returns the pid that containerd gives for it.
    pub fn create_task(&mut self, stdio: &Stdio) -> Result<u32> {
        let request = self.api.within(self.new_task(stdio))?;
        self.has_task = true;
        Ok(self.api.call("Tasks.Create", self.api.tasks().create(request))?.pid)
    }

    /// Starts its task.
    pub fn start(&self) -> Result<()> {
        let request = StartRequest { container_id: self.id.clone(), ..StartRequest::default() };
        self.api.call("Tasks.Start", self.api.tasks().start(self.api.within(request)?)).map(drop)
    }

    /// Waits for the end of its task and returns the exit status.
    pub fn wait(&self, deadline: Duration) -> Result<u32> {
        let request = WaitRequest { container_id: self.id.clone(), ..WaitRequest::default() };
        let mut tasks = self.api.tasks();
        let answer = tasks.wait(self.api.within(request)?);
        Ok(self.api.call_within("Tasks.Wait", deadline, answer)?.exit_status)
    }

    /// Sends `signal` to its first process.
    pub fn kill(&self, signal: u32) -> Result<()> {
        let request = KillRequest { container_id: self.id.clone(), signal, ..KillRequest::default() };
        self.api.call("Tasks.Kill", self.api.tasks().kill(self.api.within(request)?))
    }

    /// Stops all of its processes where they are.
    pub fn pause(&self) -> Result<()> {
        let request = PauseTaskRequest { container_id: self.id.clone() };
        self.api.call("Tasks.Pause", self.api.tasks().pause(self.api.within(request)?))
    }

    /// Lets them go on.
    pub fn resume(&self) -> Result<()> {
        let request = ResumeTaskRequest { container_id: self.id.clone() };
        self.api.call("Tasks.Resume", self.api.tasks().resume(self.api.within(request)?))
    }

    /// How its task is, in containerd's words, if there is one.
    pub fn status(&self) -> Result<Option<&'static str>> {
        let request = GetRequest { container_id: self.id.clone(), ..GetRequest::default() };
        match self.api.call("Tasks.Get", self.api.tasks().get(self.api.within(request)?)) {
            Ok(answer) => Ok(answer.process.map(|process| process.status().as_str_name())),
            Err(error) if code(&error) == Some(Code::NotFound) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The type of the message that tells what it uses, and how long that is.
    pub fn metrics(&self) -> Result<(String, usize)> {
        let request = MetricsRequest { filters: vec![format!("id=={}", self.id)] };
        let answer = self.api.call("Tasks.Metrics", self.api.tasks().metrics(self.api.within(request)?))?;
        let data =
            answer.metrics.into_iter().find(|metric| metric.id == self.id).and_then(|metric| metric.data);
        let data = data.with_context(|| format!("there are no metrics of {}", self.id))?;
        Ok((data.type_url, data.value.len()))
    }

    /// Ends its input.
    pub fn close_stdin(&self) -> Result<()> {
        let request =
            CloseIoRequest { container_id: self.id.clone(), stdin: true, ..CloseIoRequest::default() };
        self.api.call("Tasks.CloseIO", self.api.tasks().close_io(self.api.within(request)?))
    }

    /// Sets the size of its terminal, in columns and lines.
    pub fn resize(&self, (width, height): (u32, u32)) -> Result<()> {
        let request =
            ResizePtyRequest { container_id: self.id.clone(), width, height, ..ResizePtyRequest::default() };
        self.api.call("Tasks.ResizePty", self.api.tasks().resize_pty(self.api.within(request)?))
    }

    /// Changes its limits, as `linux.resources` has them.
    pub fn update(&self, resources: &Value) -> Result<()> {
        let resources = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
            value: serde_json::to_vec(resources).context("writing the new limits")?,
        };
        let request = UpdateTaskRequest {
            container_id: self.id.clone(),
            resources: Some(resources),
            ..UpdateTaskRequest::default()
        };
        self.api.call("Tasks.Update", self.api.tasks().update(self.api.within(request)?))
    }

    /// Deletes its task, which must have ended, and returns the exit status.
    pub fn delete_task(&mut self) -> Result<u32> {
        let request = DeleteTaskRequest { container_id: self.id.clone() };
        let answer = self.api.call("Tasks.Delete", self.api.tasks().delete(self.api.within(request)?))?;
        self.has_task = false;
        Ok(answer.exit_status)
    }

    /// Removes it with its root file system.
    pub fn delete(self) -> Result<()> {
        let removed = self.remove();
        std::mem::forget(self);
        removed
    }

    fn remove(&self) -> Result<()> {
        let request = DeleteContainerRequest { id: self.id.clone() };
        let api = self.api;
        let record = api.call("Containers.Delete", api.containers().delete(api.within(request)?));
        let snapshot = api.remove_snapshot(&self.id);
        // Half of it may never have been made.
        for done in [record, snapshot] {
            done.or_else(|error| if code(&error) == Some(Code::NotFound) { Ok(()) } else { Err(error) })?;
        }
        Ok(())
    }

    fn abandon(&mut self) -> Result<()> {
        if self.has_task {
            // Ended already, or it never came to be: Delete tells.
            let _ = self.kill(9).and_then(|()| self.wait(Duration::from_secs(20)));
            match self.delete_task() {
                Err(error) if code(&error) != Some(Code::NotFound) => return Err(error),
                _ => {}
            }
        }
        self.remove()
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.abandon() {
            eprintln!("# removing the container {}: {error:#}", self.id);
        }
    }
}

pub(super) fn text(path: &Path) -> String {
    path.display().to_string()
}
