//! A blocking client of containerd's gRPC API.
//!
//! The tokio runtime it needs lives in here and runs only while a call is under way; every call has a
//! deadline. Errors name the call and keep containerd's code and words.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use containerd_client::services::v1::containers_client::ContainersClient;
use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::leases_client::LeasesClient;
use containerd_client::services::v1::namespaces_client::NamespacesClient;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::snapshots::{
    ListSnapshotsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest,
};
use containerd_client::services::v1::tasks_client::TasksClient;
use containerd_client::services::v1::version_client::VersionClient;
use containerd_client::services::v1::{
    GetImageRequest, ListContainersRequest, ListNamespacesRequest, ListTasksRequest, ReadContentRequest,
};
use containerd_client::tonic::client::Grpc;
use containerd_client::tonic::codegen::http::uri::PathAndQuery;
use containerd_client::tonic::transport::Channel;
use containerd_client::tonic::{Code, IntoRequest, Request, Response, Status, Streaming};
use containerd_client::types::Mount;
use prost::Message;
use tokio::runtime::Runtime;
use tonic_prost::ProstCodec;

/// What containerd says it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// `1.7.24` and the like.
    pub version: String,
    /// The commit it was built from.
    pub revision: String,
}

/// A connection to containerd, working in one namespace.
pub struct Api {
    runtime: Runtime,
    channel: Channel,
    socket: PathBuf,
    namespace: String,
    deadline: Duration,
}

impl Api {
    /// Connects to `socket`. Each later call may take `deadline`.
    pub fn connect(socket: &Path, namespace: &str, deadline: Duration) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("starting a runtime for gRPC")?;
        let connecting = async { tokio::time::timeout(deadline, containerd_client::connect(socket)).await };
        let channel = runtime
            .block_on(connecting)
            .map_err(|_| anyhow!("no answer within {} s", deadline.as_secs()))
            .and_then(|connected| connected.map_err(anyhow::Error::from))
            .with_context(|| {
                format!("connecting to containerd at {}; is it running, with this socket?", socket.display())
            })?;
        let (socket, namespace) = (socket.to_owned(), namespace.to_owned());
        Ok(Self { runtime, channel, socket, namespace, deadline })
    }

    /// containerd's own version.
    pub fn version(&self) -> Result<Version> {
        let mut client = VersionClient::new(self.channel.clone());
        let answer = self.call("Version", client.version(()))?;
        Ok(Version { version: answer.version, revision: answer.revision })
    }

    /// Everything containerd keeps for containers, in all namespaces, each with a name for people.
    pub fn objects(&self) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for namespace in self.namespaces()? {
            let mut add = |kind: &str, name: &str| found.push(format!("{kind} {namespace}/{name}"));
            let mut containers = ContainersClient::new(self.channel.clone());
            let request = within(&namespace, ListContainersRequest::default())?;
            for container in self.call("Containers.List", containers.list(request))?.containers {
                add("container", &container.id);
            }
            let mut tasks = TasksClient::new(self.channel.clone());
            let request = within(&namespace, ListTasksRequest::default())?;
            for task in self.call("Tasks.List", tasks.list(request))?.tasks {
                add("task", &task.id);
            }
            let mut leases = LeasesClient::new(self.channel.clone());
            let request =
                within(&namespace, containerd_client::services::v1::ListRequest { filters: Vec::new() })?;
            for lease in self.call("Leases.List", leases.list(request))?.leases {
                add("lease", &lease.id);
            }
            for key in self.snapshots(&namespace)? {
                add("snapshot", &key);
            }
        }
        Ok(found)
    }

    /// The namespaces there are.
    pub fn namespaces(&self) -> Result<Vec<String>> {
        let mut client = NamespacesClient::new(self.channel.clone());
        let request = ListNamespacesRequest { filter: String::new() };
        let answer = self.call("Namespaces.List", client.list(request))?;
        Ok(answer.namespaces.into_iter().map(|namespace| namespace.name).collect())
    }

    fn snapshots(&self, namespace: &str) -> Result<Vec<String>> {
        let mut client = SnapshotsClient::new(self.channel.clone());
        let request = ListSnapshotsRequest { snapshotter: SNAPSHOTTER.into(), filters: Vec::new() };
        let request = within(namespace, request)?;
        let parts = self.stream("Snapshots.List", client.list(request), usize::MAX, |_| 1)?;
        Ok(parts.into_iter().flat_map(|part| part.info).map(|info| info.name).collect())
    }

    /// A writable snapshot on top of `parent`, and how it is mounted.
    pub(super) fn prepare_snapshot(&self, key: &str, parent: &str) -> Result<Vec<Mount>> {
        let mut client = SnapshotsClient::new(self.channel.clone());
        let request = PrepareSnapshotRequest {
            snapshotter: SNAPSHOTTER.into(),
            key: key.into(),
            parent: parent.into(),
            // Until a container refers to it, only this keeps the garbage collector off.
            labels: [("containerd.io/gc.root".to_owned(), "integration".to_owned())].into(),
        };
        Ok(self.call("Snapshots.Prepare", client.prepare(self.within(request)?))?.mounts)
    }

    pub(super) fn remove_snapshot(&self, key: &str) -> Result<()> {
        let mut client = SnapshotsClient::new(self.channel.clone());
        let request = RemoveSnapshotRequest { snapshotter: SNAPSHOTTER.into(), key: key.into() };
        self.call("Snapshots.Remove", client.remove(self.within(request)?))
    }

    pub(super) fn image_digest(&self, name: &str) -> Result<String> {
        let mut client = ImagesClient::new(self.channel.clone());
        let request = GetImageRequest { name: name.into() };
        let image = self.call("Images.Get", client.get(self.within(request)?))?.image;
        let target = image.and_then(|image| image.target);
        Ok(target.with_context(|| format!("the image {name} points nowhere"))?.digest)
    }

    pub(super) fn content(&self, digest: &str, at_most: usize) -> Result<Vec<u8>> {
        let mut client = ContentClient::new(self.channel.clone());
        let request = self.within(ReadContentRequest { digest: digest.into(), offset: 0, size: 0 })?;
        let parts = self.stream("Content.Read", client.read(request), at_most, |part| part.data.len())?;
        Ok(parts.into_iter().flat_map(|part| part.data).collect())
    }

    pub(super) fn tasks(&self) -> TasksClient<Channel> {
        TasksClient::new(self.channel.clone())
    }

    pub(super) fn leases(&self) -> LeasesClient<Channel> {
        LeasesClient::new(self.channel.clone())
    }

    pub(super) fn containers(&self) -> ContainersClient<Channel> {
        ContainersClient::new(self.channel.clone())
    }

    pub(super) fn namespace(&self) -> &str {
        &self.namespace
    }

    /// `message` as a request in this connection's namespace.
    pub(super) fn within<T>(&self, message: T) -> Result<Request<T>> {
        within(&self.namespace, message)
    }

    /// Calls a method of a service that no crate has the client of, with messages of ours.
    pub(crate) fn unary<A: Message + Default + 'static>(
        &self,
        service: &str,
        method: &str,
        message: impl Message + 'static,
    ) -> Result<A> {
        let path = PathAndQuery::try_from(format!("{service}/{method}"))?;
        let mut client = Grpc::new(self.channel.clone());
        self.call(method, async {
            client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
            client.unary(Request::new(message), path, ProstCodec::default()).await
        })
    }

    /// Waits for an answer.
    pub(super) fn call<T>(
        &self,
        name: &str,
        answer: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T> {
        self.call_within(name, self.deadline, answer)
    }

    /// Waits for an answer that may take `deadline`.
    pub(super) fn call_within<T>(
        &self,
        name: &str,
        deadline: Duration,
        answer: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T> {
        let answered = self.runtime.block_on(async { tokio::time::timeout(deadline, answer).await });
        match answered {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(self.refused(name, &status)),
            Err(_) => bail!(
                "containerd at {} did not answer {name} within {:.1} s",
                self.socket.display(),
                deadline.as_secs_f64()
            ),
        }
    }

    /// Collects a streamed answer of at most `at_most`, as `size` counts its parts.
    fn stream<T>(
        &self,
        name: &str,
        answer: impl Future<Output = Result<Response<Streaming<T>>, Status>>,
        at_most: usize,
        size: impl Fn(&T) -> usize,
    ) -> Result<Vec<T>> {
        let mut incoming = self.call(name, answer)?;
        let collecting = async {
            let (mut parts, mut total) = (Vec::new(), 0_usize);
            while let Some(part) = incoming.message().await? {
                total = total.saturating_add(size(&part));
                if total > at_most {
                    return Err(Status::new(Code::ResourceExhausted, format!("more than {at_most}")));
                }
                parts.push(part);
            }
            Ok(parts)
        };
        let collected =
            self.runtime.block_on(async { tokio::time::timeout(self.deadline, collecting).await });
        match collected {
            Ok(answer) => answer.map_err(|status| self.refused(name, &status)),
            Err(_) => bail!("{name} did not end within {:.1} s", self.deadline.as_secs_f64()),
        }
    }

    fn refused(&self, name: &str, status: &Status) -> anyhow::Error {
        Refused {
            call: name.to_owned(),
            socket: self.socket.clone(),
            code: status.code(),
            message: status.message().to_owned(),
        }
        .into()
    }
}

/// containerd answered, and the answer is no.
#[derive(Debug, thiserror::Error)]
#[error("containerd at {} refused {call} with {code:?}: {message}", socket.display())]
struct Refused {
    call: String,
    socket: PathBuf,
    code: Code,
    message: String,
}

/// The snapshotter of every containerd that is not told otherwise.
pub(super) const SNAPSHOTTER: &str = "overlayfs";

fn within<T>(namespace: &str, message: T) -> Result<Request<T>> {
    let mut request = message.into_request();
    let value = namespace.parse().with_context(|| format!("{namespace:?} is no name of a namespace"))?;
    request.metadata_mut().insert("containerd-namespace", value);
    Ok(request)
}

/// The code with which containerd refused a call, if that is what `error` is.
pub(super) fn code(error: &anyhow::Error) -> Option<Code> {
    error.downcast_ref::<Refused>().map(|refused| refused.code)
}

/// The name of the code with which containerd refused a call, and its words, if that is what `error` is.
pub fn refusal(error: &anyhow::Error) -> Option<(String, &str)> {
    error.downcast_ref::<Refused>().map(|refused| (format!("{:?}", refused.code), refused.message.as_str()))
}
