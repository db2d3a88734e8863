//! A process beside a container's own.

use std::time::Duration;

use anyhow::{Context, Result};
use containerd_client::services::v1::{DeleteProcessRequest, ExecProcessRequest, StartRequest, WaitRequest};
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
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
            value: serde_json::to_vec(&process(arguments, false)).context("writing the process")?,
        };
        let request = self.api.within(ExecProcessRequest {
            container_id: self.id.clone(),
            exec_id: id.into(),
            stdin: stdio.stdin.as_deref().map(text).unwrap_or_default(),
            stdout: text(&stdio.stdout),
            stderr: text(&stdio.stderr),
            terminal: false,
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

    /// Deletes it, which must have ended.
    pub fn delete(self) -> Result<()> {
        let (api, id) = (self.container.api, &self.container.id);
        let request = DeleteProcessRequest { container_id: id.clone(), exec_id: self.id.clone() };
        api.call("Tasks.DeleteProcess", api.tasks().delete_process(api.within(request)?)).map(drop)
    }
}
