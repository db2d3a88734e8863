//! The harness of the end-to-end tests.
//!
//! A test program is a table of [`Test`]s handed to [`run`]. Each round of a test runs in a child process of
//! its own, so that a panic or a hang costs that test and nothing else; when a test fails, what the system
//! logged meanwhile is attached. The programs:
//!
//! * `inside` runs in the emulated host and drives containerd, its clients and our programs there;
//! * `outside` runs on the developer's machine and drives the emulated host itself;
//! * `bench` measures, `soak` repeats everything often enough to find what is rare.

pub mod agent;
pub mod bed;
pub mod bench;
pub mod boot_time;
mod cli;
pub mod command;
pub mod container_time;
pub mod containerd;
pub mod cri;
pub mod fifo;
mod filter;
pub mod guest;
pub mod leaks;
mod logs;
pub mod network_time;
pub mod pattern;
pub mod process;
mod record;
mod runner;
pub mod streams;
pub mod terminal;
mod test;
pub mod tree;
pub mod wait;

pub use cli::{Scale, World};
pub use filter::Filter;
pub use logs::LogSources;
pub use record::{Record, Verdict};
pub use runner::{NO_SUCH_TEST, run};
pub use test::{Ctx, Outcome, Rounds, Test};
