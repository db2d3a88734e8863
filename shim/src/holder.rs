//! The process that stands for a container on the host.
//!
//! Clients look for the network namespace at `/proc/PID/ns/net`, see by the number whether the container is there,
//! and tell containers of a pod apart by it. So each container has a process of its own that does nothing: it is in
//! the network namespace, and ends when its standard input does, whose other end the shim has.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use nix::sched::{CloneFlags, setns, unshare};

use crate::process::Process;

/// The namespace that a holder is in.
#[derive(Debug)]
pub enum Network {
    /// One that is there.
    Of(OwnedFd),
    /// A new one.
    New,
}

/// A process that stands for a container. It ends with this value.
#[derive(Debug)]
pub struct Holder {
    child: Child,
    process: Process,
}

impl Holder {
    /// Starts one.
    pub fn start(network: Network) -> io::Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.arg0("supermachine-task").arg("hold").env_clear().current_dir("/");
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        // SAFETY: after the fork there are only two system calls, with values made before it.
        unsafe {
            command.pre_exec(move || match &network {
                Network::Of(namespace) => Ok(setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)?),
                Network::New => Ok(unshare(CloneFlags::CLONE_NEWNET)?),
            });
        }
        let mut child = command.spawn()?;
        match Process::of(child.id()) {
            Ok(process) => Ok(Self { child, process }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    /// The process.
    pub fn process(&self) -> Process {
        self.process
    }

    /// The network namespace that it is in.
    pub fn network(&self) -> io::Result<OwnedFd> {
        Ok(File::open(format!("/proc/{}/ns/net", self.process.pid))?.into())
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Is that process.
pub fn hold() {
    let _ = nix::sys::prctl::set_name(c"supermachine-task");
    let _ = io::copy(&mut io::stdin(), &mut io::sink());
}
