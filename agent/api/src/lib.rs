//! What a shim and the agent in its machine say to each other.
//!
//! - [`Agent`] is served on vsock port [`RPC_PORT`] with ttrpc: `proto/agent.proto` is the reference.
//! - Bytes of standard streams travel apart from that, each stream on a connection of its own to
//!   [`STDIO_PORT`], which begins with a [`stdio::Header`].
//! - Connections to localhost of the namespace on the host come to [`FORWARD_PORT`], each of which begins with a
//!   [`forward::Header`].
//! - Questions for names that the host answers come on connections to the host's [`RESOLVER_PORT`], each of which begins
//!   with a [`resolver::Header`].
//! - When the agent can be spoken to, it connects to [`READY_PORT`] of the host once and hangs up again; it does
//!   not mind if nobody listens there.
//!
//! Ports of the guest are below 1024, so it takes a privilege to listen on them in the agent's place. The agent
//! serves only whoever calls from the host.
//!
//! [`dial`] speaks the monitor's half: vsock streams are connections to a unix socket on the host.

pub mod dial;
pub mod forward;
pub mod resolver;
pub mod stdio;

/// Messages of the protocol.
#[allow(warnings, clippy::all, clippy::pedantic, clippy::restriction, missing_docs)]
pub mod agent {
    include!(concat!(env!("OUT_DIR"), "/agent.rs"));
}

/// Client and server of the protocol, generated.
#[allow(warnings, clippy::all, clippy::pedantic, clippy::restriction, missing_docs)]
pub mod agent_ttrpc {
    use super::agent;
    include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
}

pub use agent_ttrpc::{Agent, AgentClient, create_agent};

/// The version of the protocol. It grows with what the other side has to know of.
pub const VERSION: u32 = 6;

/// The guest's port of [`Agent`].
pub const RPC_PORT: u32 = 1;
/// The guest's port of standard streams.
pub const STDIO_PORT: u32 = 2;
/// The guest's port of connections to its localhost.
pub const FORWARD_PORT: u32 = 3;
/// The host's port on which the agent rings when it serves.
pub const READY_PORT: u32 = 1;
/// The host's port behind which its resolvers are.
pub const RESOLVER_PORT: u32 = 2;
/// What the agent prints on the console, on a line of its own, when it serves.
pub const READY_LINE: &str = "supermachine-agent: ready";

/// The type of the value of `StatsResponse`.
pub const METRICS_TYPE: &str = "io.containerd.cgroups.v2.Metrics";

/// How long `Start` waits for streams that were announced and are not connected.
pub const STREAMS_DEADLINE: std::time::Duration = std::time::Duration::from_secs(10);
/// How long streams live on after `Delete`, for what a process has written.
pub const DRAIN_DEADLINE: std::time::Duration = std::time::Duration::from_secs(10);
/// How many events an answer of `Events` has at most.
pub const MOST_EVENTS: usize = 256;

/// How many places an answer of `Watched` has at most.
pub const MOST_WATCHED: usize = 4096;
/// How many bytes the names of these have at most, all together.
pub const MOST_WATCHED_BYTES: usize = 1 << 20;
/// How much a call of `Tell` tells at most.
pub const MOST_NEWS: usize = 1024;
/// What an agent does in a share with one of these group ids, from here on, has happened on the host already: the share does
/// nothing, and answers as if it had (`supermachine-vmm run --share TAG=DIR:news=NUMBER`).
pub const NEWS_GROUP: u32 = 0x736d_0000;

/// The longest id of a container or an exec.
pub const LONGEST_ID: usize = 128;

/// Whether `id` may name a container or an exec: it becomes the name of directories.
pub fn is_id(id: &str) -> bool {
    id.len() <= LONGEST_ID
        && id.starts_with(|c: char| c.is_ascii_alphanumeric())
        && id.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_names_of_directories() {
        for (id, good) in [
            ("a", true),
            ("0.b_c-d", true),
            (&"a".repeat(128), true),
            (&"a".repeat(129), false),
            ("", false),
            (".", false),
            ("-a", false),
            ("a/b", false),
            ("a\0", false),
            ("ä", false),
        ] {
            assert_eq!(is_id(id), good, "{id:?}");
        }
    }
}
