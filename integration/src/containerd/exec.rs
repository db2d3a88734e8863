//! A process beside a container's own.

use std::time::Duration;

use anyhow::{Context, Result};
use containerd_client::services::v1::{
    CloseIoRequest, DeleteProcessRequest, ExecProcessRequest, KillRequest, ResizePtyRequest, StartRequest,
    WaitRequest,
};
use prost_types::Any;

use super::container::{Container, Stdio, text};
use super::spec::process;

/// A process that was added to a running container. It goes with the container, if not before.
pub struct Exec<'a> {
    container: &'a Container<'a>,
    id: String,
}

impl Container<'_> {
    /// Adds the process `arguments` under the name `id`; it does not run yet.
    pub fn exec(&self, id: &str, arguments: &[&str], stdio: &Stdio) -> Result<Exec<'_>> {
        self.add(id, arguments, stdio, false)
    }

    /// The same on a terminal, which has no stream of errors.
    pub fn exec_on_terminal(&self, id: &str, arguments: &[&str], stdio: &Stdio) -> Result<Exec<'_>> {
        self.add(id, arguments, stdio, true)
    }

    /// The process `id`, whether or not there is one.
    pub fn exec_named(&self, id: &str) -> Exec<'_> {
        Exec { container: self, id: id.into() }
    }

    fn add(&self, id: &str, arguments: &[&str], stdio: &Stdio, terminal: bool) -> Result<Exec<'_>> {
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
            value: serde_json::to_vec(&process(arguments, terminal)).context("writing the process")?,
        };
        let request = self.api.within(ExecProcessRequest {
            container_id: self.id.clone(),
            exec_id: id.into(),
            stdin: stdio.stdin.as_deref().map(text).unwrap_or_default(),
            stdout: text(&stdio.stdout),
            stderr: text(&stdio.stderr),
            terminal,
            spec: Some(spec),
        })?;
        self.api.call("Tasks.Exec", self.api.tasks().exec(request))?;
        Ok(Exec { container: self, id: id.into() })
    }
}

impl Exec<'_> {
    /// Starts it.
    pub fn start(&self) -> Result<()> {
        let (api, id) = (self.container.api, &self.container.id);
        let request = StartRequest { container_id: id.clone(), exec_id: self.id.clone() };
        api.call("Tasks.Start", api.tasks().start(api.within(request)?)).map(drop)
    }

    /// Waits for its end and returns the exit status.
    pub fn wait(&self, deadline: Duration) -> Result<u32> {
        let (api, id) = (self.container.api, &self.container.id);
        let request = WaitRequest { container_id: id.clone(), exec_id: self.id.clone() };
        let mut tasks = api.tasks();
        let answer = tasks.wait(api.within(request)?);
        Ok(api.call_within("Tasks.Wait", deadline, answer)?.exit_status)
    }

    /// Ends its input.
    pub fn close_stdin(&self) -> Result<()> {
        let (api, id) = (self.container.api, &self.container.id);
        let request = CloseIoRequest { container_id: id.clone(), exec_id: self.id.clone(), stdin: true };
        api.call("Tasks.CloseIO", api.tasks().close_io(api.within(request)?))
    }

    /// Sends `signal` to it.
    pub fn kill(&self, signal: u32) -> Result<()> {
        let (api, id) = (self.container.api, &self.container.id);
        let request = KillRequest { container_id: id.clone(), exec_id: self.id.clone(), signal, all: false };
        api.call("Tasks.Kill", api.tasks().kill(api.within(request)?))
    }

    /// Sets the size of its terminal, in columns and lines.
    pub fn resize(&self, (width, height): (u32, u32)) -> Result<()> {
        let (api, id) = (self.container.api, &self.container.id);
        let request = ResizePtyRequest { container_id: id.clone(), exec_id: self.id.clone(), width, height };
        api.call("Tasks.ResizePty", api.tasks().resize_pty(api.within(request)?))
    }

    /// Deletes it, which must have ended.
    pub fn delete(&self) -> Result<()> {
        let (api, id) = (self.container.api, &self.container.id);
        let request = DeleteProcessRequest { container_id: id.clone(), exec_id: self.id.clone() };
        api.call("Tasks.DeleteProcess", api.tasks().delete_process(api.within(request)?)).map(drop)
    }
}
