//! The agent: process 1 of a machine, which runs its containers for the shim.
//!
//! The binary is three programs. As process 1 it makes a system of the initrd ([`boot`]) and serves the shim
//! ([`service`]). Called with [`helper::WORD`] it does one thing that a process with other duties must not do, like
//! making a container, and ends. Between a container's `fork` and its `execve` it is the container's process.
#![cfg(target_os = "linux")]

mod boot;
mod cgroup;
mod console;
mod container;
mod devices;
mod events;
mod helper;
mod machine;
mod oom;
mod process;
mod reaper;
mod service;
mod sockets;
mod stats;
mod watches;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::process::ExitCode;

use nix::sys::reboot::{RebootMode, reboot};
use tokio::io::unix::AsyncFd;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        console::start("");
        let error = match boot::boot() {
            Ok(booted) => service::serve(booted),
            Err(error) => error.context("booting"),
        };
        log::error!("{error:#}");
        let _ = reboot(RebootMode::RB_POWER_OFF);
        return ExitCode::FAILURE;
    }
    if std::env::args_os().nth(1).is_some_and(|word| word == helper::WORD) {
        return helper::main();
    }
    eprintln!("supermachine-agent is process 1 of a guest; on a host there is nothing for it to do");
    ExitCode::from(2)
}

/// A descriptor, which does not block, to wait for.
fn polled<T: Descriptor>(descriptor: T) -> std::io::Result<AsyncFd<T>> {
    // SAFETY: either type has the one number, which is its own until it is dropped.
    Ok(unsafe { AsyncFd::register(descriptor) }?)
}

/// What is an open descriptor and nothing else.
trait Descriptor: std::os::fd::AsRawFd {}

impl Descriptor for OwnedFd {}
impl Descriptor for File {}
