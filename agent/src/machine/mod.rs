//! What is the machine's and not a container's: its modules, disks, clock, name, processors, network, leases and resolvers.

pub mod dhcp;
pub mod disks;
mod ethtool;
pub mod modules;
pub mod network;
pub mod resolvers;
pub mod settings;

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use log::warn;
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// For processes that were killed.
const GONE: Duration = Duration::from_secs(2);
/// PF_KTHREAD, among the flags of a process.
const KERNEL_THREAD: u32 = 0x0020_0000;

mod flush {
    // BLKFLSBUF: brings what was written to a disk, and to a file system on it, to the disk.
    nix::ioctl_none!(disk, 0x12, 97);
}

/// Kills everybody, and returns when they are gone and all that was written is where it is to be: the machine has nothing
/// then that it would have to be turned off for.
///
/// Files of shares are on the host by then, as what somebody has mapped of one goes there with him. Disks are what is left.
/// `sync` would have the host write all that anybody has written to the file systems that the shares are of.
pub fn wind_up() {
    let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
    let until = Instant::now() + GONE;
    while somebody_is_left() {
        if Instant::now() >= until {
            warn!("somebody is left {GONE:?} after being killed: what he writes from now on is lost");
            break;
        }
        sleep(Duration::from_millis(1));
    }
    let disks = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    for disk in disks {
        let node = Path::new("/dev").join(disk.file_name());
        // One without a node nobody had.
        let Ok(opened) = File::open(&node) else { continue };
        // SAFETY: it takes no argument.
        if let Err(error) = unsafe { flush::disk(opened.as_raw_fd()) } {
            warn!("flushing {}: {error}", node.display());
        }
    }
}

/// Whether there is a process beside this one that is not the kernel's own.
fn somebody_is_left() -> bool {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| *pid != std::process::id())
        .filter_map(|pid| fs::read_to_string(format!("/proc/{pid}/stat")).ok())
        .any(|stat| is_alive(&stat))
}

/// What `/proc/PID/stat` says of a process.
fn is_alive(stat: &str) -> bool {
    // The name may be anything, also one that ends like it.
    let Some((_, rest)) = stat.rsplit_once(')') else { return false };
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let [state, _, _, _, _, _, flags, ..] = fields.as_slice() else { return false };
    let is_kernels = flags.parse::<u32>().is_ok_and(|flags| flags & KERNEL_THREAD != 0);
    !is_kernels && !["Z", "X"].contains(state)
}

/// Process 1's last act.
pub fn power_off() {
    let _ = reboot(RebootMode::RB_POWER_OFF);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_left() {
        for (stat, alive) in [
            ("7 (sh) S 1 7 7 0 -1 4194560 1 2", true),
            ("7 (a) b) R 1 7 7 0 -1 4194560 1 2", true),
            ("7 (sh) Z 1 7 7 0 -1 4194560 1 2", false),
            ("7 (kworker/0:1) I 2 0 0 0 -1 69238880 1 2", false),
            ("7 (sh) S 1", false),
            ("", false),
        ] {
            assert_eq!(is_alive(stat), alive, "{stat}");
        }
        // What the kernel says of this process.
        assert!(is_alive(&fs::read_to_string("/proc/self/stat").unwrap()));
    }
}
