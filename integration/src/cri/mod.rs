//! containerd's interface for Kubernetes, called as the kubelet calls it.

pub mod channels;
pub mod messages;

use std::time::Duration;

use anyhow::{Context, Result};
use prost::Message;

use crate::containerd::Api;
use channels::Channels;
use messages::{
    AttachRequest, ContainerConfig, ContainerStats, ContainerStatsResponse, ContainerStatus,
    ContainerStatusResponse, CreateContainerRequest, ExecRequest, ExecSyncRequest, ExecSyncResponse,
    LinuxContainerResources, LinuxPodSandboxStats, ListPodSandboxResponse, Nothing, OfContainer, OfSandbox,
    PodSandbox, PodSandboxConfig, PodSandboxStatsResponse, PodSandboxStatus, PodSandboxStatusResponse,
    PortForwardRequest, RunPodSandboxRequest, StatusResponse, StopContainerRequest, Streaming,
    UpdateContainerResourcesRequest,
};

/// The interface of a containerd that serves it.
pub struct Cri(Api);

impl Cri {
    /// Over a connection to it.
    pub fn new(api: Api) -> Self {
        Self(api)
    }

    fn call<A: Message + Default + 'static>(
        &self,
        method: &'static str,
        message: impl Message + 'static,
    ) -> Result<A> {
        self.0.unary("/runtime.v1.RuntimeService", method, message)
    }

    /// Whether it could run pods: all its conditions, and why not if one does not hold.
    pub fn ready(&self) -> Result<Result<(), String>> {
        let answer: StatusResponse = self.call("Status", Nothing {})?;
        let conditions = answer.status.unwrap_or_default().conditions;
        let unmet: Vec<_> = conditions.iter().filter(|condition| !condition.status).collect();
        Ok(if unmet.is_empty() && !conditions.is_empty() { Ok(()) } else { Err(format!("{unmet:?}")) })
    }

    /// Runs a pod's sandbox, and says which.
    pub fn run_sandbox(&self, config: PodSandboxConfig, handler: &str) -> Result<String> {
        let request = RunPodSandboxRequest { config: Some(config), runtime_handler: handler.into() };
        let answer: OfSandbox = self.call("RunPodSandbox", request)?;
        Ok(answer.pod_sandbox_id)
    }

    /// Ends all that is in a sandbox.
    pub fn stop_sandbox(&self, id: &str) -> Result<()> {
        self.call::<Nothing>("StopPodSandbox", OfSandbox { pod_sandbox_id: id.into() }).map(drop)
    }

    /// Removes a sandbox, and all that was in it.
    pub fn remove_sandbox(&self, id: &str) -> Result<()> {
        self.call::<Nothing>("RemovePodSandbox", OfSandbox { pod_sandbox_id: id.into() }).map(drop)
    }

    /// The sandboxes there are.
    pub fn sandboxes(&self) -> Result<Vec<PodSandbox>> {
        let answer: ListPodSandboxResponse = self.call("ListPodSandbox", Nothing {})?;
        Ok(answer.items)
    }

    /// What there is to be said of a sandbox.
    pub fn sandbox(&self, id: &str) -> Result<PodSandboxStatus> {
        let request = OfSandbox { pod_sandbox_id: id.into() };
        let answer: PodSandboxStatusResponse = self.call("PodSandboxStatus", request)?;
        answer.status.context("PodSandboxStatus says nothing")
    }

    /// Makes a container in a sandbox that was made from `sandbox`, and says which.
    pub fn create(&self, id: &str, sandbox: &PodSandboxConfig, config: ContainerConfig) -> Result<String> {
        let request = CreateContainerRequest {
            pod_sandbox_id: id.into(),
            config: Some(config),
            sandbox_config: Some(sandbox.clone()),
        };
        let answer: OfContainer = self.call("CreateContainer", request)?;
        Ok(answer.container_id)
    }

    /// Starts a container that was made.
    pub fn start(&self, id: &str) -> Result<()> {
        self.call::<Nothing>("StartContainer", OfContainer { container_id: id.into() }).map(drop)
    }

    /// Asks a container to end, and makes it after a while.
    pub fn stop(&self, id: &str, after: Duration) -> Result<()> {
        let timeout = i64::try_from(after.as_secs())?;
        self.call::<Nothing>("StopContainer", StopContainerRequest { container_id: id.into(), timeout })
            .map(drop)
    }

    /// Removes a container.
    pub fn remove(&self, id: &str) -> Result<()> {
        self.call::<Nothing>("RemoveContainer", OfContainer { container_id: id.into() }).map(drop)
    }

    /// What there is to be said of a container.
    pub fn container(&self, id: &str) -> Result<ContainerStatus> {
        let answer: ContainerStatusResponse =
            self.call("ContainerStatus", OfContainer { container_id: id.into() })?;
        answer.status.context("ContainerStatus says nothing")
    }

    /// Gives a container other limits.
    pub fn update(&self, id: &str, resources: LinuxContainerResources) -> Result<()> {
        let request = UpdateContainerResourcesRequest { container_id: id.into(), linux: Some(resources) };
        self.call::<Nothing>("UpdateContainerResources", request).map(drop)
    }

    /// Has a container's log written to a new file, as the old one was moved.
    pub fn reopen_log(&self, id: &str) -> Result<()> {
        self.call::<Nothing>("ReopenContainerLog", OfContainer { container_id: id.into() }).map(drop)
    }

    /// Runs a program in a container, at most for so many seconds.
    pub fn exec(&self, id: &str, words: &[&str], seconds: i64) -> Result<ExecSyncResponse> {
        let cmd = words.iter().map(|&word| word.to_owned()).collect();
        self.call("ExecSync", ExecSyncRequest { container_id: id.into(), cmd, timeout: seconds })
    }

    /// Runs a program in a container, on a terminal that is written to.
    pub fn exec_on_terminal(&self, id: &str, words: &[&str]) -> Result<Channels> {
        let request = ExecRequest {
            container_id: id.into(),
            cmd: words.iter().map(|&word| word.to_owned()).collect(),
            tty: true,
            stdin: true,
            stdout: true,
            stderr: false,
        };
        let streaming: Streaming = self.call("Exec", request)?;
        Channels::open(&streaming.url)
    }

    /// Joins a container's streams.
    pub fn attach(&self, id: &str) -> Result<Channels> {
        let request =
            AttachRequest { container_id: id.into(), stdin: true, tty: false, stdout: true, stderr: true };
        let streaming: Streaming = self.call("Attach", request)?;
        Channels::open(&streaming.url)
    }

    /// Connects to a port of a sandbox's localhost.
    pub fn forward(&self, id: &str, port: u16) -> Result<Channels> {
        let request = PortForwardRequest { pod_sandbox_id: id.into(), port: vec![port.into()] };
        let streaming: Streaming = self.call("PortForward", request)?;
        Channels::open(&streaming.url)
    }

    /// What a container has used.
    pub fn usage(&self, id: &str) -> Result<ContainerStats> {
        let answer: ContainerStatsResponse =
            self.call("ContainerStats", OfContainer { container_id: id.into() })?;
        answer.stats.context("ContainerStats says nothing")
    }

    /// What a sandbox has used.
    pub fn sandbox_usage(&self, id: &str) -> Result<LinuxPodSandboxStats> {
        let answer: PodSandboxStatsResponse =
            self.call("PodSandboxStats", OfSandbox { pod_sandbox_id: id.into() })?;
        answer.stats.and_then(|stats| stats.linux).context("PodSandboxStats says nothing")
    }
}
