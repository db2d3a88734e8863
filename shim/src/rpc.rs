//! The Task service on the wire, in both its versions, whose messages are the same.
//!
//! Every call runs in a task of its own: a client whose deadline passes, or who hangs up, leaves no call half done.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse,
    StateRequest, StateResponse, StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::shim_async::{Task, create_task};
use log::{debug, info};
use ttrpc::r#async::{Service, TtrpcContext};

use crate::error::{Error, Result};
use crate::info::VERSION;
use crate::service::Shim;
use crate::time::timestamp;

/// The name under which a version of the service is registered.
const V3: &str = "containerd.task.v3.Task";
const V2: &str = "containerd.task.v2.Task";

/// The adapter.
#[derive(Clone)]
pub struct TaskService(pub Arc<Shim>);

/// Both versions, to be registered.
pub fn services(shim: &Arc<Shim>) -> HashMap<String, Service> {
    let mut services = HashMap::new();
    for name in [V2, V3] {
        let made = create_task(Arc::new(TaskService(shim.clone())));
        services.extend(made.into_values().map(|service| (name.to_owned(), service)));
    }
    services
}

async fn run<T: Send + 'static>(
    what: String,
    call: impl Future<Output = Result<T>> + Send + 'static,
) -> ttrpc::Result<T> {
    debug!("{what}");
    let done = tokio::spawn(call).await.unwrap_or_else(|error| Err(Error::unknown(error)));
    done.map_err(|error| {
        info!("{what}: {error}");
        error.into()
    })
}

fn empty<T>(_: T) -> Empty {
    Empty::default()
}

/// A method of the service: what is logged of the request, and the call of the shim's.
macro_rules! call {
    ($self:ident, $request:ident, $name:literal, |$shim:ident| $call:expr) => {{
        let $shim = $self.0.clone();
        let what = format!(concat!($name, " {}"), $request.id);
        run(what, async move { $call }).await
    }};
}

#[async_trait]
impl Task for TaskService {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        call!(self, request, "State", |shim| shim.state(&request.id, &request.exec_id))
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        call!(self, request, "Create", |shim| {
            let pid = shim.create(request).await?;
            Ok(CreateTaskResponse { pid, ..CreateTaskResponse::default() })
        })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        call!(self, request, "Start", |shim| {
            let pid = shim.start(&request.id, &request.exec_id).await?;
            Ok(StartResponse { pid, ..StartResponse::default() })
        })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        call!(self, request, "Delete", |shim| shim.delete(&request.id, &request.exec_id).await)
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        call!(self, request, "Pids", |shim| shim.pids(&request.id).await)
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        call!(self, request, "Pause", |shim| shim.pause(&request.id, true).await.map(empty))
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        call!(self, request, "Resume", |shim| shim.pause(&request.id, false).await.map(empty))
    }

    async fn checkpoint(&self, _: &TtrpcContext, request: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        call!(self, request, "Checkpoint", |shim| shim.checkpoint(request).await.map(|()| Empty::default()))
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        call!(self, request, "Kill", |shim| {
            let KillRequest { id, exec_id, signal, all, .. } = request;
            shim.kill(&id, &exec_id, signal, all).await.map(empty)
        })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        call!(self, request, "Exec", |shim| shim.exec(request).await.map(empty))
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        call!(self, request, "ResizePty", |shim| {
            let ResizePtyRequest { id, exec_id, width, height, .. } = request;
            shim.resize_pty(&id, &exec_id, width, height).await.map(empty)
        })
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        call!(self, request, "CloseIO", |shim| {
            shim.close_io(&request.id, &request.exec_id, request.stdin).map(empty)
        })
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        call!(self, request, "Update", |shim| shim.update(request).await.map(empty))
    }

    // Leaves nothing half done, so it ends with whoever waits.
    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let exit = self.0.wait(&request.id, &request.exec_id).await?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..WaitResponse::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        call!(self, request, "Stats", |shim| {
            let stats = Some(shim.stats(&request.id).await?).into();
            Ok(StatsResponse { stats, ..StatsResponse::default() })
        })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        call!(self, request, "Connect", |shim| {
            let task_pid = shim.connect(&request.id)?;
            let (shim_pid, version) = (std::process::id(), VERSION.to_owned());
            Ok(ConnectResponse { shim_pid, task_pid, version, ..ConnectResponse::default() })
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        call!(self, request, "Shutdown", |shim| {
            shim.shutdown();
            Ok(Empty::default())
        })
    }
}
