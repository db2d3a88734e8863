//! What is the machine's and not a container's: its modules, disks, clock, name, processors, network, leases and resolvers.

pub mod dhcp;
pub mod disks;
mod ethtool;
pub mod modules;
pub mod network;
pub mod resolvers;
pub mod settings;

/// Process 1's last act: kills everybody, writes what is to be written, and turns the machine off.
pub fn power_off() {
    use nix::sys::reboot::{RebootMode, reboot};
    use nix::sys::signal::{Signal, kill};
    let _ = kill(nix::unistd::Pid::from_raw(-1), Signal::SIGKILL);
    nix::unistd::sync();
    let _ = reboot(RebootMode::RB_POWER_OFF);
}
