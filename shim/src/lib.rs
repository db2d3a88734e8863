//! containerd's runtime `io.containerd.supermachine.v2`: each container, or pod, in a machine of its own.
//!
//! [`cli`] is the program: `start` answers containerd in the dialect that it understands ([`bootstrap`]) and leaves
//! a daemon behind, which serves containerd's Task API.
//!
//! From the wire down: `rpc` is the adapter to ttrpc, `service` has a method for each call, [`ledger`] knows what
//! every process is doing and emits the events, which [`publisher`] sends. A container is made of what [`share`]
//! mounts, a [`cgroup`], a process that stands for it ([`holder`]), a [`machine`] and what its [`guest`] does; [`stdio`]
//! carries its streams. Others may go on from a [`checkpoint`] of it, or start where it was [`warm`]. All of that is in a [`journal`], by which it is undone, with a [`timeline`] beside it.
//!
//! `supermachine`, the operator's command, reads what all shims of the host have left in their directories
//! ([`inventory`]).

pub mod args;
pub mod blocking;
pub mod bootstrap;
pub mod cgroup;
pub mod checkpoint;
pub mod cleanup;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod deadlines;
pub mod error;
pub mod events;
pub mod fanotify;
pub mod group;
pub mod guest;
pub mod holder;
pub mod hooks;
pub mod host;
pub mod info;
pub mod inventory;
pub mod journal;
pub mod ledger;
pub mod logger;
pub mod loops;
pub mod machine;
pub mod paths;
pub mod process;
pub mod publisher;
pub mod rpc;
pub mod service;
pub mod share;
pub mod stdio;
pub mod template;
pub mod time;
pub mod timeline;
pub mod warm;
