//! The system calls that a process may use.

use anyhow::{Context, Result};
use oci_spec::runtime::LinuxSeccomp;

/// Lays `profile` on this process. Without `no_new_privs` it takes a privilege.
pub fn load(profile: &LinuxSeccomp) -> Result<()> {
    libcontainer::seccomp::initialize_seccomp(profile).map(drop).context("loading the seccomp profile")
}
