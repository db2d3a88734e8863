//! Clock, entropy, name, sysctls and processors of the machine.

use std::fs::{self, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

/// As much as the kernel's pool holds.
const MOST_ENTROPY: usize = 512;

nix::ioctl_write_ptr!(add_entropy_ioctl, b'R', 0x03, [libc::c_int; 2]);
nix::ioctl_none!(reseed, b'R', 0x07);

/// Sets the clock to so many nanoseconds since the epoch.
pub fn set_time(nanoseconds: i64) -> Result<()> {
    let since = Duration::from_nanos(u64::try_from(nanoseconds).context("a time before the epoch")?);
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from_duration(since)).context("setting the clock")
}

/// Mixes `bytes` into the kernel's pool, believes them, and lets generators begin anew.
pub fn add_entropy(bytes: &[u8]) -> Result<()> {
    /// `struct rand_pool_info` with its buffer.
    #[repr(C)]
    struct Pool {
        head: [libc::c_int; 2],
        buffer: [u8; MOST_ENTROPY],
    }
    ensure!(bytes.len() <= MOST_ENTROPY, "{} bytes of entropy are more than {MOST_ENTROPY}", bytes.len());
    let size = libc::c_int::try_from(bytes.len())?;
    let mut pool = Pool { head: [size * 8, size], buffer: [0; MOST_ENTROPY] };
    pool.buffer[..bytes.len()].copy_from_slice(bytes);
    let random = OpenOptions::new().write(true).open("/dev/urandom").context("opening /dev/urandom")?;
    // SAFETY: the kernel reads the head and then `size` bytes behind it, which are all within `pool`.
    unsafe { add_entropy_ioctl(random.as_raw_fd(), (&raw const pool).cast()) }.context("adding entropy")?;
    // SAFETY: the call has no argument.
    unsafe { reseed(random.as_raw_fd()) }.context("reseeding")?;
    Ok(())
}

/// Names the machine.
pub fn set_hostname(name: &str) -> Result<()> {
    nix::unistd::sethostname(name).with_context(|| format!("naming the machine {name:?}"))
}

/// Sets a sysctl by its name with dots.
pub fn set_sysctl(name: &str, value: &str) -> Result<()> {
    let path = sysctl_path(name).with_context(|| format!("{name:?} is not the name of a sysctl"))?;
    fs::write(&path, value).with_context(|| format!("setting {name} to {value:?}"))
}

fn sysctl_path(name: &str) -> Option<PathBuf> {
    let good = |c: char| c.is_ascii_alphanumeric() || "._-/@".contains(c);
    if name.is_empty() || name.starts_with(['.', '/']) || name.contains("..") || !name.chars().all(good) {
        return None;
    }
    // Names of interfaces may have dots, and then are written with slashes between the parts.
    let path = if name.contains('/') { name.to_owned() } else { name.replace('.', "/") };
    Some(PathBuf::from("/proc/sys").join(path))
}

/// Writes what is to be written, and forgets what can be read again: a snapshot does not have it, and whoever goes on
/// from one sees what is there then.
pub fn forget() -> Result<()> {
    nix::unistd::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").context("dropping caches")
}

/// Forgets, and moves what is left together: what is free then, in large pieces, the machine's balloon gives back.
pub fn settle() -> Result<()> {
    forget()?;
    // Not every kernel can.
    let _ = fs::write("/proc/sys/vm/compact_memory", "1");
    Ok(())
}

/// Lets `count` processors run, as far as the machine has them. Returns how many do.
pub fn set_online_cpus(count: u32) -> Result<u32> {
    ensure!(count > 0, "a machine has at least one processor that runs");
    let present = fs::read_to_string("/sys/devices/system/cpu/present").context("counting processors")?;
    let last: u32 = present.trim().rsplit(['-', ',']).next().unwrap_or("0").parse()?;
    for cpu in 1..=last {
        let path = format!("/sys/devices/system/cpu/cpu{cpu}/online");
        let wanted = if cpu < count { "1" } else { "0" };
        if fs::read_to_string(&path).is_ok_and(|now| now.trim() == wanted) {
            continue;
        }
        if let Err(error) = fs::write(&path, wanted) {
            bail!("bringing processor {cpu} to {wanted}: {error}");
        }
    }
    Ok(count.min(last + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_sysctls() {
        for (name, path) in [
            ("net.ipv4.ip_forward", Some("/proc/sys/net/ipv4/ip_forward")),
            ("net/ipv4/conf/eth0.1/forwarding", Some("/proc/sys/net/ipv4/conf/eth0.1/forwarding")),
            ("", None),
            ("/etc/passwd", None),
            ("../../etc/passwd", None),
            ("a b", None),
        ] {
            assert_eq!(sysctl_path(name), path.map(PathBuf::from), "{name}");
        }
    }
}
