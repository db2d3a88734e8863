//! The init of the emulated host, and of the guests that test the monitor in it.
//!
//! As process 1 of the initrd it loads the drivers that the initrd brings. In a host it then moves to
//! the root disk, mounts what a host has, starts the services and serves requests (see the library)
//! on a TCP port that the tool forwards to. In a guest, which the word `testbed.guest` on the kernel's
//! command line makes it, it stays in the initrd and serves the same requests on a vsock port.
//!
//! Process 1 itself only reaps: everything else happens in its one child, so that waiting for
//! commands and adopting orphans never fight over the same process.

mod boot;
mod command;
mod listen;
mod prepare;
mod serve;

use std::process::ExitCode;

use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

fn main() -> ExitCode {
    if std::process::id() != 1 {
        eprintln!("testbed-init is process 1 of the emulated host; on this machine use hack/testbed");
        return ExitCode::from(2);
    }
    let serve = match boot::boot() {
        Ok(boot::Role::Host) => serve::serve_host,
        Ok(boot::Role::Guest) => serve::serve_guest,
        Err(error) => return stop(&format!("cannot boot: {error:#}")),
    };
    // SAFETY: this process has one thread, so the child owns every lock it could need.
    match unsafe { fork() } {
        Ok(ForkResult::Child) => {
            let error = serve();
            println!("testbed-init: serving ended: {error:#}");
            ExitCode::FAILURE
        }
        Ok(ForkResult::Parent { child }) => reap_until(child),
        Err(errno) => stop(&format!("cannot fork: {errno}")),
    }
}

/// Collects orphans until the serving child is gone.
fn reap_until(server: Pid) -> ExitCode {
    loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _)) if pid == server => {
                return stop("the server is gone");
            }
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return stop(&format!("cannot wait: {errno}")),
        }
    }
}

/// Says why and switches the host off: QEMU ends, and the tool shows the console.
fn stop(why: &str) -> ExitCode {
    println!("testbed-init: {why}");
    let _ = reboot(RebootMode::RB_POWER_OFF);
    ExitCode::FAILURE
}
