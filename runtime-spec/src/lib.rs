//! From config.json to a plan, by pure functions.
//!
//! What a container engine asks for is written for a process on the host's own kernel. Here it becomes a
//! [`Plan`] for a container in a machine of its own: what the guest is told, what the host mounts, which disks
//! and sockets the machine has, how large it is, which network it is in, which hooks run where. What cannot be
//! honoured there is an [`Error`] that names it; nothing is dropped in silence, and what is read differently
//! than it stands is a [`Note`](plan::Note).
//!
//! ```text
//! config.json --read::spec--+
//! files of TOML --load------+--> Request --plan()--> Plan
//! CreateTaskRequest.rootfs--+
//! what the host is like ----+
//! ```
//!
//! Nothing here does I/O or knows the time: the caller brings texts, and looks at the host ([`host::Files`])
//! when asked. [`features()`] says what is honoured, by the same tables.

pub mod annotations;
pub mod cgroup;
pub mod config;
pub mod features;
pub mod host;
pub mod kind;
pub mod layout;
pub mod plan;
pub mod read;
pub mod size;

mod devices;
mod error;
mod hooks;
mod labels;
mod logger;
mod mounts;
mod namespaces;
mod network;
mod planner;
mod platform;
mod process;
mod resources;
mod rootfs;
mod seccomp;
mod sysctl;
#[cfg(test)]
mod testing;

pub use error::{Error, Result};
pub use features::features;
pub use kind::Kind;
pub use plan::Plan;
pub use planner::{Request, plan};
pub use process::exec;
pub use resources::{Update, update};
pub use rootfs::RootfsMount;
