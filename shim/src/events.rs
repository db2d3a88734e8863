//! Events, as containerd knows them.

use containerd_shim_protos::events::task::{
    TaskCheckpointed, TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused,
    TaskResumed, TaskStart,
};
use containerd_shim_protos::shim::event::Envelope;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};

use crate::time;

/// Something that happened to a task.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A container was made.
    Create(TaskCreate),
    /// Its process was started.
    Start(TaskStart),
    /// An exec was announced.
    ExecAdded(TaskExecAdded),
    /// An exec's process was started.
    ExecStarted(TaskExecStarted),
    /// A process has exited.
    Exit(TaskExit),
    /// The kernel has killed a process for memory.
    Oom(TaskOOM),
    /// A container stands still.
    Paused(TaskPaused),
    /// A container goes on.
    Resumed(TaskResumed),
    /// A container was written down.
    Checkpointed(TaskCheckpointed),
    /// A container is gone.
    Delete(TaskDelete),
}

impl Event {
    /// The topic it is published under.
    pub fn topic(&self) -> &'static str {
        match self {
            Self::Create(_) => "/tasks/create",
            Self::Start(_) => "/tasks/start",
            Self::ExecAdded(_) => "/tasks/exec-added",
            Self::ExecStarted(_) => "/tasks/exec-started",
            Self::Exit(_) => "/tasks/exit",
            Self::Oom(_) => "/tasks/oom",
            Self::Paused(_) => "/tasks/paused",
            Self::Resumed(_) => "/tasks/resumed",
            Self::Checkpointed(_) => "/tasks/checkpointed",
            Self::Delete(_) => "/tasks/delete",
        }
    }

    fn any(&self) -> protobuf::Result<Any> {
        // containerd looks for the bare name, without `type.googleapis.com/`.
        let (name, value) = match self {
            Self::Create(event) => ("TaskCreate", event.write_to_bytes()),
            Self::Start(event) => ("TaskStart", event.write_to_bytes()),
            Self::ExecAdded(event) => ("TaskExecAdded", event.write_to_bytes()),
            Self::ExecStarted(event) => ("TaskExecStarted", event.write_to_bytes()),
            Self::Exit(event) => ("TaskExit", event.write_to_bytes()),
            Self::Oom(event) => ("TaskOOM", event.write_to_bytes()),
            Self::Paused(event) => ("TaskPaused", event.write_to_bytes()),
            Self::Resumed(event) => ("TaskResumed", event.write_to_bytes()),
            Self::Checkpointed(event) => ("TaskCheckpointed", event.write_to_bytes()),
            Self::Delete(event) => ("TaskDelete", event.write_to_bytes()),
        };
        Ok(Any { type_url: format!("containerd.events.{name}"), value: value?, ..Any::default() })
    }

    /// As it is sent, from now.
    pub fn envelope(&self, namespace: &str) -> protobuf::Result<Envelope> {
        Ok(Envelope {
            timestamp: MessageField::some(time::exact(time::now())),
            namespace: namespace.to_owned(),
            topic: self.topic().to_owned(),
            event: MessageField::some(self.any()?),
            ..Envelope::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_bare_names() {
        let event = Event::Exit(TaskExit { container_id: "c".into(), exit_status: 3, ..TaskExit::default() });
        let envelope = event.envelope("ns").unwrap();
        assert_eq!((envelope.topic.as_str(), envelope.namespace.as_str()), ("/tasks/exit", "ns"));
        assert_eq!(envelope.event.type_url, "containerd.events.TaskExit");
        assert_eq!(TaskExit::parse_from_bytes(&envelope.event.value).unwrap().exit_status, 3);
    }
}
